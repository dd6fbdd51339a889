"""Attempts: the calls to decode workers of which a sequence's life is made, each with what is told of it.

begin (counted as on its way there) ─▶ outputs … ─▶ end        (its first token, or the end: not on its way any more)
"""

import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from baton.errors import BatonError, InternalError, WorkerLost
from baton.rpc import convert
from baton.rpc.v1 import decode_pb2
from baton.tracing import Span
from baton.types import GenerateOutput, GenerateRequest, Member
from services.router.breakers import Breakers
from services.router.placer import Decision
from services.router.sessions import Sessions
from services.router.spans import attempt_span, end_attempt
from services.router.workers import HashesBySize, Workers

if TYPE_CHECKING:
    from services.router.dispatch import Route


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """A call to a decode worker."""

    request: GenerateRequest
    route: "Route"  # what is told of it
    decision: Decision
    hashes: HashesBySize
    member: Member  # the decode worker
    message: decode_pb2.GenerateRequest
    span: Span
    placed: float  # time.monotonic
    waited_for: tuple[str, ...]  # workers that it is on its way to
    asked: tuple[tuple[str, str], ...]  # that wait for what becomes of it, if it is the one that tries: worker and process
    error: BatonError | None = None  # what it failed with
    overtaken: bool = False  # by another one

    @property
    def decode(self) -> str:
        return self.member.id


class Attempts:
    def __init__(self, workers: Workers, sessions: Sessions, breakers: Breakers) -> None:
        self._workers, self._sessions, self._breakers = workers, sessions, breakers

    def begin(self, request: GenerateRequest, route: "Route", decision: Decision, hashes: HashesBySize) -> Attempt:
        """Without waiting for anything: whoever is placed next sees that this one is on its way. `hashes`: of all its tokens."""
        placement = decision.placement
        member, candidates = self._workers.member(placement.decode), [self._candidate(name) for name in placement.prefills]
        route.sent(placement)
        span = route.span
        if span.traceparent:
            span = attempt_span(span, decision)
            request = dataclasses.replace(request, traceparent=span.traceparent)
        message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request), prefill_candidates=candidates)
        computes = placement.prefills[0] if placement.prefills else placement.decode
        total, missing = len(request.prompt_token_ids) + len(request.output_token_ids), placement.missing_tokens
        asked = ((member.id, member.instance), *((first.id, first.instance) for first in candidates[:1]))
        for each in asked:
            self._breakers.asked(*each, request.request_id)
        self._workers.routed(placement.decode, request.request_id, 0, 0)
        blocks = hashes(self._workers.member(computes).block_size)
        self._workers.routed(computes, request.request_id, missing, (total**2 - (total - missing) ** 2) // 2, blocks)
        waited_for = computes, placement.decode
        return Attempt(request, route, decision, hashes, member, message, span, time.monotonic(), waited_for, asked)

    async def outputs(self, attempt: Attempt) -> AsyncGenerator[GenerateOutput]:
        """From the first token to the finish reason. Leaving early cancels the call. Raises WorkerLost, or what the worker says."""
        placement, request_id, breakers = attempt.decision.placement, attempt.request.request_id, self._breakers
        computes, failed = attempt.waited_for[0], set[str]()
        instances = {each.id: each.instance for each in attempt.message.prefill_candidates}
        try:
            async with aclosing(self._sessions.generate(placement.decode, attempt.member.address, attempt.message)) as responses:
                async for response in responses:
                    if response.HasField("prefill"):
                        for name in set(response.prefill.failed) - failed:
                            breakers.failed(name, instances.get(name, ""))
                        failed.update(response.prefill.failed)
                        attempt.route.prefill = response.prefill.prefill_id
                        attempt.route.reason = f"{placement.reason}; {response.prefill.reason}"
                        if (attempt.route.prefill or placement.decode) != computes:
                            self._workers.unrouted(computes, request_id)
                            breakers.released(computes, instances.get(computes, ""), request_id)
                    output = convert.output_from_proto(response.output)
                    if output.cache is not None:
                        attempt.route.num_cached_tokens = output.cache.num_cached_tokens
                    if output.tokens or output.finish_reason is not None:
                        if attempt.waited_for:
                            prefill = attempt.route.prefill
                            if prefill and prefill not in failed:
                                breakers.succeeded(prefill, instances.get(prefill, ""))
                            self._there(attempt)  # their own loads have it by now, whether we were told or not
                        yield output
        finally:
            self._there(attempt)
        raise WorkerLost(f"{placement.decode} ended the stream too early")

    def succeeded(self, attempt: Attempt) -> float:
        """It has its first token, after so many seconds, and goes on."""
        attempt.decision.ttft_s = seconds = time.monotonic() - attempt.placed
        self._breakers.succeeded(attempt.decode, attempt.member.instance)
        return seconds

    def failed(self, attempt: Attempt, error: BatonError) -> None:
        """What the next decisions are to know of it. The first word counts."""
        if attempt.error is not None:
            return
        attempt.error = error
        end_attempt(attempt.span, attempt.route, attempt.decision, error)
        if isinstance(error, InternalError | WorkerLost):
            self._breakers.failed(attempt.decode, attempt.member.instance)
        if isinstance(error, WorkerLost):
            self._workers.lost(attempt.decode)
        for each in attempt.asked:  # who is full or draining, or was not asked by one that failed, has not failed
            self._breakers.released(*each, attempt.request.request_id)

    def end(self, attempt: Attempt) -> None:
        """However it went, and though `outputs` may never have been asked."""
        self._there(attempt)
        end_attempt(attempt.span, attempt.route, attempt.decision, overtaken=attempt.overtaken)

    def _there(self, attempt: Attempt) -> None:
        for worker_id in attempt.waited_for:
            self._workers.unrouted(worker_id, attempt.request.request_id, silent=attempt.overtaken)
        attempt.waited_for = ()

    def _candidate(self, worker_id: str) -> decode_pb2.PrefillCandidate:
        member = self._workers.member(worker_id)
        return decode_pb2.PrefillCandidate(
            id=worker_id,
            address=member.address,
            instance=member.instance,
            machine=member.machine,
            tensor_parallel_size=member.tensor_parallel_size,
        )
