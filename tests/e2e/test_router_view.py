"""The router's live view of the workers, over real gRPC: who is usable when names, addresses and leases come and go."""

import asyncio
import dataclasses
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.cluster.membership import InMemoryMembership
from baton.rpc.channel import Channels
from baton.types import Member, Role
from services.router.workers import HashesBySize, Workers
from tests.relay import FAULTS, relay
from tests.workers import BLOCK_SIZE, NUM_BLOCKS, PATIENT_S, Worker, call, drained, prompt, standing, until, worker


def member(name: str, address: str, pid: int = 1) -> Member:
    return Member(id=name, role=Role.UNIFIED, address=address, pid=pid, fingerprint="f", block_size=BLOCK_SIZE)


@asynccontextmanager
async def view(hub: dict[str, Member]) -> AsyncIterator[Workers]:
    channels, membership = Channels(PATIENT_S), InMemoryMembership(hub)
    workers = Workers(membership, channels, lease_s=PATIENT_S)
    workers.start()
    try:
        yield workers
    finally:
        await workers.close()
        await channels.close()


def usable(workers: Workers) -> list[str]:
    return sorted(each.member.id for each in workers.all() if each.usable)


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


@pytest.mark.parametrize("drains", [False, True])
async def test_who_has_said_that_it_leaves_is_no_loss(caplog: pytest.LogCaptureFixture, drains: bool) -> None:
    caplog.set_level(logging.INFO)
    async with worker(Role.UNIFIED, {}) as w, view({"w": member("w", w.address)}) as workers:
        await until(lambda: usable(workers) == ["w"])
        w.intake.draining = drains
        await until(lambda: (usable(workers) == []) is drains)
        await w.server.stop(0)
        await until(lambda: workers._workers["w"].state is None)
    [record] = [each for each in caplog.records if each.name == "services.router.workers" and each.message.startswith("w ")]
    assert (record.levelno, record.message.split(":")[0]) == ((logging.INFO, "w has drained") if drains else (logging.WARNING, "w is lost"))


async def test_what_was_routed_is_counted_once() -> None:
    """By the router until the worker's own load has it. What comes and is cancelled is told while the worker's step goes on."""
    async with worker(Role.UNIFIED, {}) as w:
        hub = {"w": member("w", w.address)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            with standing(w):
                stream = call(w, prompt(8, max_tokens=2))
                await until(lambda: w.runner.num_steps > 0)
                late = prompt(80, name="late", max_tokens=1)
                watched = workers._workers["w"]
                workers.routed("w", "late", 80, 80 * 80 // 2)
                workers.routed("w", "never comes", 7, 24)
                second = call(w, late)
                await until(lambda: "late" not in watched.routed)
                assert list(watched.routed) == ["never comes"]
                assert watched.load.num_waiting_tokens >= 80
                assert watched.load.num_waiting_pairs >= 80 * 80 // 2
                assert usable(workers) == ["w"]
                workers.unrouted("w", "never comes")
                [seen] = workers.view(HashesBySize((), ""))
                assert (seen.num_requests, seen.pending_tokens) == (2, watched.load.num_waiting_tokens)
                second.cancel()
                await until(lambda: watched.load.num_waiting_tokens < 80)
                assert w.runner.num_steps == 1
                stream.cancel()


async def test_who_restarts_under_its_name_is_usable_again() -> None:
    async with worker(Role.UNIFIED, {}) as first, worker(Role.UNIFIED, {}) as second:
        hub = {"w": member("w", first.address, pid=1)}
        async with view(hub) as workers:
            await until(lambda: usable(workers) == ["w"])
            hub["w"] = member("w", second.address, pid=2)
            await until(lambda: usable(workers) == ["w"] and workers.member("w").address == second.address)


async def test_the_record_of_a_process_is_not_used_for_its_successor() -> None:
    """Of the same name at the same address: until the membership tells of it, which has another fingerprint, say."""
    async with worker(Role.UNIFIED, {}) as w:
        hub = {"w": dataclasses.replace(member("w", w.address), instance="before")}
        async with view(hub) as workers:
            await asyncio.sleep(0.5)
            assert usable(workers) == []
            hub["w"] = member("w", w.address, pid=2)
            await until(lambda: usable(workers) == ["w"])


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


# -- which blocks the workers hold


async def churn(w: Worker, seconds: float, seed: int = 0) -> None:
    """Prompts that all differ, so that blocks are evicted all the time."""
    rng, deadline = random.Random(seed), asyncio.get_running_loop().time() + seconds
    number = 0
    while asyncio.get_running_loop().time() < deadline:
        number += 1
        length = rng.randrange(BLOCK_SIZE, 60 * BLOCK_SIZE)
        request = dataclasses.replace(prompt(length, name=f"churn-{number}", max_tokens=1), salt=str(number))
        await drained(call(w, request))


def same(workers: Workers, name: str, w: Worker) -> bool:
    return workers._fleet.index.blocks(name) == set(w.engine.scheduler.cache.pool.hashes())


@pytest.mark.parametrize("fault", FAULTS)
async def test_updates_that_are_lost_on_the_way_are_missed_and_healed(fault: str) -> None:
    async with (
        worker(Role.UNIFIED, {}) as w,
        relay(w.address) as between,
        view({"w": member("w", between.address)}) as workers,
        view({"w": member("w", w.address)}) as direct,
    ):
        await until(lambda: usable(workers) == usable(direct) == ["w"])
        between.faults, between.share = [fault], 0.3
        while not between.spoiled[fault]:
            await churn(w, 1.0, seed=1)
        between.share = 0.0
        await until(lambda: same(workers, "w", w) and same(direct, "w", w))
        assert usable(workers) == ["w"]
        assert len(w.engine.scheduler.cache.pool.hashes()) > NUM_BLOCKS // 2
        seen = workers._workers["w"]
        assert seen.snapshots > 1
        assert (seen.gaps > 0) == (fault == "gap")
        assert (seen.mismatches > 0) == (fault == "silent")
        never = direct._workers["w"]
        assert (never.snapshots, never.gaps, never.mismatches) == (1, 0, 0)


async def test_who_is_out_of_step_stays_usable() -> None:
    async with worker(Role.UNIFIED, {}) as w, relay(w.address) as between, view({"w": member("w", between.address)}) as workers:
        await until(lambda: usable(workers) == ["w"])
        between.faults, between.share = ["silent"], 1.0
        churning = asyncio.create_task(churn(w, 0.5))
        while not churning.done():
            assert usable(workers) == ["w"]
            await asyncio.sleep(0.001)
        await churning
        between.share = 0.0
        await until(lambda: workers._workers["w"].mismatches > 0)
        assert usable(workers) == ["w"]
        await until(lambda: same(workers, "w", w))


async def test_a_digest_that_no_snapshot_explains_is_told_and_lived_with() -> None:
    """A worker of a version that counts otherwise, or one with a bug, must not be asked for snapshots for ever."""
    async with worker(Role.UNIFIED, {}) as w:
        w.engine.scheduler.cache.pool.journal._xor ^= 1
        async with view({"w": member("w", w.address)}) as workers:
            await until(lambda: usable(workers) == ["w"])
            await churn(w, 0.5)
            await until(lambda: same(workers, "w", w))
            seen = workers._workers["w"]
            assert (seen.snapshots, seen.mismatches) == (1, 1)
        assert await w.engine.check_integrity() == ["the digest that the routers are told is not that of the cached blocks"]
