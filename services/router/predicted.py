"""The policy `predicted`: the placement that adds the fewest seconds to anybody's waiting, this request's and the others'.

Of a pair (P, D), or of D alone, which computes the prompt itself:

    first token     what P has to compute before, and what it lacks of this prompt, or a push that is slower than that; and the step that D
                    is in, of which half passes before D asks P, and half before D takes what P has sent
  + its tokens      a step of D with it, times the tokens it is expected to get
  + harm            where the prompt is computed: its seconds, for each request there that it delays
                    where it decodes: what it adds to a step, for each request there, for as long

Seconds come from the workers: each learns its own pace and announces it (`baton.runtime.pace`); for what one has not met yet the average of
the others is taken. At a prefill worker those that wait stand for those that will come while this one waits: as many, if the load lasts. At
a decode worker a prompt counts as if it delayed one request more than there are: decoding is what it is kept free for. So nobody asks it
while a prefill worker that has as much of the prompt cached is idle.

Workers that compute on the same cores delay each other's requests like their own, and each other: who shares them with a busy one has half
of them. What a prompt costs the others is then the same wherever it is computed, and an idle prefill worker is no reason to spare a decode
worker that has something to do: decodes ride in its prompts' steps, but beside another's they read all weights in steps of their own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from math import inf

from baton.types import Pace, Role
from services.router.policy import Facts, Placement, WorkerView, pair_up

_NOBODY_KNOWS = 1e-4  # of a prompt's token: what is cached and what is pending matters then, and no time is told


def predicted(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    pairs = pair_up(workers)
    known, paces = _complete(workers)
    prompts = _prompts(facts, workers, paces)
    options: list[tuple[float, bool, str, str, float]] = []  # cost, whether D computes the prompt, D, P or D, seconds to the first token
    for entrance, fitting in pairs:
        decoding = _decode(facts, entrance, paces[entrance.id])
        to_push, handing_over = facts.num_prompt_tokens - entrance.matched_tokens, _step(entrance, paces[entrance.id])
        for place in chain(fitting, [entrance] if _may_compute(facts, entrance, fitting) else []):
            ttft, harm = prompts[place.id]
            if place is not entrance:
                ttft = max(ttft, to_push * paces[place.id].push_token_s) + handing_over
            options.append((ttft + harm + decoding, place is entrance, entrance.id, place.id, ttft))
    cost, here, decode, _, ttft = min(options)
    ranked = [] if here else [name for _, at_decode, entrance, name, _ in sorted(options) if entrance == decode and not at_decode]
    reason = f"{ttft:.3f} s to the first token expected" if known else "nothing learned yet"
    matched = next(worker.matched_tokens for worker in workers if worker.id == (decode if here else ranked[0]))
    missing = facts.num_prompt_tokens - matched
    ttft_s, cost_s = (ttft, cost) if known else (None, None)
    return Placement(decode=decode, prefills=tuple(ranked), missing_tokens=missing, reason=reason, ttft_s=ttft_s, cost_s=cost_s)


def _may_compute(facts: Facts, entrance: WorkerView, fitting: Sequence[WorkerView]) -> bool:
    if not fitting or not facts.local_prefill:
        return not fitting
    idle = (worker for worker in fitting if not worker.pending_tokens and worker.matched_tokens >= entrance.matched_tokens)
    return not any(_apart(worker, entrance) or not entrance.num_requests for worker in idle)


def _apart(one: WorkerView, other: WorkerView) -> bool:
    return not one.device or one.device != other.device


def _step(worker: WorkerView, pace: Pace) -> float:
    """Seconds of the step that it is in; none if it has nothing to compute."""
    rows, pending = worker.num_requests - worker.num_waiting, worker.pending_tokens
    if not (rows or pending):
        return 0.0
    prompts = min(1.0, (worker.batched_tokens or pending) / pending) * _queued(worker, pace) if pending else 0.0
    return (pace.base_s + pace.decode_s(rows, worker.context_tokens) + prompts) * (1 + pace.crowded)


def _prompts(facts: Facts, workers: Sequence[WorkerView], paces: dict[str, Pace]) -> dict[str, tuple[float, float]]:
    """For each worker: seconds until the prompt is computed there, and those that others lose by it."""
    devices: dict[str, list[WorkerView]] = {}
    for worker in workers:
        devices.setdefault(worker.device or worker.id, []).append(worker)
    prompts: dict[str, tuple[float, float]] = {}
    for sharing in devices.values():
        delayed = sum(_delayed(worker) for worker in sharing)
        busy = {worker.id: _busy(worker, paces[worker.id]) for worker in sharing}
        for worker in sharing:
            work, own = _prompt(facts, worker, paces[worker.id])
            beside = sum(min(work, seconds) for name, seconds in busy.items() if name != worker.id)
            prompts[worker.id] = max(work + beside, work * (1 + paces[worker.id].crowded)), own * delayed
    return prompts


def _delayed(worker: WorkerView) -> int:
    if worker.role is Role.PREFILL:
        return worker.num_waiting
    return worker.num_requests - worker.num_held + (worker.role is Role.DECODE)


def _busy(worker: WorkerView, pace: Pace) -> float:
    """Seconds for which it keeps its device busy; no end is seen to decoding."""
    return _queued(worker, pace) if worker.role is Role.PREFILL or not worker.num_requests else inf


def _queued(worker: WorkerView, pace: Pace) -> float:
    return pace.token_s * worker.pending_tokens + pace.pair_s * worker.pending_pairs


def _prompt(facts: Facts, worker: WorkerView, pace: Pace) -> tuple[float, float]:
    """Seconds of its device until it has computed the prompt, and those of them that the prompt itself takes."""
    matched = min(worker.matched_tokens, facts.num_prompt_tokens - 1)  # the last token is always computed
    missing = facts.num_prompt_tokens - matched
    work = worker.pending_tokens + missing
    at_most = worker.batched_tokens or work
    steps = -(-work // at_most)
    rows = 0 if worker.role is Role.PREFILL else worker.num_requests - worker.num_waiting
    beside = steps * (pace.base_s + (pace.decode_s(rows, worker.context_tokens) if rows else 0.0))
    own = pace.prompt_s(missing, matched)
    steps_s = 0.0 if rows else pace.base_s * missing / at_most  # who decodes makes the steps anyway
    return beside + _queued(worker, pace) + own, own + steps_s


def _decode(facts: Facts, worker: WorkerView, pace: Pace) -> float:
    """Seconds of its output tokens, and those that they cost the others there."""
    added = pace.decode_s(1, facts.num_prompt_tokens + facts.num_output_tokens / 2)
    step = pace.base_s + pace.decode_s(worker.num_requests, worker.context_tokens) + added
    return facts.num_output_tokens * (step + added * worker.num_requests) * (1 + pace.crowded)


def _complete(workers: Sequence[WorkerView]) -> tuple[bool, dict[str, Pace]]:
    """Whether anybody knows what a prompt takes; and each worker's pace, with what it has not met yet from the others. By the clock, except
    where workers share a device: what they take from each other depends on what they have to do."""
    shared = {device for device, count in Counter(worker.device for worker in workers).items() if device and count > 1}
    workers = [worker if worker.device in shared else replace(worker, pace=worker.pace.by_the_clock()) for worker in workers]
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
