"""The router's live view of the workers, over real gRPC: who is usable when names, addresses and leases come and go."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from baton.cluster.membership import InMemoryMembership
from baton.rpc.channel import Channels
from baton.types import Member, Role
from services.router.workers import Workers
from tests.workers import BLOCK_SIZE, LEASE_S, call, prompt, worker


def member(name: str, address: str, pid: int = 1) -> Member:
    return Member(id=name, role=Role.UNIFIED, address=address, pid=pid, fingerprint="f", block_size=BLOCK_SIZE)


@asynccontextmanager
async def view(hub: dict[str, Member]) -> AsyncIterator[Workers]:
    channels, membership = Channels(LEASE_S), InMemoryMembership(hub)
    workers = Workers(membership, channels, lease_s=LEASE_S)
    workers.start()
    try:
        yield workers
    finally:
        await workers.close()
        await channels.close()


def usable(workers: Workers) -> list[str]:
    return sorted(each.member.id for each in workers.all() if each.usable)


async def until(condition: Callable[[], bool], within_s: float = 3 * LEASE_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_successor_at_the_same_address_outlives_its_predecessors_lease() -> None:
    """A worker without a fixed id, started again at a fixed port: for a while both names are members."""
    hub: dict[str, Member] = {}
    async with view(hub) as workers, worker(Role.UNIFIED, {}, name="old") as old:
        hub["old"] = member("old", old.address, pid=1)
        await until(lambda: usable(workers) == ["old"])
        await old.server.stop(0)
        async with worker(Role.UNIFIED, {}, name="new", port=int(old.address.rpartition(":")[2])) as new:
            hub["new"] = member("new", new.address, pid=2)
            await until(lambda: usable(workers) == ["new"])
            del hub["old"]
            await until(lambda: list(workers._workers) == ["new"])
            watched = workers._workers["new"]
            seen = watched.load
            stream = call(new, prompt(200, max_tokens=1))  # changes its load
            await until(lambda: watched.load != seen)
            stream.cancel()


async def test_what_was_routed_is_counted_once() -> None:
    """By the router until the worker's own load has it, also where a step is long."""
    async with worker(Role.UNIFIED, {}) as w:
        hub = {"w": member("w", w.address)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            w.runner.step_s = 2 * LEASE_S
            stream = call(w, prompt(8, max_tokens=2))
            while not w.runner.num_steps:
                await asyncio.sleep(0.01)
            await asyncio.sleep(LEASE_S / 2)
            late = prompt(80, name="late", max_tokens=1)
            watched = workers._workers["w"]
            workers.routed("w", "late", 80, 80 * 80 // 2)
            workers.routed("w", "never comes", 7, 24)
            second = call(w, late)
            await until(lambda: "late" not in watched.routed)  # in a report of the first step's end
            assert list(watched.routed) == ["never comes"]
            assert watched.load.num_waiting_tokens >= 80
            assert watched.load.num_waiting_pairs >= 80 * 80 // 2
            assert usable(workers) == ["w"]
            workers.unrouted("w", "never comes")
            [seen] = workers.view(lambda size: [])
            assert (seen.num_requests, seen.pending_tokens) == (2, watched.load.num_waiting_tokens)
            stream.cancel()
            second.cancel()


async def test_who_restarts_under_its_name_is_usable_again() -> None:
    async with worker(Role.UNIFIED, {}) as first, worker(Role.UNIFIED, {}) as second:
        hub = {"w": member("w", first.address, pid=1)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            hub["w"] = member("w", second.address, pid=2)
            await until(lambda: usable(workers) == ["w"] and workers.member("w").address == second.address)


async def test_a_lease_that_runs_out_under_a_healthy_worker_ends_no_request() -> None:
    async with worker(Role.UNIFIED, {}) as w:
        hub = {"w": member("w", w.address)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            stream = call(w, prompt(8, max_tokens=50))
            channel = workers._channels.get(w.address)
            gone = hub.pop("w")
            await until(lambda: usable(workers) == [])
            assert workers._channels.get(w.address) is channel
            hub["w"] = gone
            await until(lambda: usable(workers) == ["w"])
            stream.cancel()


async def test_a_member_that_is_gone_is_let_go_of_when_it_stops_to_answer() -> None:
    async with worker(Role.UNIFIED, {}) as w:
        hub = {"w": member("w", w.address)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            hub.clear()
            await until(lambda: usable(workers) == [])
            await w.server.stop(0)
            await until(lambda: not workers._workers and not workers._channels._channels)
