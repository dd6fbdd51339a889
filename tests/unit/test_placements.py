"""Placements of `predicted` and the simple policies, on cases that were worked out by hand."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import NoWorkers
from baton.types import (
    Pace,
    Role,
)
from services.router.policies import POLICIES
from services.router.policy import Facts, WorkerView
from services.router.predicted import predicted


def worker(name: str, role: Role, **changes: Any) -> WorkerView:
    fields = {"fingerprint": "f", "block_size": 16, "num_requests": 0, "pending_tokens": 0, "matched_tokens": 0}
    return WorkerView(id=name, role=role, **{**fields, **changes})


def place(policy: str, workers: list[WorkerView], turn: int = 0, prompt: int = 1000) -> tuple[str, tuple[str, ...]]:
    placement = POLICIES[policy](Facts(num_prompt_tokens=prompt, turn=turn), workers)
    assert placement.reason
    return placement.decode, placement.prefills


def test_round_robin_takes_turns() -> None:
    workers = [worker("p1", Role.PREFILL), worker("p0", Role.PREFILL), *(worker(f"d{i}", Role.DECODE) for i in range(3))]
    chosen = [place("round_robin", workers, turn) for turn in range(6)]
    assert [decode for decode, _ in chosen] == ["d0", "d1", "d2"] * 2
    assert [prefills[0] for _, prefills in chosen] == ["p0", "p1"] * 3


def test_least_load_goes_to_the_idle_pair() -> None:
    workers = [
        worker("p0", Role.PREFILL, pending_tokens=500),
        worker("p1", Role.PREFILL),
        worker("d0", Role.DECODE, num_requests=9),
        worker("d1", Role.DECODE, num_requests=1),
    ]
    assert place("least_load", workers) == ("d1", ("p1", "p0"))


def test_prefix_aware_weighs_cached_tokens_against_queued_ones() -> None:
    def workers(pending: int) -> list[WorkerView]:
        return [
            worker("p0", Role.PREFILL, matched_tokens=800, pending_tokens=pending),
            worker("p1", Role.PREFILL),
            worker("d0", Role.DECODE),
        ]

    assert place("prefix_aware", workers(700))[1] == ("p0", "p1")
    assert place("prefix_aware", workers(900))[1] == ("p1", "p0")


@pytest.mark.parametrize("policy", POLICIES)
def test_only_equal_fingerprints_are_paired(policy: str) -> None:
    old = [worker("p0", Role.PREFILL, fingerprint="old"), worker("d0", Role.DECODE, fingerprint="old")]
    new = [worker("p1", Role.PREFILL, fingerprint="new"), worker("d1", Role.DECODE, fingerprint="new")]
    for turn in range(4):
        decode, prefills = place(policy, [*old, *new], turn)
        assert prefills == (("p0",) if decode == "d0" else ("p1",))
    with pytest.raises(NoWorkers, match="no prefill worker has the KV fingerprint"):
        place(policy, [old[0], new[1]])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_set_of_workers_gives_a_placement_or_a_reason(policy: str) -> None:
    everyone = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE), worker("u0", Role.UNIFIED)]
    for size in range(4):
        for workers in itertools.combinations(everyone, size):
            names = {w.id for w in workers}
            if names >= {"p0", "d0"} or "u0" in names:
                decode, prefills = place(policy, list(workers))
                assert (decode, prefills) in {("u0", ()), ("d0", ("p0",)), ("d0", ())}
            else:
                with pytest.raises(NoWorkers, match="is ready; start one"):
                    place(policy, list(workers))


PACE = Pace(base_s=0.01, token_s=0.001, row_s=0.0005)


def placed(workers: list[WorkerView], *, prompt: int = 1000, output: int = 50, local: bool = True) -> tuple[str, tuple[str, ...]]:
    facts = Facts(num_prompt_tokens=prompt, turn=0, num_output_tokens=output, local_prefill=local)
    placement = predicted(facts, workers)
    return placement.decode, placement.prefills


def one_and_one(queued: int, running: int, *, pace: Pace = PACE, prompt: int = 1000) -> list[WorkerView]:
    """A prefill worker with `queued` prompts, a decode worker with `running` requests."""
    return [
        worker("p0", Role.PREFILL, num_requests=queued, num_waiting=queued, pending_tokens=queued * prompt, pace=pace),
        worker("d0", Role.DECODE, num_requests=running, context_tokens=running * prompt, pace=pace),
    ]


def test_a_decode_worker_computes_prompts_where_that_costs_everybody_less() -> None:
    assert placed(one_and_one(0, 0)) == ("d0", ("p0",))  # a tie
    assert placed(one_and_one(3, 1)) == ("d0", ())
    assert placed(one_and_one(3, 1), local=False) == ("d0", ("p0",))
    assert placed(one_and_one(3, 20)) == ("d0", ("p0",))  # it would hold up twenty
    p0, d0 = one_and_one(3, 20)
    assert placed([p0, replace(d0, num_waiting=19, num_held=19, context_tokens=1000)]) == ("d0", ())  # who wait for others are not held up


def on_one_device(views: list[WorkerView]) -> list[WorkerView]:
    return [replace(view, device="m/0,1") for view in views]


def test_on_cores_that_both_use_a_prompt_is_computed_where_it_is_done_first() -> None:
    """A prefill worker that takes the decode worker's cores holds up its requests as much as the decode worker itself would."""
    for queued, running in [(3, 20), (1, 20), (0, 20), (0, 1)]:
        apart = one_and_one(queued, running)
        assert placed(apart) == placed([replace(view, device=f"m{view.id}/0,1") for view in apart]) == ("d0", ("p0",))
        assert placed(on_one_device(apart)) == ("d0", ())
        assert placed(on_one_device(apart), local=False) == ("d0", ("p0",))
    p0, d0 = on_one_device(one_and_one(0, 0))
    assert placed([p0, d0]) == ("d0", ("p0",))  # nobody is held up
    full = replace(d0, num_requests=4, num_waiting=4, pending_tokens=4000, batched_tokens=512)
    assert placed([p0, full]) == ("d0", ("p0",))  # it has others to compute


def test_who_shares_cores_with_a_busy_worker_has_half_of_them() -> None:
    def ttft(views: list[WorkerView], local: bool) -> float:
        placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=local), views)
        assert placement.prefills == (() if local else ("p0",))
        assert placement.ttft_s is not None
        return placement.ttft_s

    work = 1000 * PACE.token_s + PACE.base_s
    assert ttft(on_one_device(one_and_one(0, 0)), local=False) == pytest.approx(work)
    step = PACE.base_s + PACE.decode_s(4, 4000)  # that a hand-over waits for
    assert ttft(on_one_device(one_and_one(0, 4)), local=False) == pytest.approx(2 * work + step)  # no end is seen to decoding
    p0, d0 = on_one_device(one_and_one(1, 4))
    beside = work + PACE.decode_s(4, 4000)
    assert ttft([p0, d0], local=True) == pytest.approx(beside + 1.0)  # until the prefill worker has done its own
    assert ttft([replace(p0, pending_tokens=5000), d0], local=True) == pytest.approx(2 * beside)


def test_a_worker_that_waits_for_its_cores_is_slower_by_the_clock() -> None:
    slow = replace(PACE, crowded=1.0)
    alone = predicted(Facts(num_prompt_tokens=1000, turn=0), [worker("u0", Role.UNIFIED, pace=slow)])
    assert alone.ttft_s == pytest.approx(2 * (1000 * PACE.token_s + PACE.base_s))
    pair = [worker("u0", Role.UNIFIED, pace=slow), worker("u1", Role.UNIFIED, pace=PACE, num_requests=1, num_waiting=1)]
    assert placed(pair)[0] == "u1"
    mates = on_one_device([worker("u0", Role.UNIFIED, pace=slow), worker("u1", Role.UNIFIED, pace=slow)])
    beside = predicted(Facts(num_prompt_tokens=1000, turn=0), mates)
    assert beside.ttft_s == pytest.approx(alone.ttft_s)  # the other is idle now, but was not lately


def test_seconds_not_tokens_decide() -> None:
    slow = replace(PACE, token_s=0.01)
    pair = [worker("p0", Role.PREFILL, pace=slow), worker("p1", Role.PREFILL, pending_tokens=3000, pace=PACE), worker("d0", Role.DECODE)]
    assert placed(pair, local=False) == ("d0", ("p1", "p0"))
    cached = replace(pair[0], matched_tokens=900)
    assert placed([cached, *pair[1:]], local=False) == ("d0", ("p0", "p1"))


def test_who_has_not_met_a_prompt_yet_is_taken_for_the_average() -> None:
    """A decode worker that only decoded so far is not thought to compute prompts in no time."""
    p0, d0 = one_and_one(0, 4)
    assert placed([p0, replace(d0, pace=Pace(base_s=0.01, row_s=0.0005))]) == ("d0", ("p0",))
    unknown = one_and_one(0, 0, pace=Pace())
    assert placed(unknown) == ("d0", ("p0",))
    assert predicted(Facts(num_prompt_tokens=10, turn=0), unknown).ttft_s is None


def test_the_time_to_the_first_token_is_predicted() -> None:
    views = one_and_one(2, 0)
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), [replace(v, batched_tokens=512) for v in views])
    assert placement.ttft_s == pytest.approx(3 * 1000 * PACE.token_s + 6 * PACE.base_s)
    slow_link = [replace(views[0], pace=replace(PACE, push_token_s=0.005)), views[1]]
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), slow_link)
    assert placement.ttft_s == pytest.approx(5.0)


def test_a_hand_over_waits_for_the_decode_workers_step() -> None:
    def ttft(d0: WorkerView) -> float:
        views = [worker("p0", Role.PREFILL, pace=PACE), replace(d0, batched_tokens=512, pace=PACE)]
        placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), views)
        assert placement.ttft_s is not None
        return placement.ttft_s - 1000 * PACE.token_s - PACE.base_s

    d0 = worker("d0", Role.DECODE)
    assert ttft(d0) == pytest.approx(0.0)
    decoding = replace(d0, num_requests=8)
    assert ttft(decoding) == pytest.approx(PACE.base_s + 8 * PACE.row_s)
    assert ttft(replace(decoding, pending_tokens=2048)) == pytest.approx(PACE.base_s + 8 * PACE.row_s + 512 * PACE.token_s)


def test_a_prompt_costs_others_its_steps_too_where_nobody_decodes_in_them() -> None:
    """Prefill workers whose steps are all alike cannot tell a step's base from its tokens: their sum is what counts."""
    views = {
        base: worker("p0", Role.PREFILL, num_waiting=4, batched_tokens=1000, pace=Pace(base_s=base, token_s=(1 - base) / 1000))
        for base in (0, 0.6)
    }
    for base, view in views.items():
        other = worker("p1", Role.PREFILL, num_waiting=4, batched_tokens=1000, pace=Pace(base_s=1e-6, token_s=0.0009))
        assert placed([view, other, worker("d0", Role.DECODE)], local=False)[1] == ("p1", "p0"), base


def test_a_slow_path_from_a_prefill_worker_counts_against_it() -> None:
    """And the one that is asked is the one whose time is told."""
    slow_path, busy = replace(PACE, push_token_s=0.02), {"num_requests": 2, "num_waiting": 2, "pending_tokens": 2000}
    views = [
        worker("p0", Role.PREFILL, pace=slow_path),
        worker("p1", Role.PREFILL, pace=PACE, **busy),
        worker("d0", Role.DECODE, pace=PACE),
    ]
    placement = predicted(Facts(num_prompt_tokens=1000, turn=0, local_prefill=False), views)
    assert placement.prefills == ("p1", "p0")
    assert placement.ttft_s == pytest.approx(3 * 1000 * PACE.token_s + PACE.base_s)


def test_decode_workers_fill_evenly() -> None:
    busy = worker("d0", Role.DECODE, num_requests=8, context_tokens=8000, pace=PACE)
    assert placed([worker("p0", Role.PREFILL, pace=PACE), busy, worker("d1", Role.DECODE, pace=PACE)]) == ("d1", ("p0",))
