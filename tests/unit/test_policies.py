"""Policies on cases that were worked out by hand; what they take a burst for."""

from dataclasses import replace
from typing import Any

import pytest

from baton.config import POLICY_NAMES, check_policy
from baton.errors import ConfigError, Overloaded
from baton.hashing import block_hashes
from baton.types import BlocksRemoved, BlocksStored, Load, Member, MemberState, Pace, Role, StateUpdate, Tier
from services.router.fleet import Fleet, Worker
from services.router.index import PrefixIndex
from services.router.policies import POLICIES
from services.router.policy import Facts, Placement, least_load
from services.router.predicted import predicted
from services.router.view import View, WorkerView

PACE = Pace(base_s=0.01, token_s=0.001, row_s=0.0005, context_s=1e-6)


def worker(name: str, role: Role, **changes: Any) -> WorkerView:
    fields = {"fingerprint": "f", "block_size": 10, "num_requests": 0, "pending_tokens": 0, "matched_tokens": 0, "pace": PACE}
    return WorkerView(id=name, role=role, **{**fields, **changes})


def placed(policy: str, workers: list[WorkerView], **facts: Any) -> Placement:
    return POLICIES[policy](Facts(**{"num_prompt_tokens": 1000, "turn": 0, **facts}), workers)  # type: ignore[index]


def test_configuration_and_code_know_the_same_names() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    assert check_policy("dynamo") == "dynamo"
    with pytest.raises(ConfigError, match=r"no policy 'cache_awre'; did you mean cache_aware\?; there are predicted, prefix_aware"):
        check_policy("cache_awre")


def test_random_depends_on_the_turn_alone_and_reaches_everybody() -> None:
    workers = [*(worker(f"p{i}", Role.PREFILL) for i in range(3)), *(worker(f"d{i}", Role.DECODE) for i in range(3))]
    chosen = [(p.decode, p.prefills[0]) for p in (placed("random", workers, turn=turn) for turn in range(200))]
    assert chosen == [(p.decode, p.prefills[0]) for p in (placed("random", workers, turn=turn) for turn in range(200))]
    assert len(set(chosen)) == 9


@pytest.mark.parametrize(
    ("loads", "matched", "chosen"),
    [
        ((5, 3, 9), (400, 0, 500), "u2"),  # the longest prefix, however busy
        ((5, 3, 9), (200, 0, 300), "u1"),  # not more than 0.3 of the prompt: the fewest requests
        ((5, 3, 9), (500, 500, 500), "u1"),  # equal prefixes: the fewest requests
        ((5, 3, 68), (0, 0, 900), "u1"),  # 68 − 3 > 64 and 68 > 1.5 · 3: out of balance
        ((200, 150, 215), (0, 0, 900), "u2"),  # 65 more, but not 1.5 times as many
    ],
)
def test_cache_aware(loads: tuple[int, ...], matched: tuple[int, ...], chosen: str) -> None:
    workers = [
        worker(f"u{i}", Role.UNIFIED, num_requests=load, expected_tokens=prefix)
        for i, (load, prefix) in enumerate(zip(loads, matched, strict=True))
    ]
    assert placed("cache_aware", workers).decode == chosen


def test_dynamo_adds_prefill_blocks_that_are_missing_and_decode_blocks() -> None:
    # blocks to compute: 50 + 100 − 80 = 70, and 20 + 100 running: 190;   0 + 100 − 0 = 100, and 0 + 100: 200
    pair = [worker("u0", Role.UNIFIED, matched_tokens=800, pending_tokens=500, context_tokens=200), worker("u1", Role.UNIFIED)]
    assert placed("dynamo", pair).decode == "u0"
    pair[0] = worker("u0", Role.UNIFIED, matched_tokens=800, pending_tokens=500, context_tokens=310)  # 201
    assert placed("dynamo", pair).decode == "u1"


def test_dynamo_gives_decode_workers_no_credit_for_their_prefixes() -> None:
    decodes = [worker("d0", Role.DECODE, matched_tokens=1000, context_tokens=20), worker("d1", Role.DECODE, context_tokens=10)]
    assert placed("dynamo", [worker("p0", Role.PREFILL), *decodes]).decode == "d1"


def test_llm_d_sums_weighted_scores() -> None:
    # waiting 4, 0, 2 → queue 0, 1, 0.5; 2 · queue + 2 · (1 − kv) + 3 · prefix
    workers = [
        worker("u0", Role.UNIFIED, num_waiting=4, kv_used=0.5, matched_tokens=1000),  # 0 + 1 + 3 = 4
        worker("u1", Role.UNIFIED, num_waiting=0, kv_used=0.25, matched_tokens=100),  # 2 + 1.5 + 0.3 = 3.8
        worker("u2", Role.UNIFIED, num_waiting=2, kv_used=0.2, matched_tokens=500),  # 1 + 1.6 + 1.5 = 4.1
    ]
    assert placed("llm_d", workers).decode == "u2"
    workers[2] = worker("u2", Role.UNIFIED, num_waiting=2, kv_used=0.3, matched_tokens=500)  # 3.9
    assert placed("llm_d", workers).decode == "u0"


def test_mooncake_takes_the_least_of_transfer_queue_and_prefill() -> None:
    # p0: 0.3 queued + 0.2 of its own; p1: 0.9 of its own, or 0.7 tokens × 0.0002 brought + 0.2
    workers = [
        worker("p0", Role.PREFILL, matched_tokens=800, pending_tokens=300),
        worker("p1", Role.PREFILL, matched_tokens=100),
        worker("d0", Role.DECODE, num_requests=2, context_tokens=2000),
        worker("d1", Role.DECODE, num_requests=3, context_tokens=1000),
    ]
    alone = placed("mooncake", workers)
    assert (alone.decode, alone.prefills) == ("d1", ("p0", "p1"))  # 0.0135 + 0.001 + … against 0.0115 + 0.002: contexts count
    assert alone.ttft_s == pytest.approx(0.5)
    brought = placed("mooncake", workers, fetch_token_s=0.0002)
    assert brought.prefills == ("p1", "p0")
    assert brought.ttft_s == pytest.approx(0.7 * 0.2 + 0.2)


def test_mooncake_refuses_what_would_be_late() -> None:
    workers = [worker("u0", Role.UNIFIED, pending_tokens=1000)]
    assert placed("mooncake", workers, ttft_slo_s=2.1).decode == "u0"
    with pytest.raises(Overloaded, match=r"expected where 1[.]9 s were promised"):
        placed("mooncake", workers, ttft_slo_s=1.9)
    with pytest.raises(Overloaded, match=r"expected where 0[.]01 s were promised"):
        placed("mooncake", workers, itl_slo_s=0.01)


def test_predicted_refuses_what_nobody_is_expected_to_keep() -> None:
    busy = worker("u0", Role.UNIFIED, pending_tokens=1000, num_waiting=1, num_requests=1)
    crowded = worker("u1", Role.UNIFIED, num_requests=100, context_tokens=100_000)  # 0.16 s a step
    assert placed("predicted", [busy, crowded]).decode == "u0"
    assert placed("predicted", [busy, crowded], ttft_slo_s=1.5).decode == "u1"
    assert placed("predicted", [busy, crowded], itl_slo_s=0.1).decode == "u0"
    with pytest.raises(Overloaded, match=r"promised, 1\.5 s to the first token and 0\.1 s between tokens"):
        placed("predicted", [busy, crowded], ttft_slo_s=1.5, itl_slo_s=0.1)
    unknown = [worker("u0", Role.UNIFIED, pending_tokens=10**9, pace=Pace())]
    assert placed("predicted", unknown, ttft_slo_s=1.5).decode == "u0"  # nobody knows


def test_predicted_refuses_a_push_that_would_be_late() -> None:
    """Not a prompt that D computes in time itself, though that costs the others there more."""
    slow_link = worker("p0", Role.PREFILL, pace=replace(PACE, push_token_s=0.005))  # 5 s
    busy_path = worker("p1", Role.PREFILL, pending_tokens=500, num_waiting=40, num_requests=40)  # 1.5 s, and delays forty
    decodes = worker("d0", Role.DECODE, num_requests=20)
    assert placed("predicted", [slow_link, decodes]).prefills == ("p0",)
    assert placed("predicted", [slow_link, decodes], ttft_slo_s=4.0).prefills == ()
    with pytest.raises(Overloaded, match=r"promised, 4 s to the first token"):
        placed("predicted", [slow_link, decodes], ttft_slo_s=4.0, local_prefill=False)
    either = [slow_link, busy_path, decodes]
    assert placed("predicted", either, local_prefill=False).prefills == ("p0", "p1")
    kept = placed("predicted", either, local_prefill=False, ttft_slo_s=4.0)
    assert kept.prefills == ("p1", "p0")
    assert kept.ttft_s is not None
    assert kept.ttft_s < 4.0


def test_a_full_pool_of_prefill_workers_is_spared_where_a_decode_worker_has_less_to_lose() -> None:
    """Both prefill workers wait equally long; who is there now stands for who will come."""
    decode = worker("d0", Role.DECODE, num_requests=5, context_tokens=1000)

    def computes(there: int) -> str:
        pool = [worker(f"p{n}", Role.PREFILL, pending_tokens=300, num_requests=there) for n in range(2)]
        return "P" if placed("predicted", [*pool, decode]).prefills else "D"

    assert [computes(there) for there in (1, 2, 3)] == ["P", "D", "D"]


def test_a_decode_worker_computes_no_prompts_where_a_habit_of_it_would_break_what_was_promised() -> None:
    """Ten requests of 100 tokens, each with 0.1 s of prompt: 10 ms a token, and the step's 15."""
    decode = worker("d0", Role.DECODE, num_requests=9, matched_tokens=900)
    pool = worker("p0", Role.PREFILL, pending_tokens=30_000, num_requests=5, num_waiting=5)
    for promised, prefills in ((None, ()), (0.03, ()), (0.02, ("p0",))):
        assert placed("predicted", [pool, decode], num_output_tokens=100, itl_slo_s=promised).prefills == prefills


def test_what_has_passed_of_a_step_is_neither_told_nor_held_against_a_promise() -> None:
    step = {"pending_tokens": 1000, "num_requests": 1, "num_waiting": 0, "batched_tokens": 1000}
    workers = [worker("p0", Role.PREFILL, **step, computing_s=0.75), worker("d0", Role.DECODE, num_requests=50)]
    whole = [worker("p0", Role.PREFILL, **step), workers[1]]
    told, before = placed("predicted", workers, local_prefill=False), placed("predicted", whole, local_prefill=False)
    assert (before.ttft_s or 0) - (told.ttft_s or 0) == pytest.approx(0.75)
    assert told.cost_s == before.cost_s
    assert placed("predicted", workers, local_prefill=False, ttft_slo_s=(told.ttft_s or 0) + 0.1).prefills == ("p0",)
    with pytest.raises(Overloaded):
        placed("predicted", whole, local_prefill=False, ttft_slo_s=(told.ttft_s or 0) + 0.1)


def test_a_decode_worker_without_room_is_one_that_has_to_be_waited_for() -> None:
    """Until enough of its requests have ended."""
    full = worker("d0", Role.DECODE, num_requests=10, context_tokens=9500, kv_used=0.95, kv_tokens=10_000)
    roomy = worker("d1", Role.DECODE, num_requests=10, context_tokens=9600, kv_used=0.1, kv_tokens=100_000)
    workers = [worker("p0", Role.PREFILL), full, roomy]
    told = placed("predicted", workers, num_output_tokens=100, local_prefill=False)
    assert told.decode == "d1"
    with_room = [replace(full, kv_tokens=20_000, kv_used=0.475), roomy]
    assert placed("predicted", [workers[0], *with_room], num_output_tokens=100, local_prefill=False).decode == "d0"
    alone = placed("predicted", workers[:2], num_output_tokens=100, local_prefill=False)
    free = placed("predicted", [workers[0], with_room[0]], num_output_tokens=100, local_prefill=False)
    waits_s = (1100 - 500) / 9500 * 100 * (free.itl_s or 0)
    assert (alone.ttft_s or 0) == pytest.approx((free.ttft_s or 0) + waits_s)
    queue = [workers[0], replace(with_room[0], num_waiting=9)]  # would have room for itself alone
    assert (placed("predicted", queue, num_output_tokens=100, local_prefill=False).ttft_s or 0) > (free.ttft_s or 0)
    assert placed("predicted", [workers[0], replace(full, kv_tokens=0), roomy], num_output_tokens=100).decode == "d0"  # not announced


def test_blocks_that_are_reserved_for_those_that_wait_are_not_waited_for_again() -> None:
    """Eight prompts of 4,000 tokens are on their way to 32,000 of 82,000 tokens that are held."""
    reserved = {"num_requests": 18, "num_waiting": 8, "num_held": 8, "context_tokens": 50_000, "kv_used": 0.82, "kv_tokens": 100_000}
    decode = worker("d0", Role.DECODE, **reserved)
    told, unknown = (
        placed("predicted", [worker("p0", Role.PREFILL), each], num_prompt_tokens=4000, num_output_tokens=300, local_prefill=False)
        for each in (decode, replace(decode, kv_tokens=0))
    )
    assert told.ttft_s == unknown.ttft_s


# -- bursts

HASHES = block_hashes(range(1000), 10)


def fleet(*names: str) -> tuple[Fleet, list[Worker]]:
    made = Fleet()
    workers = [
        made.add(Member(id=name, role=Role.PREFILL if name[0] == "p" else Role.DECODE, address="", fingerprint="f", block_size=10))
        for name in names
    ]
    for each in workers:
        say(made, each, 0)
    return made, workers


def say(made: Fleet, each: Worker, sequence: int, *events: BlocksStored | BlocksRemoved, **load: Any) -> None:
    made.update(each, StateUpdate(sequence=sequence, state=MemberState.READY, load=Load(pace=PACE, **load), events=events))


def test_a_burst_of_siblings_goes_where_the_first_of_them_went() -> None:
    made, (p0, p1, _) = fleet("p0", "p1", "d0")
    say(made, p1, 1, num_waiting_tokens=100, num_waiting=1)

    def where() -> str:
        view = made.view(lambda size: HASHES)
        return predicted(Facts(num_prompt_tokens=1000, turn=0, num_output_tokens=10, local_prefill=False), view).prefills[0]

    assert where() == "p0"
    made.routed("p0", "first", 1000, 500_000, HASHES)
    assert where() == "p0"  # what it computes now need not be computed again
    say(made, p0, 1, num_waiting_tokens=1000, num_waiting=1)
    assert where() == "p0"  # also when nothing but its load has been told
    made.unrouted("p0", "first")
    assert where() == "p0"
    say(made, p0, 2, num_waiting_tokens=1000, num_waiting=1)  # it left without a block being stored
    assert where() == "p1"


def test_whom_a_hedge_was_faster_than_has_something_to_do_until_it_speaks() -> None:
    made, (p0, *_) = fleet("p0", "p1", "d0")

    def where() -> str:
        return least_load(Facts(num_prompt_tokens=1000, turn=0), made.view(lambda size: HASHES)).prefills[0]

    assert where() == "p0"
    made.routed("p0", "hangs there", 1000, 500_000, HASHES)
    made.unrouted("p0", "hangs there", silent=True)
    assert where() == "p1"
    say(made, p0, 1)
    assert where() == "p0"


def test_a_hot_prefix_is_computed_once_more_where_waiting_for_it_takes_longer() -> None:
    made, (p0, p1, _) = fleet("p0", "p1", "d0")
    say(made, p0, 1, BlocksStored(tuple(HASHES[:90])))

    def where() -> str:
        view = made.view(lambda size: HASHES)
        return predicted(Facts(num_prompt_tokens=1000, turn=0, num_output_tokens=10, local_prefill=False), view).prefills[0]

    for number in range(20):
        if where() == "p1":
            break
        made.routed("p0", str(number), 100, 0, HASHES)
    assert 2 < number < 19  # affinity holds for a while, and no longer
    made.routed("p1", "copy", 1000, 500_000, HASHES)
    say(made, p0, 2, num_waiting_tokens=800, num_waiting=8)
    say(made, p1, 1, BlocksStored(tuple(HASHES[:90])))
    made.unrouted("p1", "copy")
    assert where() == "p1"  # there are two now


def test_what_is_expected_leads_on_from_what_is_held() -> None:
    made, (p0, p1, _) = fleet("p0", "p1", "d0")
    say(made, p0, 1, BlocksStored(tuple(HASHES[:30])))
    made.routed("p0", "a", 700, 0, HASHES[:60])
    made.routed("p1", "b", 700, 0, HASHES[20:])  # nothing leads to these
    view = made.view(lambda size: HASHES)
    assert view.matched_tokens.tolist() == [0, 300, 0]
    assert view.expected_tokens.tolist() == [0, 600, 0]
    say(made, p1, 1, BlocksStored(tuple(HASHES[:20])))
    assert made.view(lambda size: HASHES).expected_tokens.tolist() == [0, 600, 1000]
    made.remove(p1)
    assert [w.id for w in made.view(lambda size: HASHES)] == ["d0", "p0"]


def test_views_follow_who_is_there_and_leave_out_whom_they_are_told_to() -> None:
    made, (p0, p1, d0) = fleet("p0", "p1", "d0")
    made.routed("p1", "a", 70, 7)
    assert [(w.id, w.pending_tokens, w.num_waiting) for w in made.view(lambda size: [])] == [("d0", 0, 0), ("p0", 0, 0), ("p1", 70, 1)]
    assert [(w.id, w.pending_tokens) for w in made.view(lambda size: [], exclude=["p0"])] == [("d0", 0), ("p1", 70)]
    made.silent(p1)
    assert [w.id for w in made.view(lambda size: [])] == ["d0", "p0"]
    say(made, p1, 1)
    made.is_member(d0, None)
    assert [w.id for w in made.view(lambda size: [])] == ["p0", "p1"]
    made.is_member(d0, d0.member)
    made.update(p0, StateUpdate(sequence=2, state=MemberState.DRAINING, load=Load()))
    assert [w.id for w in made.view(lambda size: [])] == ["d0", "p1"]


def test_what_is_laid_out_without_some_is_kept_until_somebody_comes_or_goes() -> None:
    made, (p0, _, _) = fleet("p0", "p1", "d0")
    without = made.view(lambda size: [], exclude=["p1"])
    say(made, p0, 1, num_waiting_tokens=7)
    again = made.view(lambda size: [], exclude=["p1"])
    assert again.layout is without.layout
    assert [(w.id, w.pending_tokens) for w in again] == [("d0", 0), ("p0", 7)]
    made.silent(p0)
    assert [w.id for w in made.view(lambda size: [], exclude=["p1"])] == ["d0"]
    alone = made.view(lambda size: HASHES, exclude=["p1"]).alone()
    assert [(w.id, w.role) for w in alone] == [("d0", Role.UNIFIED)]
    assert made.view(lambda size: [], exclude=["p1"]).alone().layout is alone.layout
    assert [w.role for w in made.view(lambda size: [])] == [Role.DECODE, Role.PREFILL]
    for number in range(20):
        made.view(lambda size: [], exclude=[f"x{number}"])
    assert len(made._layout._parts) <= 8


def test_a_version_is_laid_out_once_and_the_only_one_is_all() -> None:
    made, _ = fleet("p0", "d0")
    whole = made.view(lambda size: [])
    assert whole.version("f") is whole
    say(made, made.add(Member(id="u0", role=Role.UNIFIED, address="", fingerprint="g", block_size=10)), 0, num_waiting_tokens=7)
    parts = [made.view(lambda size: []).version(fingerprint) for fingerprint in ("f", "g", "f", "none")]
    assert [[(w.id, w.pending_tokens) for w in part] for part in parts] == [[("d0", 0), ("p0", 0)], [("u0", 7)], [("d0", 0), ("p0", 0)], []]
    assert parts[0].layout is parts[2].layout
    without = [made.view(lambda size: [], exclude=["p0"]).version("f") for _ in range(2)]
    assert [w.id for w in without[0]] == ["d0"]
    assert without[0].layout is without[1].layout


def test_columns_of_rows_and_rows_of_columns_are_the_same() -> None:
    rows = [
        worker(
            "a",
            Role.UNIFIED,
            num_requests=3,
            num_waiting=2,
            kv_used=0.25,
            matched_tokens=40,
            expected_tokens=50,
            reachable_tokens=60,
            fetch_s=0.5,
        )
    ]
    assert list(View.of(rows)) == rows


def test_a_worker_is_at_its_step_since_it_told_of_another_or_got_something_to_do() -> None:
    now = [10.0]
    made = Fleet(lambda: now[0])
    p0 = made.add(Member(id="p0", role=Role.PREFILL, address="", fingerprint="f", block_size=10))
    say(made, p0, 0)

    def computing_s() -> float:
        return made.view(lambda size: HASHES).worker("p0").computing_s

    now[0] = 13.0
    made.routed("p0", "first", 1000, 500_000)
    now[0] = 14.0
    made.routed("p0", "second", 1000, 500_000)  # waits for the first
    assert computing_s() == pytest.approx(1.0)
    say(made, p0, 1, num_waiting_tokens=1000, num_waiting=1)  # in that step
    now[0] = 14.5
    assert computing_s() == pytest.approx(1.5)
    say(made, p0, 2, num_waiting_tokens=1000, num_waiting=1, num_steps=1)
    now[0] = 15.0
    assert computing_s() == pytest.approx(0.5)
    made.unrouted("p0", "first")
    made.unrouted("p0", "second")
    say(made, p0, 3, num_steps=2)
    now[0] = 16.0
    say(made, p0, 4, num_waiting_tokens=10, num_waiting=1, num_steps=2)  # from another router
    now[0] = 16.25
    assert computing_s() == pytest.approx(0.25)


# -- tiers


def fetching(**seconds: float) -> tuple[tuple[Tier, float], ...]:
    return tuple((Tier(name), each) for name, each in seconds.items())


def test_what_a_worker_can_fetch_leads_on_from_what_it_holds() -> None:
    made, (p0, p1, d0) = fleet("p0", "p1", "d0")
    say(made, p0, 1, BlocksStored(tuple(HASHES[:30])), fetch_token_s=fetching(host=0.01, files=0.1, pool=1.0))
    say(made, p0, 2, BlocksStored(tuple(HASHES[20:50]), Tier.HOST), fetch_token_s=p0.load.fetch_token_s)
    say(made, p0, 3, BlocksStored(tuple(HASHES[50:60]), Tier.FILES), fetch_token_s=p0.load.fetch_token_s)
    say(made, p0, 4, BlocksStored(tuple(HASHES[55:80]), Tier.POOL), fetch_token_s=p0.load.fetch_token_s)
    say(made, p1, 1, BlocksStored(tuple(HASHES[:55]), Tier.HOST), fetch_token_s=fetching(host=0.0, pool=0.5))
    say(made, d0, 1, BlocksStored(tuple(HASHES[:55]), Tier.POOL))  # it has told of a pool, but has none now

    view = made.view(lambda size: HASHES)
    assert view.layout.ids == ("d0", "p0", "p1")
    assert view.matched_tokens.tolist() == view.expected_tokens.tolist() == [0, 300, 0]
    assert view.reachable_tokens.tolist() == [0, 800, 800]
    assert view.fetch_s.tolist() == pytest.approx([0, 200 * 0.01 + 100 * 0.1 + 200 * 1.0, 250 * 0.5])

    say(made, p1, 2, BlocksRemoved((HASHES[70],), Tier.POOL), fetch_token_s=p1.load.fetch_token_s)
    assert made.view(lambda size: HASHES).reachable_tokens.tolist() == [0, 700, 700]
    say(made, p0, 5, BlocksRemoved((HASHES[35],), Tier.HOST), fetch_token_s=fetching(host=0.01, files=0.1))  # its pool is away
    assert made.view(lambda size: HASHES).reachable_tokens.tolist() == [0, 350, 700]
    assert made.view(lambda size: HASHES, exclude=["p1"]).reachable_tokens.tolist() == [0, 350]
    made.remove(p0)
    made.remove(p1)
    assert made.view(lambda size: HASHES).reachable_tokens.tolist() == [0]


def test_the_pool_of_another_fingerprint_or_degree_is_another_one() -> None:
    made = Fleet()
    for name, degree, fingerprint in (("a", 1, "f"), ("b", 2, "f"), ("c", 1, "g"), ("d", 1, "f")):
        each = made.add(Member(id=name, role=Role.UNIFIED, address="", fingerprint=fingerprint, block_size=10, tensor_parallel_size=degree))
        events = (BlocksStored(tuple(HASHES[:9]), Tier.POOL),) if name == "a" else ()
        say(made, each, 0, *events, fetch_token_s=fetching(pool=0.0))
    assert made.view(lambda size: HASHES).reachable_tokens.tolist() == [90, 0, 0, 90]


def test_what_is_known_of_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.index.MOST_POOL_BLOCKS", 20)
    index = PrefixIndex()
    index.reads("w", ("f", 1))
    index.apply("w", [BlocksStored(tuple(HASHES[:15]), Tier.POOL), BlocksStored(tuple(HASHES[:5]), Tier.POOL)])
    index.apply("w", [BlocksStored(tuple(HASHES[15:25]), Tier.POOL)])  # the first of the first ones go
    assert index.reaches(HASHES[10:], index.places(["w"]))[-1] == [15]
    assert index.reaches(HASHES[:7], index.places(["w"]))[-1] == [5]


@pytest.mark.parametrize(("fetch_s", "chosen"), [(0.1, "p0"), (0.4, "p1"), (5.0, "p1")])
def test_predicted_counts_what_is_fetched_at_the_seconds_of_fetching_it(fetch_s: float, chosen: str) -> None:
    """p0 can fetch 800 of 1,000 tokens, which takes 0.8 s to compute; p1 has 500 on its device."""
    workers = [
        worker("p0", Role.PREFILL, reachable_tokens=800, fetch_s=fetch_s),
        worker("p1", Role.PREFILL, matched_tokens=500),
        worker("d0", Role.DECODE),
    ]
    assert placed("predicted", workers, num_output_tokens=10, local_prefill=False).prefills[0] == chosen


def test_fetching_goes_on_beside_what_is_queued() -> None:
    """Behind 600 tokens, it costs what it takes longer than those."""
    workers = [worker("p0", Role.PREFILL, reachable_tokens=800, fetch_s=0.5, pending_tokens=600), worker("d0", Role.DECODE)]
    then = placed("predicted", workers, num_output_tokens=10, local_prefill=False).ttft_s
    cached = [worker("p0", Role.PREFILL, matched_tokens=800, pending_tokens=600), workers[1]]
    assert then == placed("predicted", cached, num_output_tokens=10, local_prefill=False).ttft_s
