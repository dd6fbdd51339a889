"""Is each router's index what the workers hold? Two routers, four workers with small caches, one prefill and one decode worker behind
relays that lose updates and cut streams (tests/relay.py); in each round prompts that evict each other, and a fault: a worker or a router is
killed, or stopped for shorter or longer than a lease. When the round's prompts have ended, every router's sets of blocks are compared with
the workers' own, which come from snapshots of their streams: of what is on the device, in host memory and in files.

    python -m tests.faults.churn --minutes 5 [--seed 0]
"""

import argparse
import asyncio
import collections
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx

from baton.cluster.machine import free_port
from baton.rpc import convert
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.types import BlocksStored
from tests.cluster import RunningCluster, running_cluster
from tests.faults.traffic import Prompt, stream
from tests.relay import Relay, relay

LEASE_S = 3.0
CONCURRENCY = 6
RELAYED = ("prefill-1", "decode-1")
SPOILED = 0.1  # share of the updates that pass a relay
HEALED_S = 10.0  # after the last prompt
FAULTS = ("kill worker", "kill router", "stop worker", "kill worker", "stop router", "kill both routers")
SETTINGS = (
    f"all.cluster.lease_s={LEASE_S:g}", "prefill.engine.num_blocks=150", "decode.engine.num_blocks=200", "router.max_migrations=10",
    "prefill.host.bytes=12MiB", "decode.host.bytes=12MiB", "prefill-0.files.bytes=16MiB", "decode-1.files.bytes=16MiB",
)  # fmt: skip
Blocks = dict[str, set[str]]  # block hashes, in hex, by tier


@dataclass
class Report:
    rounds: int = 0
    finished: int = 0
    failed: int = 0  # where a router was killed under them
    compared: collections.Counter[str] = field(default_factory=collections.Counter)  # blocks, by tier
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0  # until all was the same, in seconds
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    spoiled: collections.Counter[str] = field(default_factory=collections.Counter)
    relayed: collections.Counter[str] = field(default_factory=collections.Counter)  # gaps, mismatches, snapshots seen by routers
    direct: collections.Counter[str] = field(default_factory=collections.Counter)  # of workers without a relay

    def __str__(self) -> str:
        def told(counts: collections.Counter[str]) -> str:
            return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))

        rows = [
            f"{self.rounds} rounds, {self.finished} prompts ended, {self.failed} with a router that was killed; blocks compared: "
            f"{told(self.compared)}, {len(self.wrong)} wrong; the same {self.slowest:.1f} s after the last prompt at the latest",
            f"faults: {told(self.faults)}; updates with blocks that were spoiled: {told(self.spoiled)}",
            f"seen of the workers behind a relay: {told(self.relayed)}; of the others: {told(self.direct)}",
        ]
        return "\n".join([*rows, *self.wrong[:20]])


async def own_blocks(address: str) -> Blocks:
    """What a worker says that it holds."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = worker_pb2_grpc.WorkerStub(channel)
        call = stub.WatchState(worker_pb2.WatchStateRequest())
        async with asyncio.timeout(LEASE_S):
            snapshot = convert.state_from_proto(await call.read())
        call.cancel()
    assert snapshot.snapshot
    held: Blocks = {str(digest.tier): set() for digest in snapshot.digests}
    for event in snapshot.events:
        assert isinstance(event, BlocksStored)
        held[str(event.tier)].update(key.hex() for key in event.block_hashes)
    for digest in snapshot.digests:
        assert len(held[str(digest.tier)]) == digest.num_blocks
    return held


class Churn:
    def __init__(self, cluster: RunningCluster, relays: Sequence[Relay], report: Report, seed: int) -> None:
        self._cluster, self._relays, self._report, self._rng = cluster, relays, report, random.Random(seed)
        self._number = 0
        self._counted: dict[tuple[str, str, str], collections.Counter[str]] = {}

    async def round(self, fault: str, seconds: float) -> None:
        began = time.monotonic()
        for each in self._relays:
            each.share = SPOILED
        async with httpx.AsyncClient(timeout=httpx.Timeout(60), limits=httpx.Limits(max_connections=None)) as client:
            clients = [asyncio.create_task(self._client(client, began + seconds)) for _ in range(CONCURRENCY)]
            await asyncio.sleep(seconds * self._rng.uniform(0.2, 0.6))
            await self._break(fault)
            await asyncio.gather(*clients)
        for each in self._relays:
            each.share = 0.0
            self._report.spoiled.update(each.spoiled)
            each.spoiled.clear()
        await asyncio.to_thread(self._cluster.wait_ready)
        await self._compare()
        self._report.rounds += 1

    async def _client(self, client: httpx.AsyncClient, until: float) -> None:
        rng = self._rng
        while time.monotonic() < until:
            self._number += 1
            prompt = Prompt(tuple(rng.randrange(4, 2000) for _ in range(rng.randrange(20, 900))), rng.randrange(1, 24), 0.0, 0)
            outcome = await stream(client, prompt, url=self._cluster.urls[self._number % len(self._cluster.urls)])
            self._report.finished += outcome.error is None
            self._report.failed += outcome.error is not None
            if outcome.error is not None:
                await asyncio.sleep(0.2)

    async def _break(self, fault: str) -> None:
        rng, children = self._rng, self._cluster.children()
        what, _, who = fault.partition(" ")
        names = sorted(name for name in children if name.startswith("router" if "router" in who else ("prefill", "decode")))
        victims = [children[name] for name in (names if who == "both routers" else [rng.choice(names)])]
        self._report.faults[fault] += 1
        for victim in victims:
            victim.send_signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        if what == "stop":
            await asyncio.sleep(rng.choice((0.5, LEASE_S + 1)))
            for victim in victims:
                victim.send_signal(signal.SIGCONT)

    async def _compare(self) -> None:
        began, report = time.monotonic(), self._report
        async with httpx.AsyncClient(timeout=10) as client:
            while wrong := await self._differences(client):
                if time.monotonic() > began + HEALED_S:
                    report.wrong += wrong
                    return
                await asyncio.sleep(0.05)
        report.slowest = max(report.slowest, time.monotonic() - began)

    async def _differences(self, client: httpx.AsyncClient) -> list[str]:
        found, compared = list[str](), collections.Counter[str]()
        for worker in self._cluster.workers():
            own = await own_blocks(worker["address"].replace("127.0.0.2", "127.0.0.1"))
            compared.update({tier: len(blocks) for tier, blocks in own.items()})
            for url in self._cluster.urls:
                answer = await client.get(f"{url}/debug/index/{worker['id']}")
                if answer.status_code == 404:  # it was started again, and is nobody's member for a moment
                    found.append(f"{time.strftime('%X')} {url} does not know {worker['id']}")
                    continue
                known = answer.json()
                self._count(url, worker["id"], known)
                for tier, blocks in own.items():
                    more, less = set(known["block_hashes"][tier]) - blocks, blocks - set(known["block_hashes"][tier])
                    if more or less:
                        text = f"{worker['id']}, {tier}: {url} knows {len(more)} that it has not, and not {len(less)} that it has"
                        found.append(f"{time.strftime('%X')} {text}")
        if not found:
            self._report.compared.update(compared)
        return found

    def _count(self, url: str, worker: str, known: dict[str, Any]) -> None:
        """A router that was started again, and a worker, are counted from zero."""
        now = collections.Counter({name: known[name] for name in ("snapshots", "gaps", "mismatches")})
        before = self._counted.get((url, worker, known["instance"]), collections.Counter())
        (self._report.relayed if worker in RELAYED else self._report.direct).update(now - before)
        self._counted[url, worker, known["instance"]] = now


@asynccontextmanager
async def relays(seed: int) -> AsyncIterator[tuple[list[Relay], list[str]]]:
    """And the settings of the workers behind them, which say that they listen at another of this machine's addresses."""
    async with AsyncExitStack() as stack:
        made, settings = list[Relay](), list[str]()
        for name in RELAYED:
            port = free_port()
            made.append(await stack.enter_async_context(relay(f"127.0.0.1:{port}", address=f"127.0.0.2:{port}", seed=seed + port)))
            settings += [f"{name}.server.advertise=127.0.0.2", f"{name}.server.grpc_port={port}", f"{name}.push.host=127.0.0.1"]
        yield made, settings


async def churn(model: Path, *, seconds: float, seed: int, round_s: float = 4.0) -> Report:
    report = Report()
    async with relays(seed) as (between, settings), AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-churn-"))
        settings += [f"{name}.files.path={folder}/{name}" for name in ("prefill-0", "decode-1")]
        options = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        manager = running_cluster(model=model, prefill=2, decode=2, routers=2, kvstore=0, options=options)
        cluster = await asyncio.to_thread(manager.__enter__)
        stack.push_async_exit(lambda *error: asyncio.to_thread(manager.__exit__, *error))
        churning, until, number = Churn(cluster, between, report, seed), time.monotonic() + seconds, 0
        while time.monotonic() < until:
            await churning.round(FAULTS[number % len(FAULTS)], round_s)
            number += 1
        print(report, flush=True)
        await asyncio.to_thread(cluster.assert_clean, 3 * LEASE_S)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[2] / "examples" / "demo-model")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = asyncio.run(churn(given.model, seconds=60 * given.minutes, seed=given.seed))
    raise SystemExit(bool(report.wrong or report.direct["gaps"] or report.direct["mismatches"]))


if __name__ == "__main__":
    main()
