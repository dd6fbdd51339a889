"""The policy `predicted`: the placement that adds the fewest seconds to anybody's waiting, this request's and the others'.

Of a pair (P, D), or of D alone, which computes the prompt itself:

    first token     what P has to compute before, and what it lacks of this prompt, or a push that is slower than that; and the step that D
                    is in, of which half passes before D asks P, and half before D takes what P has sent; before all that, until D has
                    blocks for it
  + its tokens      a step of D with it, times the tokens it is expected to get
  + harm            where the prompt is computed: its seconds, for each request there that it delays
                    where it decodes: what it adds to a step, for each request there, for as long

                    in a pool of prefill workers: what its seconds there cost those who will come, whichever of them they go to

Seconds come from the workers: each learns its own pace and announces it (`baton.runtime.pace`); for what one has not met yet the average of
the others is taken. At a prefill worker those that wait stand for those that will come while this one waits: as many, if the load lasts.
In its pool, with N requests a worker, a second more of work delays later ones by N (1 + N) seconds: of M/M/1's N = ρ / (1 - ρ),
dN/dρ = (1 + N)², less the 1 + N that the newcomer itself spends there. It is the same for all of the pool, so it decides only between them
and decode workers: the fuller they are, the sooner one of these computes a prompt. At a decode worker a prompt counts as if it delayed one
request more than there are: decoding is what it is kept free for. So nobody asks it while a prefill worker that has as much of the prompt
cached is idle.

Workers that compute on the same cores delay each other's requests like their own, and each other: who shares them with a busy one has half
of them. What a prompt costs the others is then the same wherever it is computed, and an idle prefill worker is no reason to spare a decode
worker that has something to do: decodes ride in its prompts' steps, but beside another's they read all weights in steps of their own.

Where a time to the first token, or between tokens, was promised, a placement that would break it is none; a request that has none is
refused at once, before it costs those that can be kept. A decode worker computes a prompt only if the time between tokens would be kept
there with such a prompt for each request that it decodes: what is done once is done again.

What a worker lacks of a prompt is what it will lack when it has computed all that was sent there before: a burst of siblings goes where the
first of them went, which computes what they share once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.errors import Overloaded
from services.router.policy import Facts, Placement, first, place
from services.router.view import LEARNED, Column, Paces, Pool, Rows, Table, View, WorkerView

_NOBODY_KNOWS = 1e-4  # of a prompt's token: what is cached and what is pending matters then, and no time is told
_CHUNK = 16  # decode workers that are looked at together


class _Asked(NamedTuple):
    """A request, and what it would be at each worker: in seconds, but for `cached`."""

    facts: Facts
    view: View
    limit: float  # to the first token, as promised; infinite: nothing was
    step: Column  # that it is in
    handing_over: Column  # that step, and until there is room
    ttft: Column  # until the prompt is computed there, when there is room
    soonest: Column  # the same, less what has passed of the step it is in; that only where there is a limit
    own: Column  # those of them that the prompt takes itself
    cached: Column  # tokens of the prompt that need no computing there
    harm: Column  # that others lose by its computing; infinite where it would be late
    with_it: Column  # a step with it
    decoding: Column  # its tokens, and those that they cost others; infinite where that would be slower than promised


class _Option(NamedTuple):
    cost: float
    here: bool  # whether the decode worker computes the prompt
    decode: int  # its row; no two options have the same above
    ttft_s: float
    ranked: Callable[[], list[int]]  # rows of prefill workers, best first


def predicted(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    view = View.of(workers)
    view.entrances()  # there is one
    known, pace = _complete(view)
    itl_s = (known and facts.itl_slo_s) or np.inf
    asked = _asked(facts, view, pace, (known and facts.ttft_slo_s) or np.inf, itl_s)
    options: list[_Option] = []
    for pool in view.layout.pools:
        if len(pool.decodes):
            options.append(_best_pair(asked, pool, pace.push_token_s))
            late = options[-1].cost == np.inf
            alone = pool.decodes if late and facts.local_prefill else _who_may_compute(facts, view, pool)
            options += _best_alone(asked, alone, None if itl_s == np.inf else _habitual(asked, pace) > itl_s)
    options += _best_alone(asked, view.layout.unified)
    best = min(options)
    if best.cost == np.inf:
        promised = [f"{s:g} s {what}" for s, what in ((facts.ttft_slo_s, "to the first token"), (facts.itl_slo_s, "between tokens")) if s]
        raise Overloaded(f"no worker is expected to keep what was promised, {' and '.join(promised)}: try again later, or add workers")
    ranked = best.ranked()
    computes = ranked[0] if ranked else best.decode
    cached = float(asked.cached[computes])
    if not known:
        return place(facts, view, best.decode, ranked, "nothing learned yet", cached)
    waits, itl_s = _waits(view, pace, computes), float(asked.with_it[best.decode])
    seconds = {"ttft_s": best.ttft_s, "waits_s": waits, "itl_s": itl_s, "cost_s": best.cost}
    return place(facts, view, best.decode, ranked, f"{best.ttft_s:.3f} s until the prompt is computed", cached, **seconds)


def _asked(facts: Facts, view: View, pace: Paces, limit: float, itl_s: float) -> _Asked:
    queued, running = _queued(view, pace), view.num_requests - view.num_waiting
    beside = pace.decode_s(running, view.context_tokens)
    step, (with_it, decoding) = _step(view, pace, queued, running, beside), _decode(facts, view, pace)
    work, own, cached = _prompt(facts, view, pace, queued, (running > 0) & view.layout.decodes, beside)
    ttft, harm = _prompts(view, pace, queued, work, own)
    room = _room(facts, view, with_it)
    handing_over, ttft = (step, ttft) if room is None else (step + room, ttft + room)
    soonest = ttft
    if limit < np.inf:
        soonest = ttft - _passed(view, step)
        harm = _within(limit, soonest, harm)
    return _Asked(facts, view, limit, step, handing_over, ttft, soonest, own, cached, harm, with_it, _within(itl_s, with_it, decoding))


def _best_pair(asked: _Asked, pool: Pool, push_token_s: Column) -> _Option:
    """The best (P, D) of those that have the first token within the limit. Only pairs that may be it are looked at: no P is better with any
    D than `ttft + harm`, and pushes are seldom what takes longest, so that the best D of all mostly has it."""
    limit, tokens, matched = asked.limit, asked.facts.num_prompt_tokens, asked.view.matched_tokens
    here, soonest, harm, push_token_s = asked.ttft[pool.some], asked.soonest[pool.some], asked.harm[pool.some], push_token_s[pool.some]

    def costs(d: Any) -> Column:
        """With this D, or with those of a column."""
        pushed, handed = (tokens - matched[d]) * push_token_s, asked.handing_over[d]
        whole = np.maximum(here, pushed)
        whole += handed
        whole += harm
        whole += asked.decoding[d]
        return whole if limit == np.inf else _within(limit, np.maximum(soonest, pushed) + handed, whole)

    least = float((here + harm).min())
    at_decode = asked.handing_over[pool.others] + asked.decoding[pool.others]
    place_ = int(at_decode.argmin())
    d = int(pool.decodes[place_])
    found = costs(d)
    p = int(found.argmin())
    best = float(found[p])
    left = least + at_decode < best
    left[place_] = False
    while left.any():
        places = left.nonzero()[0]
        places = places[at_decode[places].argsort(kind="stable")[:_CHUNK]]
        rows = pool.decodes[places]
        found = costs(rows[:, None])
        row, column = divmod(int(found.argmin()), len(here))
        best, d, p = min((best, d, p), (float(found[row, column]), int(rows[row]), column))
        left &= least + at_decode < best
        left[places] = False

    def ranked() -> list[int]:
        pushed = (tokens - matched[d]) * push_token_s
        costs = np.maximum(here, pushed) + harm
        if limit < np.inf:
            costs = _within(limit, np.maximum(soonest, pushed) + asked.handing_over[d], costs)
        return pool.prefills[first(costs)].tolist()

    soon = float(here[p] - _passed(asked.view, asked.step, int(pool.prefills[p])))
    ttft_s = max(soon, float((tokens - matched[d]) * push_token_s[p])) + float(asked.handing_over[d])
    return _Option(best, False, d, ttft_s, ranked)


def _best_alone(asked: _Asked, rows: Rows, slow: NDArray[np.bool_] | None = None) -> list[_Option]:
    """`slow`: who would not keep the time between tokens."""
    if not len(rows):
        return []
    costs = asked.ttft[rows] + asked.harm[rows] + asked.decoding[rows]
    if slow is not None:
        costs[slow[rows]] = np.inf
    best = int(costs.argmin())
    row = int(rows[best])
    ttft_s = float(asked.ttft[row] - _passed(asked.view, asked.step, row))
    return [_Option(float(costs[best]), True, row, ttft_s, list[int])]


def _within(limit: float, seconds: Column, costs: Column) -> Column:
    """The costs, of those that are late infinite."""
    return costs if limit == np.inf else np.where(seconds > limit, np.inf, costs)


def _who_may_compute(facts: Facts, view: View, pool: Pool) -> Rows:
    """Those for whom no prefill worker is idle that has as much of the prompt; one on their own cores is none, if they have work there."""
    decodes, matched, devices = pool.decodes, view.matched_tokens, view.layout.device
    if not facts.local_prefill:
        return decodes[:0]
    idle = view.pending_tokens[pool.some] == 0
    if not idle.any():
        return decodes
    own, theirs = matched[pool.others], matched[pool.some][idle]
    more = own > theirs.max()
    if view.layout.has_mates:
        where = devices[pool.prefills[idle]]
        apart = np.array([theirs[where != device].max(initial=-1.0) for device in devices[decodes]])
        more = (own > apart) & (more | (view.num_requests[decodes] > 0))
    return decodes[more]


def _step(view: View, pace: Paces, queued: Column, running: Column, beside: Column) -> Column:
    """Seconds of the step that each is in; none for who has nothing to compute. `beside`: of them, for who decodes."""
    if view.batched_tokens.any():
        some = np.maximum(view.pending_tokens, 1.0)
        queued = np.minimum(1.0, np.where(view.batched_tokens > 0, view.batched_tokens, some) / some) * queued
    seconds = pace.base_s + beside
    seconds += queued
    if view.layout.has_mates:
        seconds *= 1 + pace.crowded
    seconds *= np.maximum(running, view.pending_tokens) > 0
    return seconds


def _passed(view: View, step: Column, row: Any = slice(None)) -> Column:
    """Seconds of the step with a prompt that a prefill or unified worker is in that have passed, of which its load does not know. They are
    told and promised; in the cost the step counts as a whole, as one who is busy now is likely to be busy again."""
    unified = ~(view.layout.is_prefill[row] | view.layout.is_decode[row])
    tokens = (view.num_requests[row] - view.num_waiting[row]) * unified  # of those that decode; none is a prompt's
    return np.minimum(view.computing_s[row], step[row]) * ((view.pending_tokens[row] > tokens) & ~view.layout.is_decode[row])


def _prompts(view: View, pace: Paces, queued: Column, work: Column, own: Column) -> tuple[Column, Column]:
    """Seconds until the prompt is computed there, and those that others lose by it, from those that it takes of a device."""
    layout, ttft = view.layout, work
    delayed = np.where(layout.is_prefill, view.num_waiting, view.num_requests - view.num_held + layout.is_decode)
    if layout.has_mates:
        # Seconds for which each keeps its device busy; no end is seen to decoding.
        busy = np.where(layout.is_prefill | (view.num_requests == 0), queued, np.inf)
        beside = np.minimum(work[:, None], np.append(busy, 0.0)[layout.mates]).sum(axis=1)
        ttft = np.maximum(work + beside, work * (1 + pace.crowded))
        delayed = np.bincount(layout.device, weights=delayed)[layout.device]
    harm = own * delayed
    for pool in layout.pools:
        if not pool.shares:  # else a decode worker takes its seconds from them as well
            there = float(view.num_requests[pool.some].sum()) / len(pool.prefills)
            harm[pool.some] += own[pool.some].min() * there * (1 + there)
    return ttft, harm


def _queued(view: View, pace: Paces) -> Column:
    return pace.token_s * view.pending_tokens + pace.pair_s * view.pending_pairs


def _waits(view: View, pace: Paces, row: int) -> float:
    """Seconds until it has computed what was sent there before."""
    pending = view.pending_tokens[row]
    steps = np.ceil(pending / (view.batched_tokens[row] or pending)) if pending else 0.0
    rows = 0.0 if view.layout.is_prefill[row] else view.num_requests[row] - view.num_waiting[row]
    beside = pace.row_s[row] * rows + pace.context_s[row] * view.context_tokens[row] if rows else 0.0
    queued = pace.token_s[row] * pending + pace.pair_s[row] * view.pending_pairs[row]
    return float((queued + steps * (pace.base_s[row] + beside)) * (1 + pace.crowded[row]))


def _prompt(
    facts: Facts, view: View, pace: Paces, queued: Column, decodes: NDArray[np.bool_], beside: Column
) -> tuple[Column, Column, Column]:
    """Seconds of its device until it has computed the prompt, and those of them that the prompt itself takes; with or without fetching
    what it has not, whichever is faster. It fetches beside what is queued. And the tokens that it has then. Who `decodes` does so for
    `beside` seconds of each step."""
    fetches = bool((view.reachable_tokens > view.expected_tokens).any())
    cached = view.found[1:3] if fetches else view.expected_tokens
    matched = np.minimum(cached, facts.num_prompt_tokens - 1)  # the last token is always computed
    missing = facts.num_prompt_tokens - matched
    work = view.pending_tokens + missing
    at_most = work
    if view.batched_tokens.any():
        at_most = view.batched_tokens if view.batched_tokens.all() else np.where(view.batched_tokens > 0, view.batched_tokens, work)
    seconds = np.ceil(work / at_most)
    seconds *= pace.base_s + beside * decodes
    seconds += queued
    own = pace.prompt_s(missing, matched)
    seconds += own
    own += pace.base_s * missing / at_most * ~decodes  # who decodes makes the steps anyway
    if not fetches:
        return seconds, own, view.expected_tokens
    columns: tuple[Column, ...] = (*seconds, *own)
    work, then, own, less = columns
    then = np.maximum(then - less, view.fetch_s) + less
    sooner = then < work
    return np.where(sooner, then, work), np.where(sooner, less, own), np.where(sooner, view.reachable_tokens, view.expected_tokens)


def _decode(facts: Facts, view: View, pace: Paces) -> tuple[Column, Column]:
    """Seconds of a step with it; of its output tokens, and those that they cost the others there."""
    added = pace.decode_s(1, facts.num_prompt_tokens + facts.num_output_tokens / 2)
    step = pace.base_s + pace.decode_s(view.num_requests, view.context_tokens)
    step += added
    added *= view.num_requests
    added += step
    added *= facts.num_output_tokens
    if not view.layout.has_mates:
        return step, added
    slower = 1 + pace.crowded
    return step * slower, added * slower


def _room(facts: Facts, view: View, step: Column) -> Column | None:
    """Seconds until a decode worker has blocks for it and for those that wait there, which are taken to be like it; what is held and not
    computed yet is reserved for them. In the time of one request's tokens all that are held become free once. None: there is room."""
    if not view.kv_tokens.any():  # not announced
        return None
    held, each = view.kv_used * view.kv_tokens, facts.num_prompt_tokens + facts.num_output_tokens
    waiting = np.maximum(view.num_waiting * each - np.maximum(held - view.context_tokens, 0.0), 0.0)
    lacking = each + waiting - view.matched_tokens - (view.kv_tokens - held)
    lacks = (lacking > 0) & (view.kv_tokens > 0) & view.layout.decodes
    return lacking * lacks / np.maximum(held, 1.0) * facts.num_output_tokens * step if lacks.any() else None


def _habitual(asked: _Asked, pace: Paces) -> Column:
    """Seconds between tokens where each request that decodes there comes with a prompt like this one and those that wait there: while one
    gets its tokens, all the others end, and as many come."""
    view = asked.view
    waiting = np.maximum(view.pending_tokens - (view.num_requests - view.num_waiting), 0.0) * pace.token_s
    prompts = (waiting + asked.own) * (1 + view.num_requests)
    return asked.with_it + prompts / max(asked.facts.num_output_tokens, 1.0)


def _complete(view: View) -> tuple[bool, Paces]:
    """Whether anybody knows what a prompt takes; and each worker's pace, with what it has not met yet from the others. By the clock, except
    where workers share a device: what they take from each other depends on what they have to do."""
    pace, learned, shares = view.pace, view.paces[:LEARNED], view.layout.shares
    filled = learned * (np.where(shares, 1.0, 1 + pace.crowded) if view.layout.has_mates else 1 + pace.crowded)
    known = True
    if not learned.all():
        known = bool(pace.token_s.any())
        met = learned > 0
        prompts, decodes = met[1], met[3] | met[4]  # a prompt's pairs with its tokens; what decodes with either
        for columns, some, otherwise in ((slice(0, 1), met[0], 0.0), (slice(1, 3), prompts, _NOBODY_KNOWS), (slice(3, 5), decodes, 0.0)):
            _fill(filled[columns], some, otherwise)
    base, token, pair, row, context = filled
    crowded = np.where(shares, pace.crowded, 0.0) if view.layout.has_mates else view.layout.nothing
    return known, Paces(base, token, pair, row, context, pace.push_token_s, crowded)


def _fill(columns: Table, some: NDArray[np.bool_], otherwise: float) -> None:
    """With the mean of some, for who is not among them; the first of the columns with something else where nobody is."""
    if some.all():
        return
    others = ~some
    for column, nobodys in zip(columns, (otherwise, 0.0), strict=False):
        column[others] = column[some].mean() if some.any() else nobodys
