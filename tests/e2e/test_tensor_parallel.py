"""Workers of several ranks, by real processes: the tokens are those of one rank; KV goes between workers of different degrees, every byte
of it; a rank that dies ends its worker, and a worker that dies its ranks."""

import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from baton.models.registry import read_config
from baton.runtime.build import build_engine
from baton.runtime.loaded import load
from baton.types import GenerateRequest, SamplingParams
from tests.cluster import RunningCluster, running_cluster
from tests.e2e.test_direct_push import complete, make_prompt
from tests.e2e.test_tiers import until
from tests.parity.models import engine_settings

pytestmark = pytest.mark.timeout(180)
BLOCK_SIZE, MAX_TOKENS = 16, 24


def prompt(seed: int, length: int) -> list[int]:
    return [token_id % 250 + 2 for token_id in make_prompt(seed, length)]


def expected(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """By one rank, in this process."""

    async def run() -> list[list[int]]:
        engine = build_engine(load(model, engine_settings()), (), budget_s=1.0)
        engine.start()
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
        answers: list[list[int]] = []
        for number, token_ids in enumerate(prompts):
            request = GenerateRequest(request_id=str(number), prompt_token_ids=tuple(token_ids), sampling=sampling)
            answers.append([token.token_id async for output in engine.submit(request) for token in output.tokens])
        await engine.stop()
        return answers

    return asyncio.run(run())


@contextmanager
def pair(model: Path, prefill: int, decode: int) -> Iterator[RunningCluster]:
    """One prefill and one decode worker of so many ranks, with different numbers of blocks and nothing but direct push between them."""
    settings = {
        "prefill.engine": {"tensor_parallel_size": prefill, "num_blocks": 150, "num_threads": 1},
        "decode.engine": {"tensor_parallel_size": decode, "num_blocks": 270, "num_threads": 1},
        "prefill": {"push.verify": "true", "cluster.lease_s": 3},
        "decode": {"push.verify": "true", "cluster.lease_s": 3},
        "router": {"local_prefill": "false", "cluster.lease_s": 3},
    }
    options = [part for role, values in settings.items() for key, value in values.items() for part in ("--set", f"{role}.{key}={value}")]
    with running_cluster(model=model, prefill=1, decode=1, kvstore=0, options=options) as cluster:
        yield cluster


def metric(cluster: RunningCluster, worker: str, name: str, label: str = "") -> float:
    address = next(each["metrics"] for each in cluster.workers() if each["id"] == worker)
    lines = httpx.get(f"http://{address}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"baton:{name}" + "{") and label in line)


def loaded(cluster: RunningCluster, tier: str) -> float:
    """Blocks."""
    return metric(cluster, "unified-0", "kv_tier_blocks_loaded_total", f'tier="{tier}"')


def ranks_of(cluster: RunningCluster, worker: str) -> list[psutil.Process]:
    """Beside rank 0."""
    return [child for child in cluster.children()[worker].children() if "baton.runtime.rank" in child.cmdline()]


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_kv_goes_between_workers_of_any_degrees(tiny_model: Path, prefill: int, decode: int) -> None:
    prompts = [prompt(length, length) for length in (65, 80, 300, 700)]
    answers = expected(tiny_model, prompts)
    config = read_config(tiny_model)
    block_bytes = config.num_layers * 2 * config.num_kv_heads * BLOCK_SIZE * config.head_dim * 4
    blocks = sum(-(-len(each) // BLOCK_SIZE) for each in prompts)
    with pair(tiny_model, prefill, decode) as cluster:
        workers = {worker["id"]: worker for worker in cluster.workers()}
        assert {name: worker["tensor_parallel_size"] for name, worker in workers.items()} == {"prefill-0": prefill, "decode-0": decode}
        assert len({worker["fingerprint"] for worker in workers.values()}) == 1
        for token_ids, answer in zip(prompts, answers, strict=True):
            tokens, route = complete(cluster, token_ids)
            assert "prefill=prefill-0" in route
            assert tokens == answer
        assert metric(cluster, "prefill-0", "kv_push_bytes_total") == blocks * block_bytes
        assert metric(cluster, "decode-0", "kv_push_verified_blocks_total") == blocks
        assert metric(cluster, "decode-0", "kv_push_corrupt_blocks_total") == 0
        cluster.assert_clean()
        if (prefill, decode) == (2, 1):
            a_rank_that_dies_ends_its_worker(cluster, tiny_model)
        elif (prefill, decode) == (1, 2):
            a_worker_that_dies_ends_its_ranks(cluster, tiny_model)


def a_rank_that_dies_ends_its_worker(cluster: RunningCluster, model: Path) -> None:
    """Under traffic: what was under way is answered all the same, what comes while no prefill worker is there fails cleanly; the worker
    comes back, and is asked again."""
    before, log = cluster.children()["prefill-0"], cluster.logs / "prefill-0.log"
    answers: dict[int, list[int]] = {}
    statuses: list[int] = []
    stop = threading.Event()

    def send(first: int) -> None:
        for number in itertools.count(first, 3):
            if stop.is_set():
                return
            try:
                answers[number] = complete(cluster, prompt(1000 + number, 600))[0]
            except httpx.HTTPStatusError as error:
                statuses.append(error.response.status_code)
                time.sleep(0.1)

    lanes = [threading.Thread(target=send, args=(first,)) for first in range(3)]
    for lane in lanes:
        lane.start()
    until(lambda: len(answers) >= 3)
    ranks_of(cluster, "prefill-0")[0].kill()
    psutil.wait_procs([before], timeout=10)
    stop.set()
    for lane in lanes:
        lane.join(60)
    assert not before.is_running()
    assert re.search("rank 1 has died|rank 0 has failed in a step that other ranks are in", log.read_text())  # whichever is seen first
    assert set(statuses) <= {503}
    numbers = sorted(answers)
    assert [answers[number] for number in numbers] == expected(model, [prompt(1000 + number, 600) for number in numbers])
    cluster.wait_ready()
    cluster.assert_clean(10)
    routes = (complete(cluster, prompt(2000 + i, 300), 1)[1] for i in range(100) if not time.sleep(0.1))
    assert any("prefill=prefill-0" in route for route in routes), "it is asked no more"


def a_worker_that_dies_ends_its_ranks(cluster: RunningCluster, model: Path) -> None:
    """A stopped rank too. What nobody can answer fails cleanly, and the next one is answered."""
    (rank,) = ranks_of(cluster, "decode-0")
    rank.suspend()
    failures: list[httpx.HTTPStatusError] = []

    def fail() -> None:
        try:
            complete(cluster, prompt(1, 200))
        except httpx.HTTPStatusError as error:
            failures.append(error)

    waiting = threading.Thread(target=fail)
    waiting.start()  # a step that the stopped rank never joins
    until(lambda: any(each["running"] + each["waiting"] for each in cluster.workers() if each["id"] == "decode-0"))
    cluster.signal("decode-0", signal.SIGKILL)
    _, alive = psutil.wait_procs([rank], timeout=5)
    assert not alive
    waiting.join(60)
    assert all(error.response.status_code == 503 for error in failures)
    cluster.wait_ready()
    assert complete(cluster, prompt(1, 200))[0] == expected(model, [prompt(1, 200)])[0]


def test_what_was_evicted_comes_back_to_every_rank(tiny_model: Path) -> None:
    """The device holds the last five prompts, host memory the last eight, the pool all."""
    settings = ["engine.num_blocks=66", "engine.num_threads=1", "host.bytes=900KiB", "pool.verify=true"]
    options = [part for setting in settings for part in ("--set", f"unified.{setting}")]
    prompts = [prompt(i, 200) for i in range(10)]
    answers = expected(tiny_model, prompts)
    with running_cluster(
        model=tiny_model, prefill=0, decode=0, unified=1, kvstore=1, options=["--tensor-parallel-size", "2", *options]
    ) as cluster:
        deadline = time.monotonic() + 20
        while not all(loaded(cluster, tier) for tier in ("host", "pool")):
            assert time.monotonic() < deadline, "nothing was loaded"
            for number in (*range(10), *reversed(range(10))):
                assert complete(cluster, prompts[number])[0] == answers[number]
        assert metric(cluster, "unified-0", "kv_pool_corrupt_blocks_total") == 0
        cluster.assert_clean()


def test_a_degree_that_cannot_be_is_refused(tiny_model: Path) -> None:
    settings = [f"model={tiny_model}", "role=unified", "engine.tensor_parallel_size=3", "engine.device=cpu"]
    ran = subprocess.run([sys.executable, "-m", "services.decode", *settings], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "tensor_parallel_size=3 does not divide the model's 4 attention heads" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_checkpoint_that_ranks_cannot_read_ends_them_all(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    settings = [f"model={folder}", "role=unified", "engine.tensor_parallel_size=2", "engine.device=cpu"]
    with subprocess.Popen([sys.executable, "-m", "services.decode", *settings], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()  # until the last of them has ended
    assert process.returncode == 2
    assert "download it again" in said
    assert "Traceback" not in said
