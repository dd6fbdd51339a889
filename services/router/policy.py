"""Policies: pure functions of (facts of a request, view of the workers) → Placement. They decide; nothing else does.

A placement pairs a decode worker with ranked prefill workers of the same KV fingerprint; unified workers need none. Draining and lost
workers are not in the view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from baton.types import Role
from services.router.view import Column, Rows, View, WorkerView

_DECODE_STEP_TOKENS = 16.0  # what a running request costs a decode worker, in tokens of prompt
_MAX_PREFILLS = 8  # that a decode worker is told of


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    num_prompt_tokens: int
    turn: int  # counts requests, for round robin
    num_output_tokens: float = 0.0  # expected
    local_prefill: bool = True  # a decode worker may be told to compute a whole prompt itself
    fetch_token_s: float | None = None  # of a token's KV from the pool; None: not known
    ttft_slo_s: float | None = None  # what the request was promised, for policies that refuse
    itl_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    decode: str
    prefills: tuple[str, ...]  # best first; none: `decode` computes the prompt itself
    missing_tokens: int  # of the prompt, where it is computed, when that is done which was sent there before, and fetched what is to be
    reason: str  # for people
    ttft_s: float | None = None  # predicted
    beside_s: float | None = None  # of that: what no worker announces; the router's to add (`Placer.told`)
    waits_s: float | None = None  # predicted: until that prompt's computing begins, where it is computed
    itl_s: float | None = None  # predicted: a step of `decode` with it
    cost_s: float | None = None  # seconds that it adds to anybody's waiting, where the policy counts in those


Policy = Callable[[Facts, Sequence[WorkerView]], Placement]


def place(
    facts: Facts, view: View, entrance: int, ranked: Sequence[int], reason: str, cached: float | None = None, /, **seconds: float | None
) -> Placement:
    """The placement at these rows; `ranked` prefill workers, best first, or none. `cached`: tokens of the prompt that need no
    computing, where that is not what is expected to be held. `seconds`: what a `Placement` has of them."""
    computes = ranked[0] if len(ranked) else entrance
    cached = float(view.expected_tokens[computes]) if cached is None else cached
    return Placement(
        decode=view.layout.ids[entrance],
        prefills=tuple(map(view.layout.ids.__getitem__, ranked[:_MAX_PREFILLS])),
        missing_tokens=facts.num_prompt_tokens - int(cached),
        reason=reason,
        **seconds,
    )


def cheapest(facts: Facts, view: View, cost: Column, why: Callable[[int], str]) -> Placement:
    """The cheapest entrance, then the prefill workers that fit it, cheapest first. Ties go to the lower id."""
    entrances = view.entrances()
    entrance = int(entrances[cost[entrances].argmin()])
    ranked = ranking(view.layout.fitting(entrance), cost)
    return place(facts, view, entrance, ranked, why(ranked[0] if ranked else entrance))


def ranking(rows: Rows, cost: Column) -> list[int]:
    return rows[first(cost[rows])].tolist()


def first(cost: Column) -> Rows:
    """Where the cheapest are, of equals the first, as many as a decode worker is told of."""
    if len(cost) <= _MAX_PREFILLS:
        return cost.argsort(kind="stable")
    some = (cost <= np.partition(cost, _MAX_PREFILLS - 1)[_MAX_PREFILLS - 1]).nonzero()[0]
    return some[cost[some].argsort(kind="stable")[:_MAX_PREFILLS]]


def round_robin(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """Each in turn, by id."""
    view = View.of(workers)
    cost = np.empty(len(view))
    for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED):
        rows = np.array([each is role for each in view.layout.roles], dtype=bool)
        count = np.count_nonzero(rows)
        cost[rows] = (np.arange(count) - facts.turn) % max(count, 1)
    return cheapest(facts, view, cost, lambda row: "its turn")


def least_load(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """The fewest uncomputed tokens and running requests."""
    view = View.of(workers)
    return cheapest(facts, view, _load(view), lambda row: f"least load: {view.pending_tokens[row]:.0f} tokens pending")


def prefix_aware(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """The fewest tokens to wait for: those that must be computed for this prompt, and those queued before it."""
    view = View.of(workers)
    matched, pending = view.matched_tokens, view.pending_tokens
    cost = facts.num_prompt_tokens - matched + _load(view)
    return cheapest(
        facts, view, cost, lambda row: f"{matched[row]:.0f} of {facts.num_prompt_tokens} tokens cached there, {pending[row]:.0f} pending"
    )


def _load(view: View) -> Column:
    return view.pending_tokens + _DECODE_STEP_TOKENS * view.num_requests
