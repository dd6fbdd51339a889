"""The policy `predicted`: the placement that adds the fewest seconds to anybody's waiting, this request's and the others'.

Of a pair (P, D), or of D alone, which computes the prompt itself:

    first token     what P has to compute before, and what it lacks of this prompt; a push that is slower than that, too
  + its tokens      a step of D with it, times the tokens it is expected to get
  + harm            where the prompt is computed: its seconds, for each request there that it delays
                    where it decodes: what it adds to a step, for each request there, for as long

Seconds come from the workers: each learns its own pace and announces it (`baton.runtime.pace`); for what one has not met yet the average of
the others is taken. At a prefill worker those that wait stand for those that will come while this one waits: as many, if the load lasts. At
a decode worker a prompt counts as if it delayed one request more than there are: decoding is what it is kept free for. So nobody asks it
while a prefill worker that has as much of the prompt cached is idle.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from baton.types import Pace, Role
from services.router.policy import Facts, Placement, WorkerView, pair_up

_NOBODY_KNOWS = 1e-4  # of a prompt's token: what is cached and what is pending matters then, and no time is told


def predicted(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    pairs = pair_up(workers)
    known, paces = _complete(workers)
    prompts = {worker.id: _prompt(facts, worker, paces[worker.id]) for worker in workers}
    options: list[tuple[float, bool, str, str, float]] = []  # cost, whether D computes the prompt, D, P or D, seconds to the first token
    for entrance, fitting in pairs:
        decoding = _decode(facts, entrance, paces[entrance.id])
        to_push = facts.num_prompt_tokens - entrance.matched_tokens
        for place in chain(fitting, [entrance] if _may_compute(facts, entrance, fitting) else []):
            ttft, harm = prompts[place.id]
            if place is not entrance:
                ttft = max(ttft, to_push * paces[place.id].push_token_s)
            options.append((ttft + harm + decoding, place is entrance, entrance.id, place.id, ttft))
    _, here, decode, _, ttft = min(options)
    ranked = [] if here else [name for _, at_decode, entrance, name, _ in sorted(options) if entrance == decode and not at_decode]
    reason = f"{ttft:.3f} s to the first token expected" if known else "nothing learned yet"
    matched = next(worker.matched_tokens for worker in workers if worker.id == (decode if here else ranked[0]))
    missing = facts.num_prompt_tokens - matched
    return Placement(decode=decode, prefills=tuple(ranked), missing_tokens=missing, reason=reason, ttft_s=ttft if known else None)


def _may_compute(facts: Facts, entrance: WorkerView, fitting: Sequence[WorkerView]) -> bool:
    idle = any(not worker.pending_tokens and worker.matched_tokens >= entrance.matched_tokens for worker in fitting)
    return not fitting or (facts.local_prefill and not idle)


def _prompt(facts: Facts, worker: WorkerView, pace: Pace) -> tuple[float, float]:
    """Seconds until the prompt is computed there, and those that others lose by it."""
    matched = min(worker.matched_tokens, facts.num_prompt_tokens - 1)  # the last token is always computed
    missing = facts.num_prompt_tokens - matched
    work = worker.pending_tokens + missing
    steps = -(-work // (worker.batched_tokens or work))
    rows, delayed = worker.num_requests - worker.num_waiting, worker.num_requests - worker.num_held + (worker.role is Role.DECODE)
    if worker.role is Role.PREFILL:
        rows, delayed = 0, worker.num_waiting
    beside = steps * (pace.base_s + (pace.decode_s(rows, worker.context_tokens) if rows else 0.0))
    own = pace.prompt_s(missing, matched)
    queued = pace.token_s * worker.pending_tokens + pace.pair_s * worker.pending_pairs
    return beside + queued + own, own * delayed


def _decode(facts: Facts, worker: WorkerView, pace: Pace) -> float:
    """Seconds of its output tokens, and those that they cost the others there."""
    added = pace.decode_s(1, facts.num_prompt_tokens + facts.num_output_tokens / 2)
    step = pace.base_s + pace.decode_s(worker.num_requests, worker.context_tokens) + added
    return facts.num_output_tokens * (step + added * worker.num_requests)


def _complete(workers: Sequence[WorkerView]) -> tuple[bool, dict[str, Pace]]:
    """Whether anybody knows what a prompt takes; and each worker's pace, with what it has not met yet from the others."""
    prompts = [worker.pace for worker in workers if worker.pace.token_s]
    decodes = [worker.pace for worker in workers if worker.pace.row_s or worker.pace.context_s]
    token, pair = _mean([pace.token_s for pace in prompts]) or _NOBODY_KNOWS, _mean([pace.pair_s for pace in prompts])
    row, context = _mean([pace.row_s for pace in decodes]), _mean([pace.context_s for pace in decodes])
    base = _mean([worker.pace.base_s for worker in workers if worker.pace.base_s])
    completed: dict[str, Pace] = {}
    for worker in workers:
        pace = worker.pace
        if not pace.base_s:
            pace = replace(pace, base_s=base)
        if not pace.token_s:
            pace = replace(pace, token_s=token, pair_s=pair)
        if not (pace.row_s or pace.context_s):
            pace = replace(pace, row_s=row, context_s=context)
        completed[worker.id] = pace
    return bool(prompts), completed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
