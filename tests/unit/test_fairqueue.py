"""Whose turn it is at the router."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.fairqueue import FairQueue, Waiting

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


@given(st.lists(NEWCOMERS, min_size=1, max_size=20), st.data())
def test_who_leaves_is_gone_and_nobody_else(waiting: list[Waiting], data: st.DataObject) -> None:
    queue = FairQueue[Waiting]()
    for each in waiting:
        queue.push(each)
    gone = data.draw(st.sampled_from(waiting))
    assert queue.remove(gone)
    assert not queue.remove(gone)
    assert {id(each) for each in served(queue)} == {id(each) for each in waiting if each is not gone}
