"""Things die under load. Every stream ends with the text that it has without the fault, nobody waits longer than a lease and a bit, and
no block stays taken. Each case prints a row: fault, streams, lost, slowest wait."""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc.aio
import httpx
import pytest

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.cluster import RunningCluster, running_cluster
from tests.faults.traffic import Outcome, Prompt, make_prompts, run_streams, stream

LEASE_S = 5.0
LIMIT_S = LEASE_S + 2.0
STREAMS = 16
pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[RunningCluster]:
    with running_cluster(model=demo_model, prefill=2, decode=2, kvstore=2, options=["--set", "all.cluster.lease_s=5"]) as running:
        yield running


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str, Sequence[Outcome]], None]:
    def show(fault: str, outcomes: Sequence[Outcome]) -> None:
        lost = sum(outcome.error is not None for outcome in outcomes)
        slowest = max(outcome.slowest for outcome in outcomes)
        with capsys.disabled():
            print(f"\n| {fault} | {len(outcomes)} streams | {lost} lost | slowest wait {slowest:.1f} s |")

    return show


def under_fault(cluster: RunningCluster, prompts: Sequence[Prompt], fault: Callable[[], None]) -> list[Outcome]:
    """Runs the prompts, and lets `fault` happen once a quarter of them have begun."""

    async def run() -> list[Outcome]:
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        streams = asyncio.create_task(run_streams(cluster.url, prompts, begun))
        await begun
        await asyncio.to_thread(fault)
        return await streams

    return asyncio.run(run())


def check(outcomes: Sequence[Outcome], expected: Sequence[Outcome]) -> None:
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    for i, (outcome, wanted) in enumerate(zip(outcomes, expected, strict=True)):
        assert outcome.token_ids == wanted.token_ids, f"stream {i} has other tokens: {outcome} instead of {wanted}"
        assert outcome.text == wanted.text, f"stream {i} has another text"
    assert max(outcome.slowest for outcome in outcomes) <= LIMIT_S


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("prefill-0", signal.SIGKILL),
        ("decode-0", signal.SIGKILL),
        ("kvstore-0", signal.SIGKILL),
        ("mooncake_master", signal.SIGKILL),
        ("kvstore-master", signal.SIGKILL),
        ("prefill-1", signal.SIGSTOP),
        ("decode-1", signal.SIGSTOP),
        ("kvstore-1", signal.SIGSTOP),
    ],
)
def test_a_process_is_killed_or_stopped(
    cluster: RunningCluster, report: Callable[[str, Sequence[Outcome]], None], name: str, number: signal.Signals
) -> None:
    cluster.wait_ready()
    prompts = make_prompts(STREAMS, seed=hash_of(name), vocab_size=2000)
    before = cluster.children()
    outcomes = under_fault(cluster, prompts, lambda: cluster.signal(name, number))
    report(f"{number.name} {name}", outcomes)
    if number is signal.SIGSTOP:
        before[name].send_signal(signal.SIGCONT)
    wait_for_process(cluster, name)
    cluster.wait_ready()
    check(outcomes, asyncio.run(run_streams(cluster.url, prompts)))
    cluster.assert_clean()


def test_etcd_is_away_for_20_seconds(cluster: RunningCluster, report: Callable[[str, Sequence[Outcome]], None]) -> None:
    cluster.wait_ready()
    first, second = make_prompts(STREAMS, seed=20, vocab_size=2000), make_prompts(STREAMS, seed=21, vocab_size=2000)
    outcomes = under_fault(cluster, first, lambda: cluster.signal("etcd", signal.SIGSTOP))
    stopped = time.monotonic()
    later = asyncio.run(run_streams(cluster.url, second))  # begun while etcd is away
    time.sleep(max(0.0, stopped + 20 - time.monotonic()))
    cluster.signal("etcd", signal.SIGCONT)
    during = asyncio.run(run_streams(cluster.url, second))  # while leases are granted anew
    report("etcd stopped for 20 s", [*outcomes, *later, *during])
    cluster.wait_ready()
    check(outcomes, asyncio.run(run_streams(cluster.url, first)))
    check(later, asyncio.run(run_streams(cluster.url, second)))
    check(during, later)
    cluster.assert_clean()


def test_100_requests_are_cancelled_at_random_moments(cluster: RunningCluster, report: Callable[[str, Sequence[Outcome]], None]) -> None:
    cluster.wait_ready()
    rng = random.Random(0)
    kept = make_prompts(STREAMS, seed=30, vocab_size=2000)
    cancelled = make_prompts(100, seed=31, vocab_size=2000, length=300)

    async def cancel_one(client: httpx.AsyncClient, prompt: Prompt) -> None:
        await asyncio.sleep(rng.random() * 3)
        task = asyncio.create_task(stream(client, prompt))
        await asyncio.sleep(rng.random())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run() -> list[Outcome]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60, limits=limits) as client:
            streams = asyncio.create_task(run_streams(cluster.url, kept))
            await asyncio.gather(*(cancel_one(client, prompt) for prompt in cancelled))
            return await streams

    outcomes = asyncio.run(run())
    report("100 requests cancelled", outcomes)
    cluster.wait_ready()
    cluster.assert_clean()
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    expected = asyncio.run(run_streams(cluster.url, kept))
    assert [outcome.token_ids for outcome in outcomes] == [outcome.token_ids for outcome in expected]


def test_a_stopped_router_holds_nothing_on_the_workers(cluster: RunningCluster) -> None:
    cluster.wait_ready()
    addresses = [worker["address"] for worker in cluster.workers()]
    prompts = [replace(prompt, max_tokens=3000) for prompt in make_prompts(4, seed=40, vocab_size=2000)]

    async def run() -> None:
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        streams = asyncio.create_task(run_streams(cluster.url, prompts, begun))
        await begun
        cluster.signal("router", signal.SIGSTOP)
        try:
            deadline = time.monotonic() + LIMIT_S
            while any(load.blocks_free < load.blocks_total for load in [await load_of(address) for address in addresses]):
                assert time.monotonic() < deadline, "workers go on for a router that is gone"
                await asyncio.sleep(0.2)
        finally:
            cluster.signal("router", signal.SIGCONT)
            streams.cancel()
            await asyncio.gather(streams, return_exceptions=True)

    asyncio.run(run())
    cluster.wait_ready()
    cluster.assert_clean()


async def load_of(address: str) -> worker_pb2.Load:
    async with grpc.aio.insecure_channel(address) as channel:
        return (await worker_pb2_grpc.WorkerStub(channel).CheckIntegrity(worker_pb2.CheckIntegrityRequest(), timeout=5)).load


def wait_for_process(cluster: RunningCluster, name: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while name not in cluster.children():
        assert time.monotonic() < deadline, f"{name} was not started again"
        time.sleep(0.1)


def hash_of(name: str) -> int:
    return sum(name.encode())
