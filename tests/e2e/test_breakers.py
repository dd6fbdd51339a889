"""Workers that are there and fail all the same, over real gRPC: they are left alone for a while, and come back by themselves."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.cluster.membership import InMemoryMembership
from baton.errors import InternalError, Overloaded
from baton.rpc.channel import Channels
from baton.types import Member, Role
from services.router.dispatch import Dispatcher, Route
from services.router.policy import Policy, least_load
from services.router.workers import Workers
from tests.properties.toy import reference
from tests.unit.clock import Clock
from tests.workers import BLOCK_SIZE, PATIENT_S, Worker, prompt, until, worker


@asynccontextmanager
async def dispatcher(
    *members: tuple[str, Role, Worker], policy: Policy = least_load, max_migrations: int = 3, **options: Any
) -> AsyncIterator[Dispatcher]:
    """`options`: further ones of the Dispatcher."""
    hub = {
        name: Member(id=name, role=role, address=w.address, pid=1, fingerprint=w.fingerprint, block_size=BLOCK_SIZE)
        for name, role, w in members
    }
    channels = Channels(PATIENT_S)
    workers = Workers(InMemoryMembership(hub), channels, lease_s=PATIENT_S)
    workers.start()
    try:
        await until(lambda: sum(each.usable for each in workers.all()) == len(hub))
        yield Dispatcher(workers, channels, "least_load", policy, lease_s=PATIENT_S, max_migrations=max_migrations, **options)
    finally:
        await workers.close()
        await channels.close()


def set_by_hand(made: Dispatcher) -> Clock:
    """The clock of its breakers, from now on: whoever is left alone, is so until it is moved."""
    made.placer.breakers._clock = clock = Clock()
    return clock


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the device is on fire")


def full(*_: Any, **__: Any) -> Any:
    raise Overloaded("nothing fits in here")


async def ask(made: Dispatcher, name: str) -> Route:
    """Its route; the tokens are those of a healthy cluster."""
    route, request = made.route(), dataclasses.replace(prompt(60, name=name), salt=name)  # nothing of it is cached
    tokens = [token.token_id async for output in made.generate(request, route) for token in output.tokens]
    assert tokens == reference(request)
    return route


async def test_a_worker_that_fails_all_its_requests_is_left_alone_until_one_goes_well() -> None:
    async with (
        worker(Role.UNIFIED, {}, name="a") as a,
        worker(Role.UNIFIED, {}, name="b") as b,
        dispatcher(("a", Role.UNIFIED, a), ("b", Role.UNIFIED, b)) as made,
    ):
        clock = set_by_hand(made)
        submit, a.intake.submit = a.intake.submit, broken  # type: ignore[method-assign]
        for i in range(3):
            with pytest.raises(InternalError, match="on fire"):
                await ask(made, f"bad-{i}")  # of equals, the first
        assert made.placer.breakers.open() == ["a"]
        assert (await ask(made, "elsewhere")).decode == "b"
        clock.now += 1
        assert made.placer.breakers.open() == []  # one may try, and fails
        with pytest.raises(InternalError):
            await ask(made, "probe")
        assert (await ask(made, "elsewhere again")).decode == "b"
        a.intake.submit = submit  # type: ignore[method-assign]
        clock.now += 2
        assert (await ask(made, "well")).decode == "a"
        assert made.placer.breakers.open() == []


async def test_where_all_are_broken_anybody_is_asked() -> None:
    async with worker(Role.UNIFIED, {}, name="a") as a, dispatcher(("a", Role.UNIFIED, a)) as made:
        set_by_hand(made)
        submit, a.intake.submit = a.intake.submit, broken  # type: ignore[method-assign]
        for i in range(3):
            with pytest.raises(InternalError):
                await ask(made, f"bad-{i}")
        a.intake.submit = submit  # type: ignore[method-assign]
        assert made.placer.breakers.open() == ["a"]
        assert (await ask(made, "well")).decode == "a"
        assert made.placer.breakers.open() == []


async def test_a_prefill_worker_that_fails_is_not_asked_for_each_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        worker(Role.PREFILL, {}, name="p") as p,
        worker(Role.DECODE, {}, name="d", lease_s=PATIENT_S) as d,
        dispatcher(("p", Role.PREFILL, p), ("d", Role.DECODE, d)) as made,
    ):
        clock = set_by_hand(made)
        submit, p.intake.submit = p.intake.submit, broken  # type: ignore[method-assign]
        for i in range(3):
            route = await ask(made, f"bad-{i}")
            assert "no prefill worker managed it" in route.reason
        told = [record.__dict__["request_id"] for record in caplog.records if "prefill of" in record.getMessage()]
        assert told == ["bad-0", "bad-1", "bad-2"], "a log in JSON can be asked for one request"
        assert made.placer.breakers.open() == ["p"]
        assert "degraded" in (await ask(made, "here")).reason
        assert "p: left alone" in made.placer.degraded()
        p.intake.submit = submit  # type: ignore[method-assign]
        clock.now += 1
        assert (await ask(made, "well")).prefill == "p"
        assert made.placer.breakers.open() == []


async def test_a_prompt_that_needs_no_prefill_worker_leaves_the_try_to_the_next() -> None:
    async with (
        worker(Role.PREFILL, {}, name="p") as p,
        worker(Role.DECODE, {}, name="d") as d,
        dispatcher(("p", Role.PREFILL, p), ("d", Role.DECODE, d)) as made,
    ):
        submit, p.intake.submit = p.intake.submit, broken  # type: ignore[method-assign]
        for i in range(3):
            await ask(made, f"bad-{i}")
        p.intake.submit = submit  # type: ignore[method-assign]
        await until(lambda: not made.placer.breakers.open())
        made.placer.breakers._try_s = 600.0  # nobody but the one that tries gives it back
        cached = dataclasses.replace(prompt(60, name="cached"), salt="bad-0")
        route = made.route()
        async for output in made.generate(cached, route):
            if output.tokens:
                assert made.placer.breakers.open() == [], "d has the prompt, and has said so"
        assert (route.decode, route.prefill) == ("d", "")
        assert "degraded" not in route.reason
        assert (await ask(made, "well")).prefill == "p"
        assert made.placer.breakers._breakers == {}


async def test_a_full_worker_is_tried_again_by_the_next() -> None:
    async with (
        worker(Role.UNIFIED, {}, name="a") as a,
        worker(Role.UNIFIED, {}, name="b") as b,
        dispatcher(("a", Role.UNIFIED, a), ("b", Role.UNIFIED, b)) as made,
    ):
        submit, a.intake.submit = a.intake.submit, broken  # type: ignore[method-assign]
        for i in range(3):
            with pytest.raises(InternalError):
                await ask(made, f"bad-{i}")
        await until(lambda: not made.placer.breakers.open())
        made.placer.breakers._try_s = 600.0
        a.intake.submit = full  # type: ignore[method-assign]
        assert (await ask(made, "full")).decode == "b"
        a.intake.submit = submit  # type: ignore[method-assign]
        assert made.placer.breakers.open() == []
        assert (await ask(made, "well")).decode == "a"
        assert made.placer.breakers._breakers == {}
