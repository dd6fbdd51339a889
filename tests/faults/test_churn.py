"""A short piece of churn, and a longer one; more of it with `python -m tests.faults.churn`."""

from pathlib import Path

import pytest

from tests.faults.churn import churn

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]


@pytest.mark.parametrize("seconds", [10, pytest.param(90, marks=pytest.mark.slow)])
async def test_every_router_knows_what_the_workers_hold(demo_model: Path, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        report = await churn(demo_model, seconds=seconds, seed=0)
    assert report.wrong == []
    for tier in ("device", "host", "files"):
        assert report.compared[tier] > 100
    assert report.finished > 50
    for fault in ("gap", "silent", "cut"):
        assert report.spoiled[fault] > 0
    assert report.relayed["gaps"] > 0
    assert report.relayed["mismatches"] > 0
    assert report.direct["gaps"] == report.direct["mismatches"] == 0  # what nobody spoils is right after every update
