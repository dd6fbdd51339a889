"""Admission at the router: that everybody who comes in goes out again, and in which order."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from baton.config import AdmissionConfig
from baton.errors import BatonError, NoWorkers, Overloaded, RateLimited
from baton.metrics import RouterMetrics
from baton.types import Role
from services.router.admission import Admission, Claim, Forecast, Ticket, Work
from services.router.placer import Placer
from services.router.policies import POLICIES
from services.router.tenants import Bucket, Tenant
from tests.unit.clock import Clock
from tests.unit.test_placer import NOTHING, Seen, worker

IDLE, BUSY = worker("u", Role.UNIFIED), worker("u", Role.UNIFIED, num_requests=1, num_waiting=1, pending_tokens=4000)


class Gate:
    """Requests that go in and stay until they are told to end."""

    def __init__(self, problem: Callable[[], NoWorkers | None] = lambda: None, lease_s: float = 5.0, **config: Any) -> None:
        self.metrics = RouterMetrics("m")
        self.admission = Admission(AdmissionConfig(**config), self.metrics, lease_s=lease_s, problem=problem)
        self.inside: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[Ticket]] = {}

    async def come(self, name: str, claim: Claim | None = None, *, cost: int = 10, **work: Any) -> "asyncio.Task[Ticket]":
        self.ends[name] = asyncio.Event()

        async def stay() -> Ticket:
            async with self.admission.enter(claim or Claim(), Work(num_prompt_tokens=cost, num_output_tokens=0, **work)) as ticket:
                self.inside.append(name)
                await self.ends[name].wait()
                return ticket

        self.tasks[name] = asyncio.create_task(stay())
        await settled()
        return self.tasks[name]

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
        await settled()

    def refusals(self) -> dict[tuple[str, str], float]:
        samples = [s for family in self.metrics.registry.collect() for s in family.samples if s.name == "baton:requests_refused_total"]
        return {(s.labels["reason"], s.labels["tenant"]): s.value for s in samples}

    async def is_empty(self) -> None:
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert self.admission._running == 0
        assert len(self.admission._queue) == 0


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def failure(task: "asyncio.Task[Ticket]") -> BatonError:
    with pytest.raises(BatonError) as caught:
        await task
    return caught.value


async def test_nothing_configured_lets_everybody_in_at_once() -> None:
    gate = Gate()
    for i in range(50):
        await gate.come(str(i), Claim(priority=i))
    assert len(gate.inside) == 50
    await gate.end(*gate.ends)
    await gate.is_empty()


async def test_the_order_is_priority_then_share_then_arrival_and_a_place_is_given_on() -> None:
    gate = Gate(max_running=1)
    a, b, c = Tenant(name="a"), Tenant(name="b"), Tenant(name="c")
    for name, tenant, priority in (("in", a, 0), ("a1", a, 0), ("a2", a, 0), ("a3", a, 0), ("low", a, 1), ("b1", b, 0), ("high", c, -1)):
        await gate.come(name, Claim(tenant=tenant, priority=priority))
    expected = ["in", "high", "a1", "b1", "a2", "a3", "low"]
    for place, name in enumerate(expected, 1):
        assert gate.inside == expected[:place]
        await gate.end(name)
    await gate.is_empty()
    assert (await gate.tasks["low"]).queued_s > 0


async def test_who_is_cancelled_leaves_at_once_also_when_its_turn_has_just_come() -> None:
    gate = Gate(max_running=1)
    for name in ("in", "gone", "turned", "next"):
        await gate.come(name)
    gate.tasks["gone"].cancel()
    await settled()
    assert len(gate.admission._queue) == 2
    turned = gate.admission._queue.first()
    assert turned is not None
    gate.admission._go(turned)
    gate.tasks["turned"].cancel()
    await settled()
    assert gate.admission._running == 1
    await gate.end("in")
    assert gate.inside == ["in", "next"]
    await gate.end("next")
    await gate.is_empty()


async def test_a_full_queue_lets_the_least_urgent_go() -> None:
    gate = Gate(max_running=1, max_waiting=2)
    a, b = Tenant(name="a"), Tenant(name="b")
    await gate.come("in", Claim(tenant=a))
    await gate.come("a1", Claim(tenant=a))
    await gate.come("a2", Claim(tenant=a))
    refused = await failure(await gate.come("a3", Claim(tenant=a)))
    assert isinstance(refused, Overloaded)
    assert "2 requests wait already" in refused.message
    await gate.come("b1", Claim(tenant=b))  # whose share is not used up
    assert "wait already" in (await failure(gate.tasks["a2"])).message
    await gate.come("urgent", Claim(tenant=a, priority=-1))
    assert len(gate.admission._queue) == 2
    assert sum(gate.refusals().values()) == 3
    await gate.end(*gate.ends)
    await gate.is_empty()
    assert gate.inside[:2] == ["in", "urgent"]


async def test_who_is_on_the_way_out_is_not_sent_out_again() -> None:
    gate = Gate(max_running=1, max_waiting=2)
    for name in ("in", "gone", "waits"):
        await gate.come(name, Claim(priority=1 if name == "gone" else 0))
    for name in ("newcomer", "refused"):
        coming = asyncio.ensure_future(gate.come(name))  # runs before the one that is cancelled hears of it
        await asyncio.sleep(0)
        gate.tasks["gone"].cancel()
        await coming
    assert isinstance(await failure(gate.tasks["refused"]), Overloaded)
    assert gate.refusals() == {("full", ""): 1.0}
    await gate.end(*gate.ends)
    await gate.is_empty()
    assert gate.inside == ["in", "waits", "newcomer"]


async def test_no_queue_at_all() -> None:
    gate = Gate(max_running=1, max_waiting=0)
    await gate.come("in")
    assert isinstance(await failure(await gate.come("out")), Overloaded)
    await gate.end("in")
    await gate.come("later")
    assert gate.inside == ["in", "later"]
    await gate.end("later")
    await gate.is_empty()


async def test_who_waited_too_long_is_refused() -> None:
    gate = Gate(max_running=1, max_wait_s=0.05)
    await gate.come("in")
    assert "admission.max_wait_s" in (await failure(await gate.come("late"))).message
    slo = await failure(await gate.come("slo", Claim(ttft_slo_s=0.02)))
    assert "all the time it had" in slo.message
    assert gate.refusals() == {("wait", ""): 1.0, ("ttft", ""): 1.0}
    await gate.end("in")
    await gate.is_empty()


async def test_who_cannot_be_in_time_is_refused_at_once_and_told_when_to_come_again() -> None:
    gate = Gate()
    slow = {"forecast": lambda: Forecast(ttft_s=3.5, itl_s=0.05)}
    refused = await failure(await gate.come("late", Claim(ttft_slo_s=1.0), **slow))
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s == pytest.approx(2.5)
    assert "expected after 3500 ms (0 ms queued); asked for: 1000 ms" in refused.message
    assert "every 50.0 ms" in (await failure(await gate.come("choppy", Claim(itl_slo_s=0.02), **slow))).message
    await gate.come("patient", Claim(ttft_slo_s=4.0, itl_slo_s=0.1), **slow)
    await gate.come("nobody knows", Claim(ttft_slo_s=0.1))
    await gate.come("does not ask", **slow)
    assert gate.inside == ["patient", "nobody knows", "does not ask"]
    assert gate.refusals() == {("ttft", ""): 1.0, ("itl", ""): 1.0}
    await gate.end(*gate.inside)
    await gate.is_empty()


async def test_a_callers_deadline_makes_no_promise_of_the_routers_longer() -> None:
    gate, slow = Gate(ttft_slo_s=1.0), {"forecast": lambda: Forecast(ttft_s=3.5)}
    assert "asked for: 1000 ms" in (await failure(await gate.come("configured", Claim(deadline_s=60.0), **slow))).message
    assert "asked for: 2000 ms" in (await failure(await gate.come("gone by then", Claim(ttft_slo_s=5.0, deadline_s=2.0), **slow))).message
    await gate.come("asks for less", Claim(ttft_slo_s=5.0, deadline_s=60.0), **slow)
    assert gate.inside == ["asks for less"]
    await gate.end("asks for less")
    await gate.is_empty()


async def test_what_is_forecast_is_asked_once_for_whoever_comes() -> None:
    gate, asked = Gate(backlog_s=1.0), list[str]()

    def forecast() -> Forecast:
        asked.append("")
        return Forecast(ttft_s=0.5, waits_s=0.5)

    for name in ("1", "2"):
        await gate.come(name, Claim(ttft_slo_s=1.0), forecast=forecast)
    assert gate.inside == ["1", "2"]
    assert len(asked) == 2
    await gate.end("1", "2")
    await gate.is_empty()


async def test_the_place_in_the_queue_counts_once_the_pace_is_known() -> None:
    gate = Gate(max_running=1)
    for name in ("in", "1", "2", "3"):
        await gate.come(name)
    for name in ("in", "1"):
        await asyncio.sleep(0.2)
        await gate.end(name)
    refused = await failure(await gate.come("late", Claim(ttft_slo_s=0.05)))  # "3" and its own way: 0.2 s each
    assert "queued" in refused.message
    assert (refused.retry_after_s or 0) > 0.1  # type: ignore[attr-defined]
    await gate.come("urgent", Claim(ttft_slo_s=10.0))
    await gate.end(*gate.ends)
    await gate.is_empty()
    assert gate.inside == ["in", "1", "2", "urgent", "3"]  # an earlier deadline goes first


async def test_requests_wait_here_while_they_would_wait_at_the_workers() -> None:
    gate, waits = Gate(backlog_s=1.0), {"s": 5.0}
    work = {"forecast": lambda: Forecast(ttft_s=9.0, waits_s=waits["s"])}
    await gate.come("alone", **work)  # goes whatever is told
    await gate.come("second", **work)
    assert gate.inside == ["alone"]
    waits["s"] = 0.5
    async with asyncio.timeout(30):  # nobody tells of other routers' requests: looked at now and then
        while "second" not in gate.inside:
            await asyncio.sleep(0.01)
    await gate.end(*gate.ends)
    await gate.is_empty()


@pytest.mark.parametrize("limit", [{"max_running": 1}, {"backlog_s": 0.5}])
async def test_all_who_wait_are_told_when_the_workers_stay_away(limit: dict[str, float]) -> None:
    workers = Seen(BUSY)
    asked = Placer(cast(Any, workers), POLICIES["predicted"])
    gate, work = Gate(asked.problem, lease_s=0.2, **limit), {"forecast": asked.forecast(10, NOTHING, 10)}
    for name in ("in", "1", "2"):
        await gate.come(name, **work)
    assert gate.inside == ["in"]
    workers.workers = ()
    async with asyncio.timeout(5):
        while gate.admission._broken_since is None:
            await asyncio.sleep(0.01)
    await gate.end("in")  # nobody goes in its place, to wait for another lease
    for name in ("1", "2"):
        refused = await failure(gate.tasks[name])
        assert (refused.code, refused.http_status) == ("no_workers", 503)
        assert "start one" in refused.message
    assert gate.refusals() == {("workers", ""): 2.0}
    await gate.is_empty()


async def test_the_queue_stands_still_while_no_worker_is_usable_and_keeps_its_order() -> None:
    workers = Seen(BUSY)
    asked = Placer(cast(Any, workers), POLICIES["predicted"])
    gate, work = Gate(asked.problem, backlog_s=0.5), {"forecast": asked.forecast(10, NOTHING, 10)}
    for name, priority in (("in", 0), ("beside", 0), ("low", 1), ("1", 0), ("2", 0)):
        workers.workers = (IDLE if name == "beside" else BUSY,)
        await gate.come(name, Claim(priority=priority), **work)
    workers.workers = ()
    await gate.end("in")  # before anybody has looked who is there
    async with asyncio.timeout(5):
        while gate.admission._broken_since is None:
            await asyncio.sleep(0.01)
    await gate.end("beside")
    await gate.come("urgent", Claim(priority=-5), **work)
    assert gate.inside == ["in", "beside"]
    workers.workers = (IDLE,)
    async with asyncio.timeout(5):
        while len(gate.inside) < 6:
            await asyncio.sleep(0.01)
    assert gate.inside == ["in", "beside", "urgent", "1", "2", "low"]
    await gate.end(*gate.ends)
    await gate.is_empty()


async def test_rates_are_kept_and_what_was_not_served_is_given_back() -> None:
    clock = Clock()
    tenant = Tenant(name="t", requests=Bucket(1.0, 2.0, clock), tokens=Bucket(10.0, 100.0, clock))
    gate = Gate(max_running=1)
    await gate.come("1", Claim(tenant=tenant), cost=60)
    waiting = await gate.come("2", Claim(tenant=tenant), cost=60)
    refused = await failure(await gate.come("3", Claim(tenant=tenant)))
    assert isinstance(refused, RateLimited)
    assert "requests_per_s" in refused.message
    assert refused.retry_after_s == pytest.approx(1.0)
    clock.now += 1.0
    refused = await failure(await gate.come("4", Claim(tenant=tenant)))  # 100 - 120 + 10
    assert "tokens_per_min" in refused.message
    assert refused.retry_after_s == pytest.approx(1.1)  # type: ignore[attr-defined]
    waiting.cancel()
    await settled()
    await gate.end("1")
    await gate.come("5", Claim(tenant=tenant))  # the second one's 60 are back
    assert gate.inside == ["1", "5"]
    assert gate.refusals() == {("rate", "t"): 2.0}
    await gate.end("5")
    await gate.is_empty()
