"""Admission at the router: whose turn it is, what tenants may have, and that everybody who comes in goes out again."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config import AdmissionConfig, RouterConfig, TenantConfig, load_config
from baton.errors import BatonError, ConfigError, NoWorkers, Overloaded, RateLimited, Unauthorized
from baton.metrics import RouterMetrics
from services.router.admission import Admission, Claim, Forecast, Ticket, Work
from services.router.breakers import Breakers
from services.router.fairqueue import FairQueue, Waiting
from services.router.tenants import Bucket, Tenant, Tenants

# -- whose turn it is

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
COSTS = st.integers(1, 100).map(float)
NEWCOMERS = st.builds(
    lambda tenant, cost, priority, deadline: Waiting(tenant, cost, WEIGHTS[tenant], priority, deadline),
    st.sampled_from(sorted(WEIGHTS)),
    COSTS,
    st.integers(-1, 1),
    st.integers(0, 50).map(float),
)


def served(queue: FairQueue[Waiting]) -> list[Waiting]:
    order: list[Waiting] = []
    while (first := queue.first()) is not None:
        queue.take(first)
        order.append(first)
    return order


@settings(deadline=None)
@given(st.lists(NEWCOMERS, max_size=40))
def test_priority_then_deadline_of_each_tenant_then_arrival_and_nobody_is_lost(newcomers: list[Waiting]) -> None:
    queue = FairQueue[Waiting]()
    for each in newcomers:
        queue.push(each)
    assert len(queue) == len(list(queue)) == len(newcomers)
    order = served(queue)
    assert len(queue) == 0
    assert {id(each) for each in order} == {id(each) for each in newcomers}
    assert [each.priority for each in order] == sorted(each.priority for each in newcomers)
    for tenant in WEIGHTS:
        for priority in (-1, 0, 1):
            own = [each.key for each in order if (each.tenant, each.priority) == (tenant, priority)]
            assert own == sorted(own)


@settings(deadline=None)
@given(st.lists(COSTS, min_size=25, max_size=25), st.lists(COSTS, min_size=25, max_size=25), st.lists(COSTS, min_size=25, max_size=25))
def test_who_always_waits_is_served_by_weight(a: list[float], b: list[float], c: list[float]) -> None:
    """No tenant that has something waiting is ever further behind another than one request of each, whatever the requests cost."""
    queue = FairQueue[Waiting]()
    for name, costs in (("a", a), ("b", b), ("c", c)):
        for cost in costs:
            queue.push(Waiting(name, cost, WEIGHTS[name]))
    got, largest = dict.fromkeys(WEIGHTS, 0.0), {name: max(costs) / WEIGHTS[name] for name, costs in (("a", a), ("b", b), ("c", c))}
    while {each.tenant for each in queue} == set(WEIGHTS):
        first = queue.first()
        assert first is not None
        queue.take(first)
        got[first.tenant] += first.cost / first.weight
        for one in WEIGHTS:
            for other in WEIGHTS:
                assert got[one] - got[other] <= largest[one] + 1e-6


def test_who_was_away_does_not_get_the_past_back() -> None:
    queue = FairQueue[Waiting]()
    for _ in range(20):
        queue.push(Waiting("busy", 10.0))
    for _ in range(10):
        queue.take(queue.first())  # type: ignore[arg-type]
    for _ in range(10):
        queue.push(Waiting("late", 10.0))
    turns = [each.tenant for each in served(queue)]
    assert sorted(turns[:4]) == ["busy", "busy", "late", "late"]


def test_what_was_taken_and_cost_less_is_given_back() -> None:
    queue = FairQueue[Waiting]()
    long, short = Waiting("a", 100.0), Waiting("b", 10.0)
    for each in (long, short, Waiting("a", 1.0), Waiting("b", 1.0)):
        queue.push(each)
    queue.take(long)
    queue.take(short)
    assert queue.first().tenant == "b"  # type: ignore[union-attr]
    queue.correct(long, 5.0)
    assert queue.first().tenant == "a"  # type: ignore[union-attr]


@settings(deadline=None)
@given(st.lists(NEWCOMERS, min_size=1, max_size=40), NEWCOMERS)
def test_who_has_to_go_is_never_more_urgent_than_who_comes(waiting: list[Waiting], newcomer: Waiting) -> None:
    queue = FairQueue[Waiting]()
    for each in waiting:
        queue.push(each)
    last = queue.last(newcomer)
    everybody = [*waiting, newcomer]
    assert last.priority == max(each.priority for each in everybody)
    rivals = [each for each in everybody if each.priority == last.priority]
    heaviest = max(sum(each.cost for each in rivals if each.tenant == name) / WEIGHTS[name] for name in WEIGHTS)
    assert sum(each.cost for each in rivals if each.tenant == last.tenant) / last.weight == pytest.approx(heaviest)
    assert last.key == max(each.key for each in rivals if each.tenant == last.tenant)


@settings(deadline=None)
@given(st.lists(NEWCOMERS, max_size=30), NEWCOMERS)
def test_what_is_ahead_is_what_is_served_before_but_for_one_request_of_each(waiting: list[Waiting], newcomer: Waiting) -> None:
    queue = FairQueue[Waiting]()
    for each in waiting:
        queue.push(each)
    told = queue.ahead(newcomer)
    queue.push(newcomer)
    order = served(queue)
    before = sum(each.cost for each in order[: order.index(newcomer)])
    assert abs(told - before) <= sum(max((each.cost for each in order if each.tenant == name), default=0.0) for name in WEIGHTS) * 5


@settings(deadline=None)
@given(st.lists(NEWCOMERS, min_size=1, max_size=20), st.data())
def test_who_leaves_is_gone_and_nobody_else(waiting: list[Waiting], data: st.DataObject) -> None:
    queue = FairQueue[Waiting]()
    for each in waiting:
        queue.push(each)
    gone = data.draw(st.sampled_from(waiting))
    assert queue.remove(gone)
    assert not queue.remove(gone)
    assert {id(each) for each in served(queue)} == {id(each) for each in waiting if each is not gone}


# -- tenants


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@settings(deadline=None)
@given(st.floats(0.1, 50), st.floats(1, 100), st.lists(st.tuples(st.floats(0, 5), st.floats(1, 200)), max_size=50))
def test_a_bucket_gives_no_more_than_its_rate_and_says_exactly_when_there_is_more(
    rate: float, capacity: float, asks: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket, taken = Bucket(rate, capacity, clock), 0.0
    for pause_s, amount in asks:
        clock.now += pause_s
        wait_s = bucket.wait_s()
        if not wait_s:
            assert taken <= capacity + rate * clock.now + 1e-6  # what was taken before has been paid
            bucket.take(amount)
            taken += amount
        else:
            clock.now += wait_s * 0.99
            assert bucket.wait_s() > 0
            clock.now += wait_s * 0.01 + 1e-6
            assert bucket.wait_s() == pytest.approx(0, abs=1e-5)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_tenants_by_key(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", "# rotated monthly\nsk-one\n\nsk-two\n")
    tenants = Tenants.read([TenantConfig(name="lab", key_file=keys, priority=2)])
    lab = tenants.of("Bearer sk-one")
    assert tenants.of("bearer sk-two") is lab
    assert (lab.name, lab.allowed(None), lab.allowed(-5), lab.allowed(7)) == ("lab", 2, 2, 7)
    chief = Tenants.read([TenantConfig(name="chief", priority=1, most_urgent=-1)]).of(None)
    assert [chief.allowed(asked) for asked in (None, 0, -1, -2)] == [1, 0, -1, -1]
    for wrong in (None, "", "Bearer", "Bearer nobody", "Basic sk-one", "sk-one"):
        with pytest.raises(Unauthorized, match="Authorization: Bearer KEY"):
            tenants.of(wrong)
    open_too = Tenants.read([TenantConfig(name="lab", key_file=keys), TenantConfig(name="guests", requests_per_s=1)])
    assert open_too.of(None).name == "guests"
    with pytest.raises(Unauthorized):
        open_too.of("Bearer nobody")
    assert Tenants.read([]).of("Bearer anything").allowed(-3) == -3  # nothing configured: as ever


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: [TenantConfig(name="a", key_file=str(t / "none"))], "cannot read the key_file of 'a'"),
        (lambda t: [TenantConfig(name="a", key_file=write(t / "k", "# nothing\n"))], "has no key in it"),
        (lambda t: [TenantConfig(name=n, key_file=write(t / "k", "same")) for n in "ab"], "'a' and 'b' have a key in common"),
        (lambda t: [TenantConfig(name="a"), TenantConfig(name="b")], "only one can be all the others"),
        (lambda t: [TenantConfig(name="a"), TenantConfig(name="a", key_file=write(t / "k", "x"))], "two named 'a'"),
    ],
)
def test_what_is_wrong_with_tenants_is_said(tmp_path: Path, make: Callable[[Path], list[TenantConfig]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Tenants.read(make(tmp_path))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tenants=[{name: a, nmae: b}]", "unknown key tenants.0.nmae; did you mean name?"),
        ("tenants=[{name: 'a b'}]", "tenants.0.name"),
        ("admission.max_runing=3", "did you mean max_running?"),
        ("tls.cert=x.pem", "give tls.cert and tls.key"),
    ],
)
def test_what_is_wrong_with_settings_is_said(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RouterConfig, None, [override], {})
    assert says in caught.value.message
    with pytest.raises(ConfigError, match="needs predicted times"):
        load_config(RouterConfig, None, ["policy=round_robin", "admission.backlog_s=1"], {})


# -- the gate


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
    assert "expected after 3.50 s" in refused.message
    assert "every 50.0 ms" in (await failure(await gate.come("choppy", Claim(itl_slo_s=0.02), **slow))).message
    await gate.come("patient", Claim(ttft_slo_s=4.0, itl_slo_s=0.1), **slow)
    await gate.come("nobody knows", Claim(ttft_slo_s=0.1))
    await gate.come("does not ask", **slow)
    assert gate.inside == ["patient", "nobody knows", "does not ask"]
    assert gate.refusals() == {("ttft", ""): 1.0, ("itl", ""): 1.0}
    await gate.end(*gate.inside)
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
    async with asyncio.timeout(2):  # nobody tells of other routers' requests: looked at now and then
        while "second" not in gate.inside:
            await asyncio.sleep(0.01)
    await gate.end(*gate.ends)
    await gate.is_empty()


async def test_all_who_wait_are_told_when_the_workers_stay_away() -> None:
    gone: list[NoWorkers] = []
    gate = Gate(lambda: gone[0] if gone else None, lease_s=0.1, max_running=1)
    for name in ("in", "1", "2"):
        await gate.come(name)
    gone.append(NoWorkers("no decode worker is ready; start one"))
    for name in ("1", "2"):
        refused = await failure(gate.tasks[name])
        assert (refused.code, refused.http_status) == ("no_workers", 503)
        assert "start one" in refused.message
    assert gate.refusals() == {("workers", ""): 2.0}
    await gate.end("in")
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


# -- breakers


def test_a_breaker_opens_tries_once_and_closes() -> None:
    clock = Clock()
    breakers = Breakers(failures=3, try_s=5.0, clock=clock)
    for _ in range(2):
        breakers.failed("w", "1")
    breakers.succeeded("w", "1")
    for _ in range(2):
        assert not breakers.failed("w", "1")
    assert breakers.open() == []
    assert breakers.failed("w", "1")
    assert breakers.open() == ["w"]
    breakers.failed("w", "1")  # was on its way there
    clock.now = 1.01
    assert breakers.open() == []
    breakers.asked("w", "1")
    assert breakers.open() == ["w"]  # one tries
    breakers.failed("w", "1")
    clock.now += 1.5
    assert breakers.open() == ["w"]  # for two seconds now
    clock.now += 0.6
    breakers.asked("w", "1")
    clock.now += 5.1
    assert breakers.open() == []  # nothing was heard of it: another may try
    breakers.asked("w", "1")
    breakers.succeeded("w", "1")
    assert breakers.open() == []
    assert not breakers.failed("w", "1")


def test_a_successor_starts_anew() -> None:
    breakers = Breakers(failures=1)
    breakers.failed("w", "1")
    assert breakers.open() == ["w"]
    breakers.succeeded("w", "2")
    assert breakers.open() == ["w"]
    breakers.failed("w", "2")
    breakers.succeeded("w", "2")
    assert breakers.open() == []
