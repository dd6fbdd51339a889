"""The policy `predicted` computed in full: each formula for each worker, and the costs of all pairs. What it is to choose."""

from collections.abc import Sequence

import numpy as np

from baton.errors import Overloaded
from services.router.policy import Facts, Placement, place
from services.router.predicted import _queued, _waits  # not what is computed sparingly
from services.router.view import LEARNED, Column, Paces, Rows, View, WorkerView

_NOBODY_KNOWS = 1e-4

Option = tuple[float, bool, int, float]  # cost, whether D computes the prompt, D's row, seconds to the first token


def predicted_in_full(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    view = View.of(workers)
    view.entrances()  # there is one
    known, pace = _complete(view)
    ttft, harm, cached = _prompts(facts, view, pace)
    (step, decoding), current = _decode(facts, view, pace), _step(view, pace)
    room = _room(facts, view, step)
    ttft, handing_over = ttft + room, current + room
    soonest = ttft - _passed(view, current)
    limit = (known and facts.ttft_slo_s) or np.inf
    if known:
        harm, decoding = _within(limit, soonest, harm), _within(facts.itl_slo_s or np.inf, step, decoding)
    costs = ttft + harm + decoding
    if known and facts.itl_slo_s:
        costs = np.where(view.layout.is_decode, _within(facts.itl_slo_s, _habitual(facts, view, pace, step), costs), costs)
    options: list[Option] = []
    for pool in view.layout.pools:
        decodes, fitting = pool.decodes, pool.prefills
        if len(decodes):
            pair = _best_pair(facts, view, decodes, fitting, ttft, soonest, harm, decoding, handing_over, pace, limit)
            late = pair[0] == np.inf and facts.local_prefill
            alone = decodes if late else _who_may_compute(facts, view, decodes, fitting)
            options += [pair, *_best_alone(alone, soonest, costs)]
    options += _best_alone(view.layout.unified, soonest, costs)
    cost, here, decode, first = min(options)
    if cost == np.inf:
        promised = [f"{s:g} s {what}" for s, what in ((facts.ttft_slo_s, "to the first token"), (facts.itl_slo_s, "between tokens")) if s]
        raise Overloaded(f"no worker is expected to keep what was promised, {' and '.join(promised)}: try again later, or add workers")
    ranked: list[int] = []
    if not here:
        fitting = view.layout.fitting(decode)
        to_push = facts.num_prompt_tokens - view.matched_tokens[decode]
        pushed = to_push * pace.push_token_s
        ready = np.maximum(soonest, pushed) + handing_over[decode]
        costs = _within(limit, ready, np.maximum(ttft, pushed) + harm)
        ranked = fitting[costs[fitting].argsort(kind="stable")[:8]].tolist()
    cached = float(cached[ranked[0] if ranked else decode])
    if not known:
        return place(facts, view, decode, ranked, "nothing learned yet", cached)
    waits = _waits(view, pace, ranked[0] if ranked else decode)
    seconds = {"ttft_s": first, "waits_s": waits, "itl_s": float(step[decode]), "cost_s": cost}
    return place(facts, view, decode, ranked, f"{first:.3f} s until the prompt is computed", cached, **seconds)


def _best_pair(
    facts: Facts,
    view: View,
    decodes: Rows,
    fitting: Rows,
    ttft: Column,
    soonest: Column,
    harm: Column,
    decoding: Column,
    handing_over: Column,
    pace: Paces,
    limit: float,
) -> Option:
    pushed = (facts.num_prompt_tokens - view.matched_tokens[decodes, None]) * pace.push_token_s[fitting]
    first = np.maximum(soonest[fitting], pushed) + handing_over[decodes, None]
    whole = np.maximum(ttft[fitting], pushed) + handing_over[decodes, None]
    costs = _within(limit, first, whole + harm[fitting] + decoding[decodes, None])
    d, p = divmod(int(costs.argmin()), len(fitting))
    return float(costs[d, p]), False, int(decodes[d]), float(first[d, p])


def _within(limit: float, seconds: Column, costs: Column) -> Column:
    """The costs, of those that are late infinite."""
    return costs if limit == np.inf else np.where(seconds > limit, np.inf, costs)


def _best_alone(rows: Rows, soonest: Column, costs: Column) -> list[Option]:
    if not len(rows):
        return []
    row = int(rows[costs[rows].argmin()])
    return [(float(costs[row]), True, row, float(soonest[row]))]


def _who_may_compute(facts: Facts, view: View, decodes: Rows, fitting: Rows) -> Rows:
    """Those for whom no prefill worker is idle that has as much of the prompt; one on their own cores is none, if they have work there."""
    if not facts.local_prefill:
        return decodes[:0]
    idle = fitting[view.pending_tokens[fitting] == 0]
    if not len(idle):
        return decodes
    matched, devices = view.matched_tokens, view.layout.device
    most = np.full(len(decodes), matched[idle].max())
    apart = most.copy()
    for place_, row in enumerate(decodes) if view.layout.has_mates else ():
        apart[place_] = matched[idle[devices[idle] != devices[row]]].max(initial=-1.0)
    own = matched[decodes]
    return decodes[(own > apart) & ((own > most) | (view.num_requests[decodes] > 0))]


def _step(view: View, pace: Paces) -> Column:
    """Seconds of the step that each is in; none for who has nothing to compute."""
    rows, pending = view.num_requests - view.num_waiting, view.pending_tokens
    some = np.maximum(pending, 1.0)
    prompts = np.minimum(1.0, np.where(view.batched_tokens > 0, view.batched_tokens, some) / some) * _queued(view, pace)
    busy = (rows > 0) | (pending > 0)
    return np.where(busy, (pace.base_s + pace.decode_s(rows, view.context_tokens) + prompts) * (1 + pace.crowded), 0.0)


def _passed(view: View, step: Column) -> Column:
    """Seconds of the step with a prompt that a prefill or unified worker is in that have passed, of which its load does not know. They are
    told and promised; in the cost the step counts as a whole, as one who is busy now is likely to be busy again."""
    decode = np.where(view.layout.is_prefill, 0.0, view.num_requests - view.num_waiting)  # tokens that are no prompt's
    prompts = (view.pending_tokens > decode) & ~view.layout.is_decode
    return np.where(prompts, np.minimum(view.computing_s, step), 0.0)


def _prompts(facts: Facts, view: View, pace: Paces) -> tuple[Column, Column, Column]:
    """Seconds until the prompt is computed there, and those that others lose by it; and its tokens that need no computing."""
    work, own, cached = _prompt(facts, view, pace)
    layout, ttft = view.layout, work * (1 + pace.crowded)
    delayed = np.where(layout.is_prefill, view.num_waiting, view.num_requests - view.num_held + layout.is_decode)
    if layout.has_mates:
        # Seconds for which each keeps its device busy; no end is seen to decoding.
        busy = np.where(layout.is_prefill | (view.num_requests == 0), _queued(view, pace), np.inf)
        beside = np.minimum(work[:, None], np.append(busy, 0.0)[layout.mates]).sum(axis=1)
        ttft = np.maximum(work + beside, ttft)
        delayed = np.bincount(layout.device, weights=delayed)[layout.device]
    harm = own * delayed
    for pool in (each.prefills for each in layout.pools):
        if not layout.shares[pool].any():  # else a decode worker takes its seconds from them as well
            there = float(view.num_requests[pool].mean())
            harm[pool] += own[pool].min() * there * (1 + there)
    return ttft, harm, cached


def _prompt(facts: Facts, view: View, pace: Paces) -> tuple[Column, Column, Column]:
    """Seconds of its device until it has computed the prompt, and those of them that the prompt itself takes; with or without fetching
    what it has not, whichever is faster. It fetches beside what is queued. And the tokens that it has then."""
    if not (view.reachable_tokens > view.expected_tokens).any():
        return *_computing(facts, view, pace, view.expected_tokens), view.expected_tokens
    seconds, owns = _computing(facts, view, pace, np.stack((view.expected_tokens, view.reachable_tokens)))
    columns: tuple[Column, ...] = (*seconds, *owns)
    work, then, own, less = columns
    then = np.maximum(then - less, view.fetch_s) + less
    sooner = then < work
    return np.where(sooner, then, work), np.where(sooner, less, own), np.where(sooner, view.reachable_tokens, view.expected_tokens)


def _computing(facts: Facts, view: View, pace: Paces, cached: Column) -> tuple[Column, Column]:
    """The same, with so many tokens of the prompt cached. `cached` may be several such columns."""
    matched = np.minimum(cached, facts.num_prompt_tokens - 1)  # the last token is always computed
    missing = facts.num_prompt_tokens - matched
    work = view.pending_tokens + missing
    at_most = np.where(view.batched_tokens > 0, view.batched_tokens, work)
    steps = np.ceil(work / at_most)
    rows = np.where(view.layout.is_prefill, 0.0, view.num_requests - view.num_waiting)
    beside = steps * (pace.base_s + np.where(rows > 0, pace.decode_s(rows, view.context_tokens), 0.0))
    own = pace.prompt_s(missing, matched)
    steps_s = np.where(rows > 0, 0.0, pace.base_s * missing / at_most)  # who decodes makes the steps anyway
    return beside + _queued(view, pace) + own, own + steps_s


def _decode(facts: Facts, view: View, pace: Paces) -> tuple[Column, Column]:
    """Seconds of a step with it; of its output tokens, and those that they cost the others there."""
    added = pace.decode_s(1, facts.num_prompt_tokens + facts.num_output_tokens / 2)
    step = pace.base_s + pace.decode_s(view.num_requests, view.context_tokens) + added
    slower = 1 + pace.crowded
    return step * slower, facts.num_output_tokens * (step + added * view.num_requests) * slower


def _room(facts: Facts, view: View, step: Column) -> Column:
    """Seconds until a decode worker has blocks for it and for those that wait there, which are taken to be like it; what is held and not
    computed yet is reserved for them. In the time of one request's tokens all that are held become free once."""
    held, each = view.kv_used * view.kv_tokens, facts.num_prompt_tokens + facts.num_output_tokens
    waiting = np.maximum(view.num_waiting * each - np.maximum(held - view.context_tokens, 0.0), 0.0)
    lacking = each + waiting - view.matched_tokens - (view.kv_tokens - held)
    lacking = np.where((view.kv_tokens > 0) & ~view.layout.is_prefill, np.maximum(lacking, 0.0), 0.0)
    return lacking / np.maximum(held, 1.0) * facts.num_output_tokens * step


def _habitual(facts: Facts, view: View, pace: Paces, step: Column) -> Column:
    """Seconds between tokens where each request that decodes there comes with a prompt like this one and those that wait there: while one
    gets its tokens, all the others end, and as many come."""
    waiting = np.maximum(view.pending_tokens - (view.num_requests - view.num_waiting), 0.0) * pace.token_s
    prompts = (waiting + _prompt(facts, view, pace)[1]) * (1 + view.num_requests)
    return step + prompts / max(facts.num_output_tokens, 1.0)


def _complete(view: View) -> tuple[bool, Paces]:
    """Whether anybody knows what a prompt takes; and each worker's pace, with what it has not met yet from the others. By the clock, except
    where workers share a device: what they take from each other depends on what they have to do."""
    pace, learned = view.pace, view.paces[:LEARNED]
    slower = np.where(view.layout.shares, 1.0, 1 + pace.crowded)
    known, filled = bool(pace.token_s.any()), learned * slower
    if not learned.all():
        met = learned > 0
        met[2], met[3:] = met[1], met[3] | met[4]  # a prompt's pairs with its tokens; what decodes with either
        for column, some, otherwise in zip(filled, met, (0.0, _NOBODY_KNOWS, 0.0, 0.0, 0.0), strict=True):
            column[~some] = column[some].mean() if some.any() else otherwise
    base, token, pair, row, context = filled
    crowded = np.where(view.layout.shares, pace.crowded, 0.0)
    return known, Paces(base, token, pair, row, context, pace.push_token_s, crowded)
