"""Policies of other routers, from what they publish, on the same view of the workers: to compare with, in simulation and in the field.

Each is its own formula; what it would learn in its own way (a tree of its own, counts of its own) it gets from the view, which is exact.
All choose the entrance and the prefill worker apart. Published default settings are used.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from baton.errors import Overloaded
from services.router.policy import Facts, Placement, cheapest, place, ranking
from services.router.view import Column, Rows, View, WorkerView

_MATCH_THRESHOLD, _ABS_THRESHOLD, _REL_THRESHOLD = 0.3, 64, 1.5  # of cache_aware
_QUEUE_WEIGHT, _KV_WEIGHT, _PREFIX_WEIGHT = 2.0, 2.0, 3.0  # of llm_d
_BALANCING_THRESHOLD = 2.0  # of mooncake, which leaves it to its operators


def at_random(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """Any; which one depends on the request's turn alone."""
    view = View.of(workers)
    draw = random.Random(facts.turn)
    return cheapest(facts, view, np.array([draw.random() for _ in range(len(view))]), lambda row: "drawn")


def cache_aware(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """SGLang's `cache_aware` (sgl-model-gateway, src/policies/cache_aware.rs and its README; thresholds of its Python launcher). Where the
    numbers of requests are out of balance, max − min > 64 and max > 1.5 min, the fewest requests; else who has the longest prefix, if that
    is more than 0.3 of the prompt; else the fewest requests. Prefixes are those that were sent there, as in its tree."""
    view = View.of(workers)
    share = view.expected_tokens / facts.num_prompt_tokens

    def cost(rows: Rows) -> Column:
        load, found = view.num_requests, np.full(len(view), np.inf)
        most, least = load[rows].max(), load[rows].min()
        unbalanced = most - least > _ABS_THRESHOLD and most > _REL_THRESHOLD * least
        longest = 0.0 if unbalanced else share[rows].max()
        by_prefix = longest > _MATCH_THRESHOLD
        found[rows] = load[rows] + (1e9 * (share[rows] < longest) if by_prefix else 0.0)
        return found

    return _apart(facts, view, cost, lambda row: f"{share[row]:.0%} of the prompt there, {view.num_requests[row]:.0f} requests")


def dynamo(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """Dynamo's KV router (its docs, components/router: cost function). cost = prefill blocks + decode blocks, the fewest; prefill blocks
    are those to compute there, this prompt's without its overlap; decode blocks those of running requests and this one's. Weight 1,
    temperature 0. Decode workers are chosen with an overlap of 0 and no prefill blocks, as it does in disaggregated mode."""
    view = View.of(workers)
    size = view.layout.block_size
    prompt = np.ceil(facts.num_prompt_tokens / size)
    to_compute = np.maximum(view.pending_tokens / size + prompt - np.floor(view.matched_tokens / size), 0.0)
    cost = np.where(view.layout.is_decode, 0.0, to_compute) + view.context_tokens / size + prompt
    return cheapest(facts, view, cost, lambda row: f"costs {cost[row]:.0f} blocks")


def llm_d(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """llm-d's scheduler (llm-d-router, README of its scorer plugins): the highest sum of 2 × queue, 2 × free KV and 3 × prefix scores;
    queue (max − own) / (max − min) of waiting requests, free KV 1 − used, prefix the share of the prompt that is cached there, exactly."""
    view = View.of(workers)
    prefix = view.matched_tokens / facts.num_prompt_tokens

    def cost(rows: Rows) -> Column:
        waiting, found = view.num_waiting[rows], np.full(len(view), np.inf)
        spread = waiting.max() - waiting.min()
        queue = (waiting.max() - waiting) / spread if spread else np.ones(len(rows))
        found[rows] = -(_QUEUE_WEIGHT * queue + _KV_WEIGHT * (1 - view.kv_used[rows]) + _PREFIX_WEIGHT * prefix[rows])
        return found

    return _apart(facts, view, cost, lambda row: f"{prefix[row]:.0%} of the prompt there, {view.num_waiting[row]:.0f} waiting")


def mooncake(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """Mooncake's Algorithm 1 (FAST'25, section 6): the prefill worker with the least T_transfer + T_queue + T_prefill; where the best
    prefix of all is more than so many times a worker's own, it would be brought there first. Of the decode workers the one with the
    shortest step. Refuses (Overloaded) where what was promised cannot be kept.

    The transfer is the KV pool's: where the facts name no rate for it, nothing can be brought, and each worker has its own prefix alone.
    Times are the workers' own paces, in place of its offline fit."""
    view = View.of(workers)
    pace, prompt = view.pace, facts.num_prompt_tokens
    computing = ~view.layout.is_decode
    own = np.minimum(view.matched_tokens, prompt - 1)
    best = float(own[computing].max(initial=0.0))
    brought = own * _BALANCING_THRESHOLD < best if facts.fetch_token_s is not None else np.zeros(len(view), dtype=bool)
    prefix = np.where(brought, best, own)
    transfer = (prefix - own) * (facts.fetch_token_s or 0.0)
    queue = pace.token_s * view.pending_tokens + pace.pair_s * view.pending_pairs
    ttft = transfer + queue + pace.prompt_s(prompt - prefix, prefix)
    itl = pace.base_s + pace.decode_s(view.num_requests + 1, view.context_tokens + prompt)
    entrances = view.entrances()
    cost = np.where(view.layout.is_decode, itl, ttft)
    entrance = int(entrances[cost[entrances].argmin()])
    ranked = ranking(view.layout.fitting(entrance), cost)
    computes = ranked[0] if ranked else entrance
    for seconds, promised in ((ttft[computes], facts.ttft_slo_s), (itl[entrance], facts.itl_slo_s)):
        if promised is not None and seconds > promised:
            raise Overloaded(f"{seconds:.3f} s are expected where {promised:g} s were promised; try again later, or add workers")
    expected = f"{ttft[computes]:.3f} s until the prompt is computed"
    if not ttft[computes]:
        return place(facts, view, entrance, ranked, expected)
    seconds = {"ttft_s": float(ttft[computes]), "waits_s": float(queue[computes]), "itl_s": float(itl[entrance]) or None}
    return place(facts, view, entrance, ranked, expected, **seconds)


def _apart(facts: Facts, view: View, cost: Callable[[Rows], Column], why: Callable[[int], str]) -> Placement:
    """The cheapest entrance, then the cheapest prefill worker, each among its own kind."""
    entrances = view.entrances()
    found = cost(entrances)
    entrance = int(entrances[found[entrances].argmin()])
    fitting = view.layout.fitting(entrance)
    ranked = ranking(fitting, cost(fitting)) if len(fitting) else []
    return place(facts, view, entrance, ranked, why(ranked[0] if ranked else entrance))
