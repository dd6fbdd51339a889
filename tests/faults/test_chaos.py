"""A short piece of chaos; the long one is `python -m tests.faults.chaos`."""

from pathlib import Path

import pytest

from tests.faults.chaos import LIMIT_S, chaos


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_random_requests_cancels_kills_and_stops(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        report = chaos(demo_model, requests=2000, seconds=60, seed=0)
    assert report.duplicated == 0
    assert report.finished > 100
    assert report.errors == []
    assert report.wrong == []
    assert report.slowest <= LIMIT_S, report.slow
    assert report.unusual == []
    assert sum(report.faults.values()) > 2
    for way in ("push", "pool"):
        assert report.totals[f"kv_{way}_verified_blocks"] > 0
        assert report.totals[f"kv_{way}_corrupt_blocks"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_of_workers_pool_and_routers(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"prefill": 3, "decode": 3, "routers": 2}
    with capsys.disabled():
        report = chaos(demo_model, requests=100_000, seconds=90, seed=1, counts=counts, every=10)
    assert report.finished > 100
    assert report.errors == []
    assert report.wrong == []
    assert report.slow == []
    assert report.duplicated == 0
    assert report.unusual == []
    assert sum(report.faults.values()) >= 4
