"""Policies: pure functions of (facts of a request, view of the workers) → Placement. They decide; nothing else does.

A placement pairs a decode worker with ranked prefill workers of the same KV fingerprint; unified workers need none. Draining and lost
workers are not in the view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.errors import NoWorkers
from baton.types import Pace, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as the router knows it now. `pending_tokens` counts uncomputed tokens, those that were just sent there included."""

    id: str
    role: Role
    fingerprint: str
    block_size: int
    num_requests: int
    pending_tokens: int
    matched_tokens: int  # leading prompt tokens in its prefix cache
    pending_pairs: int = 0  # of tokens that the pending ones attend to, or are attended by
    num_waiting: int = 0  # of num_requests
    num_held: int = 0  # of num_waiting: another worker computes their prompts
    context_tokens: int = 0  # computed tokens of its running requests
    batched_tokens: int = 0  # of a step at most; 0: not announced
    device: str = ""  # the same for workers that compute on the same cores; empty: nobody else does
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    num_prompt_tokens: int
    turn: int  # counts requests, for round robin
    num_output_tokens: float = 0.0  # expected
    local_prefill: bool = True  # a decode worker may be told to compute a whole prompt itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    decode: str
    prefills: tuple[str, ...]  # best first; none: `decode` computes the prompt itself
    missing_tokens: int  # of the prompt, where it is computed
    reason: str  # for people
    ttft_s: float | None = None  # predicted
    cost_s: float | None = None  # seconds that it adds to anybody's waiting, where the policy counts in those


Cost = Callable[[Facts, WorkerView], float]
Policy = Callable[[Facts, Sequence[WorkerView]], Placement]
_DECODE_STEP_TOKENS = 16.0  # what a running request costs a decode worker, in tokens of prompt


def pair_up(workers: Sequence[WorkerView]) -> list[tuple[WorkerView, list[WorkerView]]]:
    """Each entrance (a unified worker, or a decode worker) with the prefill workers that fit it; at least one for a decode worker. Raises
    NoWorkers where there is no entrance."""
    prefills: dict[str, list[WorkerView]] = {}
    for worker in workers:
        if worker.role is Role.PREFILL:
            prefills.setdefault(worker.fingerprint, []).append(worker)
    pairs = [(w, prefills[w.fingerprint]) for w in workers if w.role is Role.DECODE and w.fingerprint in prefills]
    pairs += [(w, []) for w in workers if w.role is Role.UNIFIED]
    if not pairs:
        raise NoWorkers(_explain(workers))
    return pairs


def _choose(facts: Facts, workers: Sequence[WorkerView], cost: Cost, why: Callable[[WorkerView], str]) -> Placement:
    """The cheapest entrance, then the prefill workers that fit it, cheapest first. Ties go to the lower id."""
    chosen, fitting = min(pair_up(workers), key=lambda pair: (cost(facts, pair[0]), pair[0].id))
    ranked = sorted(fitting, key=lambda w: (cost(facts, w), w.id))
    computes = ranked[0] if ranked else chosen
    missing = facts.num_prompt_tokens - computes.matched_tokens
    return Placement(decode=chosen.id, prefills=tuple(w.id for w in ranked), missing_tokens=missing, reason=why(computes))


def _explain(workers: Sequence[WorkerView]) -> str:
    decodes = [w for w in workers if w.role is Role.DECODE]
    prefills = [w for w in workers if w.role is Role.PREFILL]
    if decodes and prefills:
        return (
            f"no prefill worker has the KV fingerprint of a decode worker (prefill: {_prints(prefills)}; decode: {_prints(decodes)}): give "
            "both pools the same model folder and engine settings"
        )
    missing = "prefill" if decodes else "decode" if prefills else "prefill and decode (or unified)"
    return f"no {missing} worker is ready; start one, or wait until it has loaded its model"


def _prints(workers: Sequence[WorkerView]) -> str:
    return ", ".join(sorted({w.fingerprint[:8] for w in workers}))


def round_robin(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """Each in turn, by id."""
    places = {
        w.id: place
        for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED)
        for place, w in enumerate(sorted((w for w in workers if w.role is role), key=lambda w: w.id))
    }
    sizes = {role: sum(w.role is role for w in workers) for role in Role}
    return _choose(facts, workers, lambda f, w: (places[w.id] - f.turn) % sizes[w.role], lambda w: "its turn")


def least_load(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """The fewest uncomputed tokens and running requests."""
    return _choose(facts, workers, lambda f, w: _load(w), lambda w: f"least load: {w.pending_tokens} tokens pending")


def prefix_aware(facts: Facts, workers: Sequence[WorkerView]) -> Placement:
    """The fewest tokens to wait for: those that must be computed for this prompt, and those queued before it."""

    def cost(f: Facts, w: WorkerView) -> float:
        return f.num_prompt_tokens - w.matched_tokens + _load(w)

    def why(w: WorkerView) -> str:
        return f"{w.matched_tokens} of {facts.num_prompt_tokens} tokens cached there, {w.pending_tokens} pending"

    return _choose(facts, workers, cost, why)


def _load(worker: WorkerView) -> float:
    return worker.pending_tokens + _DECODE_STEP_TOKENS * worker.num_requests
