"""What is predicted of requests that only want to know, when decode workers stand alone, and what a decision is explained by."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from baton.errors import NoWorkers
from baton.types import Pace, Role
from services.router.admission import Forecast, Promised
from services.router.dispatch import Route
from services.router.explain import Record, Records, explain, ranking
from services.router.placer import Decision, Placer
from services.router.policies import POLICIES
from services.router.policy import WorkerView
from services.router.workers import HashesBySize

PACE = Pace(base_s=0.01, token_s=0.001, row_s=0.0005, context_s=1e-6)
NOTHING = HashesBySize((), "")


class Seen:
    """Workers as they are said to be."""

    def __init__(self, *workers: WorkerView) -> None:
        self.workers = workers

    def view(self, hashes: HashesBySize, exclude: Sequence[str] = ()) -> list[WorkerView]:
        return [worker for worker in self.workers if worker.id not in exclude]

    def instance(self, worker_id: str) -> str:
        return "1"


def worker(name: str, role: Role, **changes: Any) -> WorkerView:
    fields = {"fingerprint": "f", "block_size": 16, "num_requests": 0, "pending_tokens": 0, "matched_tokens": 0, "pace": PACE}
    return WorkerView(id=name, role=role, **{**fields, **changes})


def placer(*workers: WorkerView, policy: str = "predicted", **options: Any) -> Placer:
    return Placer(cast(Any, Seen(*workers)), POLICIES[policy], **options)


def forecast(num_tokens: int, *workers: WorkerView, **options: Any) -> Forecast:
    return placer(*workers, **options).forecast(num_tokens, NOTHING, 10)()


def test_a_forecast_tells_the_wait_from_the_prompts_own_time() -> None:
    idle = forecast(1000, worker("u", Role.UNIFIED))
    assert idle.ttft_s == pytest.approx(1.01)
    assert idle.waits_s == 0
    assert idle.itl_s == pytest.approx(0.01 + 0.0005 + 1e-6 * 1005)
    queued = forecast(1000, worker("u", Role.UNIFIED, num_requests=3, num_waiting=2, pending_tokens=4000, context_tokens=500))
    assert queued.waits_s == pytest.approx(4.0 + 0.01 + 0.0005 + 1e-6 * 500)  # and what decodes beside
    assert queued.itl_s == pytest.approx(0.01 + 4 * 0.0005 + 1e-6 * 1505)  # who waits will decode too
    pushes = worker("p", Role.PREFILL, pace=Pace(base_s=0.01, token_s=0.001, push_token_s=0.005))
    slow_link = forecast(1000, pushes, worker("d", Role.DECODE), local_prefill=False)
    assert (slow_link.ttft_s, slow_link.waits_s) == (pytest.approx(5.0), 0)


def test_nobody_waits_at_an_idle_worker_whatever_the_prompt_takes_there() -> None:
    busy = worker("a", Role.UNIFIED, num_requests=2, num_waiting=2, pending_tokens=50_000)
    unlearned = forecast(8000, busy, worker("b", Role.UNIFIED, pace=Pace()))
    assert (unlearned.ttft_s, unlearned.waits_s) == (pytest.approx(8.01), 0)
    assert unlearned.itl_s == pytest.approx(0.01 + 0.0005 + 1e-6 * 8005)  # as the others do
    chunks = forecast(100_000, worker("b", Role.UNIFIED, batched_tokens=2048))
    assert (chunks.ttft_s, chunks.waits_s) == (pytest.approx(100 + 49 * 0.01), 0)
    crowded = Pace(base_s=0.01, token_s=0.001, row_s=0.0005, crowded=1.0)
    for device in ("", "m/0"):
        mates = [worker(name, Role.UNIFIED, pace=crowded, device=device) for name in "ab"]
        slower = forecast(1000, *mates)
        assert (slower.waits_s, slower.itl_s) == (0, pytest.approx(2 * 0.0105))
        behind = forecast(1000, *(replace(each, pending_tokens=3000, num_requests=1, num_waiting=1) for each in mates))
        assert behind.waits_s == pytest.approx(2 * 3.01)


def test_what_a_first_token_takes_beside_is_learned_and_told_but_refuses_nobody() -> None:
    asked = placer(worker("u", Role.UNIFIED))

    def served(actual_s: float) -> float | None:
        decision = asked.told(asked.decide(asked.facts(1000, 10), NOTHING))
        decision.ttft_s = actual_s
        asked.learn_ttft(decision)
        return decision.placement.ttft_s

    assert served(1.25) == pytest.approx(1.01)
    assert [served(1.25), served(60.0), served(1.25), served(1.25)] == [pytest.approx(1.25)] * 4
    for _ in range(40):
        served(60.0)  # a jam that nobody announces
    assert served(60.0) == pytest.approx(2.02)
    assert asked.forecast(1000, NOTHING, 10)().ttft_s == pytest.approx(1.01)
    promised = Promised(first_by=time.monotonic() + 1.1)
    assert asked.decide(asked.facts(1000, 10, promised=promised), NOTHING).placement.decode == "u"
    for _ in range(40):
        served(0.2)
    assert served(0.2) == pytest.approx(1.01 / 2)


def test_of_a_step_with_a_prompt_only_what_is_left_is_told() -> None:
    busy = {"num_requests": 3, "num_waiting": 1, "pending_tokens": 1002}  # two decode
    begun, decoding = {**busy, "computing_s": 0.4}, {"num_requests": 2, "pending_tokens": 2, "computing_s": 0.4}
    told = [forecast(1000, worker("u", Role.UNIFIED, **load)).ttft_s or 0.0 for load in (busy, begun)]
    assert told[0] - told[1] == pytest.approx(0.4)
    assert (
        forecast(1000, worker("u", Role.UNIFIED, **decoding)).ttft_s
        == forecast(1000, worker("u", Role.UNIFIED, **{**decoding, "computing_s": 0.0})).ttft_s
    )


def test_nobody_who_knows_nothing_is_forecast_anything() -> None:
    for unknown in (placer(worker("u", Role.UNIFIED, pace=Pace())), placer(worker("u", Role.UNIFIED), policy="least_load")):
        assert unknown.forecast(3, NOTHING, 10)() == Forecast()
    assert placer().forecast(3, NOTHING, 10)() == Forecast(waits_s=math.inf)


@pytest.mark.parametrize("policy", POLICIES)
def test_decode_workers_alone_compute_prompts_unless_it_is_forbidden(policy: str) -> None:
    alone = placer(worker("d0", Role.DECODE), worker("d1", Role.DECODE), policy=policy)
    decision = alone.decide(alone.facts(100, 10), NOTHING)
    assert decision.placement.prefills == ()
    assert decision.placement.reason.startswith("degraded")
    assert "no prefill worker is ready" in alone.degraded()
    assert alone.problem() is None
    forbidden = placer(worker("d0", Role.DECODE), policy=policy, local_prefill=False)
    with pytest.raises(NoWorkers, match="no prefill worker is ready"):
        forbidden.decide(forbidden.facts(100, 10), NOTHING)
    whole = placer(worker("d0", Role.DECODE), worker("p0", Role.PREFILL), policy=policy)
    assert whole.degraded() == ""
    assert placer(worker("p0", Role.PREFILL), policy=policy).problem() is not None


def test_open_breakers_are_gone_round_while_there_is_anybody_else() -> None:
    two = placer(worker("a", Role.UNIFIED), worker("b", Role.UNIFIED))
    for name in ("a", "b"):
        assert two.decide(two.facts(100, 10), NOTHING).placement.decode == name
        for _ in range(3):
            two.breakers.failed(name, "1")
    assert two.breakers.open() == ["a", "b"]
    assert two.decide(two.facts(100, 10), NOTHING).placement.decode == "a"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_version_that_is_asked_for_is_the_only_one_that_is_asked(policy: str) -> None:
    old = [worker("p1", Role.PREFILL, fingerprint="old"), worker("d1", Role.DECODE, fingerprint="old", num_requests=8)]
    new = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE)]
    both = placer(*old, *new, policy=policy)

    def goes(version: str, *refused: str) -> tuple[str, tuple[str, ...]]:
        placement = both.decide(both.facts(100, 10), NOTHING, refused, version).placement
        return placement.decode, placement.prefills[:1]

    assert goes("old") == ("d1", ("p1",))
    assert goes("f") == ("d0", ("p0",))
    assert goes("old", "p1") == ("d1", ())  # degraded, and not the other one's
    for _ in range(3):
        both.breakers.failed("d1", "1")
    assert goes("old") == ("d1", ("p1",))  # left alone where there is anybody else, of this version
    for nobody in (("old", "d1"), ("none",)):
        with pytest.raises(NoWorkers):
            goes(*nobody)


def test_an_explanation_ranks_the_choice_and_who_would_have_been_next() -> None:
    busy = {"num_requests": 2, "num_waiting": 2, "pending_tokens": 2000}
    asked = placer(
        worker("p0", Role.PREFILL, **busy),
        worker("p1", Role.PREFILL),
        worker("d0", Role.DECODE, num_requests=4, context_tokens=4000),
        worker("d1", Role.DECODE),
    )
    decision = asked.decide(asked.facts(1000, 10), NOTHING)
    options = ranking(asked.policy, decision.facts, decision.view)
    assert [(o.decode, o.prefills[:1]) for o in options] == [("d1", ("p1",)), ("d1", ("p0",)), ("d1", ()), ("d0", ("p1",))]
    costs = [option.cost_s or 0.0 for option in options]
    assert min(costs[:2] + costs[3:]) == costs[0] == decision.placement.cost_s  # d1 alone is not asked while p1 is idle
    here = ranking(asked.policy, decision.facts, [worker("p0", Role.PREFILL, **busy), worker("d0", Role.DECODE)])
    assert [(o.decode, o.prefills[:1]) for o in here] == [("d0", ()), ("d0", ("p0",))]
    assert (here[0].cost_s or 0) < (here[1].cost_s or 0)
    decision.ttft_s = 1.5
    page = explain(Record([Route("predicted", decode="d1", prefill="p1", num_prompt_tokens=1000, decisions=[decision])]), asked.policy)
    [told] = page["sequences"][0]["decisions"]
    assert told["ttft_s"] == {"predicted": pytest.approx(1.01), "beside": None, "actual": 1.5}
    assert set(told["candidates"][0]["workers"]) == {"d1", "p1"}
    assert [bool(each["forbidden"]) for each in told["candidates"]] == [False, False, True, False]


def test_records_are_bounded_and_each_tenants_own() -> None:
    records = Records(2)
    kept = [records.start(name, "a") for name in ("1", "2", "2", "3")]
    assert records.find("1", "a") is None
    assert records.find("2", "a") is kept[2]
    assert records.find("2", "b") is None
    assert Records(0).start("1", "a").kept is False
    wide, rows = Records(1000), 1000
    asked = placer(*(worker(f"u{i:03}", Role.UNIFIED) for i in range(rows)))
    made, routes, decisions = asked.decide(asked.facts(10, 1), NOTHING), list[Route](), list[Decision]()

    def sequence(record: Record, moves: int) -> None:
        route = Route("p")
        wide.add(record, route)
        routes.append(route)
        for _ in range(moves + 1):
            decisions.append(replace(made))  # and a sequence that runs holds it
            route.on_decision(decisions[-1])

    for i in range(100):
        sequence(wide.start(str(i), ""), 0)
    assert [i for i in range(100) if wide.find(str(i), "") is not None] == [*range(35, 100)]
    many = wide.start("many", "")
    for _ in range(64):
        sequence(many, 3)
    kept_rows = sum(len(route.decisions) for route in routes) * rows
    assert sum(len(decision.view) for decision in decisions) == kept_rows <= 65_536  # whoever still holds on to them
    assert [len(route.decisions) for route in many.routes] == [4] * 8
    assert many.copy().num_sequences == 64
    late = routes[0]
    late.on_decision(decisions[-1])  # of one that is forgotten
    assert late.decisions == []


def test_placements_that_would_be_late_are_no_options_of_an_explanation() -> None:
    late = {"num_requests": 2, "num_waiting": 2, "pending_tokens": 2000}
    asked = placer(worker("u0", Role.UNIFIED), worker("u1", Role.UNIFIED, **late))
    facts = replace(asked.facts(1000, 10), ttft_slo_s=2.0)
    decision = asked.decide(facts, NOTHING)
    assert [option.decode for option in ranking(asked.policy, facts, decision.view)] == ["u0"]


def test_what_was_promised_decides_where_it_goes() -> None:
    """Where nobody keeps it, it is placed all the same, and its forecast says by how much it would be late."""
    soon = worker("soon", Role.UNIFIED, num_requests=100, context_tokens=100_000, pending_tokens=100)  # 0.16 s a step
    late = worker("late", Role.UNIFIED, pending_tokens=2000, num_requests=1, num_waiting=1)
    asked = placer(soon, late)

    def goes(promised: Promised) -> str:
        return asked.decide(asked.facts(1000, 10, promised=promised), NOTHING).placement.decode

    assert goes(Promised()) == goes(Promised(itl_s=0.1)) == "late"
    assert goes(Promised(time.monotonic() + 2.5)) == "soon"
    assert asked.forecast(1000, NOTHING, 10, Promised(time.monotonic() + 2.5))().ttft_s == pytest.approx(1.26)
    nobody = Promised(time.monotonic() - 1.0, 0.001)
    assert asked.facts(1000, 10, promised=nobody).ttft_slo_s == pytest.approx(0.001)
    assert goes(nobody) == "late"
    assert asked.forecast(1000, NOTHING, 10, nobody)().ttft_s == pytest.approx(3.01)
    assert placer(soon, policy="mooncake").decide(asked.facts(1000, 10, promised=nobody), NOTHING).placement.decode == "soon"
