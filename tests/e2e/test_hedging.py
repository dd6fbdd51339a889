"""A sequence whose first token is late is sent to a second worker too: over real gRPC, with workers that stand still until they are let go;
and in a real cluster, where one is stopped."""

import asyncio
import dataclasses
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.config import HedgingConfig, TracingConfig
from baton.errors import WorkerLost
from baton.tracing import make_tracer
from baton.types import GenerateRequest, Role
from services.router import console, hedging
from services.router.dispatch import Dispatcher, Route
from services.router.explain import Record, Records, explain
from services.router.policy import Facts, Placement, least_load
from services.router.view import WorkerView
from tests.cluster import running_cluster
from tests.e2e.test_breakers import broken, dispatcher, set_by_hand
from tests.faults.traffic import Outcome, make_prompts, run_streams
from tests.otlp import collector
from tests.properties.toy import reference
from tests.workers import PATIENT_S, Worker, prompt, standing, until, worker

SOON = HedgingConfig(after=3, at_least_s=0.05)


@dataclasses.dataclass
class Fleet:
    made: Dispatcher
    workers: Sequence[Worker]
    results: list[str]  # of hedges
    firsts: list[tuple[float | None, float]]  # times to the first token, predicted and actual

    async def assert_clean(self) -> None:
        """Nothing is left of any request, here or there, and the router knows it: who is idle is told by the next one's placement."""
        await asyncio.gather(*(each.is_idle() for each in self.workers))
        await until(lambda: not any(each.routed for each in self.made.workers.all()))
        await until(lambda: not any(each.load.num_running + each.load.num_waiting for each in self.made.workers.all() if each.usable))
        await until(lambda: not self.made._attempts._sessions._sessions)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("first-")]


@asynccontextmanager
async def fleet(*roles: tuple[str, Role], others: str = "", **options: Any) -> AsyncIterator[Fleet]:
    """Of workers by name; of equals, the first name is chosen. `others`: those that have another version of the model."""
    async with AsyncExitStack() as stack:
        prints = {name: "g" if name in others else "f" for name, _ in roles}
        served = [worker(role, {}, name=name, fingerprint=prints[name], lease_s=PATIENT_S) for name, role in roles]
        workers = [await stack.enter_async_context(each) for each in served]
        results, firsts = list[str](), list[tuple[float | None, float]]()
        members = [(name, role, each) for (name, role), each in zip(roles, workers, strict=True)]
        options = {"hedging": SOON, "on_hedge": results.append, "on_first_token": lambda *told: firsts.append(told[:2]), **options}
        made = await stack.enter_async_context(dispatcher(*members, **options))
        yield Fleet(made, workers, results, firsts)


def pair(**options: Any) -> Any:
    return fleet(("a", Role.UNIFIED), ("b", Role.UNIFIED), **options)


def asked(made: Dispatcher, request: GenerateRequest) -> tuple[Route, "asyncio.Task[list[int]]"]:
    """Under way: its route with its decisions, and its tokens."""
    route = made.route()
    route.on_decision = route.decisions.append

    async def run() -> list[int]:
        return [token.token_id async for output in made.generate(request, route) for token in output.tokens]

    return route, asyncio.create_task(run())


async def test_whoever_is_asked_second_goes_on_where_the_first_is_silent() -> None:
    request = prompt(60)
    async with pair() as it:
        a = it.workers[0]
        with standing(a) as let_go:
            route, tokens = asked(it.made, request)
            assert await tokens == reference(request)
            assert (route.decode, route.hedged, route.moves) == ("b", "won", [])
            assert route.reason.startswith("hedge, no token from a after 0.05 s; least load")
            assert "decode=b; prefill=local; cached=0/60; hedged=won;" in str(route)
            assert [decision.placement.decode for decision in route.decisions] == ["a", "b"]
            lost, won = (decision.ttft_s for decision in route.decisions)
            assert lost is None
            assert it.firsts == [(None, won)]  # from when the hedge was sent
            await until(lambda: not a.intake._inside)  # cancelled there before it has done anything
            let_go(a)
        assert it.results == ["won"]
        await it.assert_clean()


async def test_the_first_goes_on_where_it_answers_first_after_all() -> None:
    request = prompt(60)
    async with pair() as it:
        a, b = it.workers
        with standing(a, b) as let_go:
            route, tokens = asked(it.made, request)
            await until(lambda: bool(b.intake._inside))
            let_go(a)
            assert await tokens == reference(request)
            await until(lambda: not b.intake._inside)
            assert (route.decode, route.hedged, it.results) == ("a", "lost", ["lost"])
            assert route.reason.startswith("least load")
            assert len(it.firsts) == 1
            shown = console._route("r", Record([route]))
            assert (shown["decode"], shown["hedged"], shown["ttft_s"]) == ("a", "lost", route.decisions[0].ttft_s)
        await it.assert_clean()


async def test_what_is_late_is_told_by_the_prediction() -> None:
    def foreseen(facts: Facts, view: Sequence[WorkerView]) -> Placement:
        return dataclasses.replace(least_load(facts, view), ttft_s=0.1)

    async with pair(policy=foreseen) as it:
        with standing(it.workers[0]):
            route, tokens = asked(it.made, prompt(60))
            await tokens
        assert "no token from a after 0.30 s" in route.reason
        assert it.firsts[0][0] == route.predicted_s == 0.1
        await it.assert_clean()


async def test_a_slow_fleet_is_not_asked_for_everything_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedging, "BURST", 1.0)
    async with pair(hedging=HedgingConfig(after=3, at_least_s=0.05, share=0.5)) as it:
        a, b = it.workers
        for number, hedged in enumerate(["lost", "", "lost"]):  # every other one
            request = dataclasses.replace(prompt(60, name=str(number)), salt=str(number))
            with standing(a, b) as let_go:
                route, tokens = asked(it.made, request)
                await until(lambda: bool(a.intake._inside))
                if hedged:
                    await until(lambda: bool(b.intake._inside))
                else:
                    await asyncio.sleep(0.2)
                    assert not b.intake._inside
                let_go(a)
                assert await tokens == reference(request)
            assert (route.decode, route.hedged) == ("a", hedged)
            await it.assert_clean()


async def test_nobody_is_asked_where_nobody_else_is_there_or_well() -> None:
    async with fleet(("a", Role.UNIFIED)) as it:
        with standing(it.workers[0]) as let_go:
            route, tokens = asked(it.made, prompt(60))
            await asyncio.sleep(0.2)
            let_go(it.workers[0])
            assert await tokens == reference(prompt(60))
        assert (route.hedged, it.results) == ("", [])
    async with pair() as it:
        a = it.workers[0]
        set_by_hand(it.made)
        instance = it.made.workers.member("b").instance
        while "b" not in it.made.placer.breakers.open():
            it.made.placer.breakers.failed("b", instance)
        with standing(a) as let_go:
            route, tokens = asked(it.made, prompt(60))
            await asyncio.sleep(0.2)
            let_go(a)
            assert await tokens == reference(prompt(60))
        assert (route.hedged, it.results) == ("", [])
        await it.assert_clean()


async def test_another_version_of_the_model_is_no_second_worker() -> None:
    for names, decode in (("abc", "c"), ("ab", "a")):
        async with fleet(*((name, Role.UNIFIED) for name in names), others="b") as it:
            a, b, *_ = it.workers
            with standing(a) as let_go:
                route, tokens = asked(it.made, prompt(60))
                if decode == "a":
                    await asyncio.sleep(0.2)
                    let_go(a)
                assert await tokens == reference(prompt(60))
            assert (route.decode, b.runner.num_steps) == (decode, 0)
            assert it.results == (["won"] if decode == "c" else [])
            await it.assert_clean()


async def test_one_that_fails_leaves_it_to_the_other(caplog: pytest.LogCaptureFixture) -> None:
    request = prompt(60)
    async with pair() as it:
        a, b = it.workers
        with standing(a, b) as let_go:
            route, tokens = asked(it.made, request)
            await until(lambda: bool(b.intake._inside))
            await a.server.stop(0)
            let_go(b)
            assert await tokens == reference(request)
        assert (route.decode, route.hedged, route.moves, it.results) == ("b", "won", [], ["won"])
        assert "r was sent to two workers, of which a failed" in caplog.text
        await it.assert_clean()
    async with pair() as it:
        a, b = it.workers
        b.intake.submit = broken  # type: ignore[method-assign]
        with standing(a) as let_go:
            route, tokens = asked(it.made, request)
            await until(lambda: "of which b failed" in caplog.text)
            let_go(a)
            assert await tokens == reference(request)
        assert (route.decode, route.hedged, it.results) == ("a", "lost", ["failed"])
        assert [breaker.failures for breaker in it.made.placer.breakers._breakers.values()] == [1]
        await it.assert_clean()


async def test_where_both_fail_it_is_as_with_the_first_alone(caplog: pytest.LogCaptureFixture) -> None:
    request = prompt(60)

    async def both_fail(it: Fleet) -> tuple[Route, "asyncio.Task[list[int]]"]:
        a, b = it.workers[:2]
        b.intake.submit = broken  # type: ignore[method-assign]
        caplog.clear()
        with standing(a):
            route, tokens = asked(it.made, request)
            await until(lambda: "of which b failed" in caplog.text)
            await a.server.stop(0)
        return route, tokens

    async with pair(max_migrations=0) as it:
        route, tokens = await both_fail(it)
        with pytest.raises(WorkerLost):
            await tokens
        assert (route.decode, it.results) == ("a", ["failed"])
        await it.assert_clean()
    moved = list[None]()
    async with fleet(*((name, Role.UNIFIED) for name in "abc"), on_migration=lambda: moved.append(None)) as it:
        set_by_hand(it.made)
        for _ in range(2):  # and b's third opens its breaker
            it.made.placer.breakers.failed("b", it.made.workers.member("b").instance)
        route, tokens = await both_fail(it)
        assert await tokens == reference(request)
        assert (route.decode, len(route.moves), len(moved), it.results) == ("c", 1, 1, ["failed"])
        await it.assert_clean()


async def test_a_client_that_leaves_takes_both_away() -> None:
    async with pair() as it:
        a, b = it.workers
        with standing(a, b):
            _, tokens = asked(it.made, prompt(60))
            await until(lambda: bool(a.intake._inside and b.intake._inside))
            tokens.cancel()
            await asyncio.gather(tokens, return_exceptions=True)
            assert not any(each.routed for each in it.made.workers.all())
            await until(lambda: not (a.intake._inside or b.intake._inside))
        assert it.results == ["lost"]
        await it.assert_clean()


async def test_off_it_never_happens() -> None:
    async with pair(hedging=HedgingConfig()) as it:
        a, b = it.workers
        with standing(a) as let_go:
            route, tokens = asked(it.made, prompt(60))
            await until(lambda: bool(a.intake._inside))
            await asyncio.sleep(0.2)
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("first-")]
            let_go(a)
            assert await tokens == reference(prompt(60))
        assert (route.hedged, b.runner.num_steps, it.results) == ("", 0, [])


@pytest.mark.parametrize(("prefills", "other"), [("pq", "q"), ("p", "p")])
async def test_it_goes_to_another_prefill_worker_too_where_there_is_one(prefills: str, other: str) -> None:
    roles = [*((name, Role.PREFILL) for name in prefills), ("d", Role.DECODE), ("e", Role.DECODE)]
    async with fleet(*roles) as it:
        with standing(it.workers[0]) as let_go:  # p
            route, tokens = asked(it.made, prompt(60))
            await until(lambda: len(route.decisions) == 2)
            if other == "p":
                let_go(it.workers[0])
            assert await tokens == reference(prompt(60))
        first, second = (decision.placement for decision in route.decisions)
        assert (first.decode, first.prefills[0]) == ("d", "p")
        assert (second.decode, second.prefills) == ("e", (other,))
        assert (route.decode, route.prefill) == (first.decode if route.hedged == "lost" else "e", other)
        assert other == "p" or route.hedged == "won"
        await it.assert_clean()


async def test_both_are_explained_and_have_a_span() -> None:
    with collector() as spans:
        tracer = make_tracer(TracingConfig(endpoint=spans.url, interval_s=0.1), "router", "router-0")
        async with pair() as it:
            records = Records(4)
            route, record = it.made.route(), records.start("r", "")
            route.span = tracer.start("request", "server", "")
            records.add(record, route)
            with standing(it.workers[0]):
                assert [output async for output in it.made.generate(prompt(60), route)]
            route.span.end()
            page = explain(record, least_load)["sequences"][0]
        await asyncio.to_thread(tracer.close)
        told = {span.name: span for span in spans.wait(3)}
    assert (page["decode"], page["hedged"]) == ("b", "won")
    assert [each["chosen"]["decode"] for each in page["decisions"]] == ["a", "b"]
    assert [each["ttft_s"]["actual"] is None for each in page["decisions"]] == [True, False]
    assert {"generate a", "generate b"} <= told.keys()


@pytest.mark.alone
@pytest.mark.timeout(240)
def test_a_stopped_worker_is_not_waited_for(demo_model: Path) -> None:
    lease_s = 20.0
    options = [f"all.cluster.lease_s={lease_s:g}", "router.hedging.after=2", "router.hedging.share=1"]
    prompts = [dataclasses.replace(each, max_tokens=20) for each in make_prompts(6, seed=50, vocab_size=2000)]
    with running_cluster(model=demo_model, unified=2, options=[part for option in options for part in ("--set", option)]) as cluster:

        def ask() -> list[Outcome]:
            return asyncio.run(run_streams(cluster.url, prompts))

        cluster.wait_ready()
        expected = ask()
        cluster.wait_ready()
        cluster.signal("unified-0", signal.SIGSTOP)
        try:
            outcomes = ask()
        finally:
            cluster.signal("unified-0", signal.SIGCONT)
        cluster.wait_ready()
        assert [outcome.error for outcome in outcomes] == [None] * len(prompts)
        assert [outcome.token_ids for outcome in outcomes] == [outcome.token_ids for outcome in expected]
        assert any("decode=unified-1" in outcome.route and "hedged=won" in outcome.route for outcome in outcomes)
        assert max(outcome.slowest for outcome in outcomes) < lease_s / 2
        cluster.assert_clean()
