"""Dispatcher: one sequence's life between the router and the workers.

    place ─▶ Decode.Generate ─▶ outputs … ─▶ finished
      ▲            │ refused, lost, silent for a lease
      └────────────┘ with the tokens so far

The sequence goes on elsewhere as if nothing had happened, because draws depend on (seed, position) alone. Text is not known here.
"""

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from baton.errors import BatonError, InternalError, NoWorkers, Overloaded, Unavailable, WorkerLost
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import decode_pb2
from baton.tracing import NO_SPAN, Span
from baton.types import GenerateOutput, GenerateRequest
from services.router.admission import NOTHING_PROMISED, Promised
from services.router.placer import Decision, Placer
from services.router.policy import Facts, Placement, Policy
from services.router.sessions import Sessions
from services.router.spans import attempt_span, end_attempt
from services.router.workers import HashesBySize, Workers

logger = logging.getLogger(__name__)


def not_kept(decision: Decision) -> None:
    """Nobody will ask for it."""


def nobody_asks(predicted_s: float | None, actual_s: float, predicted_share: float, actual_share: float) -> None:
    """How well it was predicted."""


@dataclasses.dataclass(slots=True)
class Route:
    """Where a sequence went and why; grows while it runs."""

    policy: str
    decode: str = ""
    prefill: str = ""  # empty: the decode worker computed the prompt itself
    reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    predicted_s: float | None = None  # until the first token
    queued_s: float = 0.0  # before it was placed
    moves: list[str] = dataclasses.field(default_factory=list[str])  # why it left each earlier worker
    decisions: list[Decision] = dataclasses.field(default_factory=list[Decision], repr=False)  # of each placement, where they are kept
    on_decision: Callable[[Decision], None] = dataclasses.field(default=not_kept, repr=False)  # who may keep it
    span: Span = dataclasses.field(default=NO_SPAN, repr=False)  # the request's

    def __str__(self) -> str:
        parts = [
            f"policy={self.policy}",
            f"decode={self.decode}",
            f"prefill={self.prefill or 'local'}",
            f"cached={self.num_cached_tokens}/{self.num_prompt_tokens}",
        ]
        if self.predicted_s is not None:
            parts.append(f"predicted_ttft={self.predicted_s:.3f}")
        if self.queued_s:
            parts.append(f"queued={self.queued_s:.3f}")
        if self.moves:
            parts.append(f"moves={len(self.moves)}")
        text = "; ".join([*parts, f'reason="{self.reason}"'])
        return text.encode("ascii", "replace").decode().replace("\n", " ")


class Dispatcher:
    def __init__(
        self,
        workers: Workers,
        channels: Channels,
        policy_name: str,
        policy: Policy,
        *,
        lease_s: float,
        max_migrations: int,
        local_prefill: bool = True,
        on_migration: Callable[[], None] = lambda: None,
        on_first_token: Callable[[float | None, float, float, float], None] = nobody_asks,
    ) -> None:
        """`on_first_token`: is told the seconds to it as predicted, if they were, and as they were; and the share of the prompt that was
        predicted to be cached, and that was."""
        self.workers, self.policy_name = workers, policy_name
        self.placer = Placer(workers, policy, local_prefill=local_prefill)
        self._sessions = Sessions(channels, lease_s=lease_s)
        self._lease_s, self._max_migrations, self._on_migration = lease_s, max_migrations, on_migration
        self._on_first_token = on_first_token
        self._turns = itertools.count()

    def route(self) -> Route:
        return Route(self.policy_name)

    async def generate(
        self, request: GenerateRequest, route: Route, hashes: HashesBySize | None = None, promised: Promised = NOTHING_PROMISED
    ) -> AsyncGenerator[GenerateOutput]:
        """Outputs until the one with a finish reason, from as many workers as it takes. Leaving early cancels the call. `hashes`: of the
        prompt, where its siblings share them.

        Raises NoWorkers, Overloaded, WorkerLost (too often), or what a worker says of a wrong request.
        """
        output, hashes = list(request.output_token_ids), hashes or HashesBySize(request.prompt_token_ids, request.salt)
        route.num_prompt_tokens = len(request.prompt_token_ids) + len(output)
        turn, refused = next(self._turns), list[str]()
        try:
            for attempt in itertools.count():
                if output:  # must be computed as well, wherever it goes on
                    hashes = HashesBySize((*request.prompt_token_ids, *output), request.salt)
                num_known, left = len(request.prompt_token_ids) + len(output), request.sampling.max_tokens - len(output)
                facts = self.placer.facts(num_known, left, turn, promised)
                if output:  # it has its first token
                    facts = dataclasses.replace(facts, ttft_slo_s=None)
                decision = await self._place(facts, hashes, refused)
                route.on_decision(decision)
                placement, instance = decision.placement, self.workers.member(decision.placement.decode).instance
                self.placer.breakers.asked(placement.decode, instance)
                route.decode, route.prefill, route.reason, route.predicted_s = placement.decode, "", placement.reason, placement.ttft_s
                placed = time.monotonic()
                name = request.request_id if attempt == 0 else f"{request.request_id}~{attempt}"
                part = dataclasses.replace(request, request_id=name, output_token_ids=tuple(output))
                span = route.span
                if span.traceparent:
                    span = attempt_span(span, decision)
                    part = dataclasses.replace(part, traceparent=span.traceparent)
                try:
                    async with aclosing(self._call(part, placement, route, hashes)) as items:
                        async for item in items:
                            if decision.ttft_s is None:
                                decision.ttft_s = time.monotonic() - placed
                                self.placer.breakers.succeeded(placement.decode, instance)
                                if not output:
                                    self.placer.learn_ttft(decision)
                                    shares = 1 - placement.missing_tokens / num_known, route.num_cached_tokens / num_known
                                    self._on_first_token(placement.ttft_s, decision.ttft_s, *shares)
                            output += [token.token_id for token in item.tokens]
                            yield item
                            if item.finish_reason is not None:
                                return
                    raise WorkerLost(f"{placement.decode} ended the stream too early")
                except (InternalError, Unavailable) as error:
                    end_attempt(span, route, decision, error)
                    self._failed(error, placement.decode, instance, refused)
                    full = isinstance(error, Overloaded) and not self._others(facts, hashes, refused)
                    if isinstance(error, InternalError) or attempt >= self._max_migrations or full:
                        raise
                    told = (request.request_id, placement.decode, len(output), error.message)
                    logger.warning("%s moves from %s after %d tokens: %s", *told, extra={"request_id": request.request_id})
                    route.moves.append(f"{placement.decode}: {error.message}")
                    self._on_migration()
                finally:
                    end_attempt(span, route, decision)
        finally:  # also where a stop string ended it, or nobody reads on
            if len(output) > len(request.output_token_ids):
                self.placer.learn_output(len(output))

    def _failed(self, error: BatonError, decode: str, instance: str, refused: list[str]) -> None:
        """What the next decisions are to know of it."""
        if isinstance(error, InternalError | WorkerLost):
            self.placer.breakers.failed(decode, instance)
        if isinstance(error, WorkerLost):
            self.workers.lost(decode)
        elif isinstance(error, Unavailable):
            refused.append(decode)

    async def _place(self, facts: Facts, hashes: HashesBySize, refused: list[str]) -> Decision:
        """Waits up to a lease for a worker that can take it."""
        deadline = asyncio.get_running_loop().time() + self._lease_s
        while True:
            try:
                return self.placer.decide(facts, hashes, refused)
            except NoWorkers:
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    raise
                refused.clear()
                await self.workers.wait_change(min(left, 0.5))

    def _others(self, facts: Facts, hashes: HashesBySize, refused: list[str]) -> bool:
        try:
            self.placer.decide(facts, hashes, refused)
        except NoWorkers:
            return False
        return True

    async def _call(
        self, request: GenerateRequest, placement: Placement, route: Route, hashes: HashesBySize
    ) -> AsyncGenerator[GenerateOutput]:
        candidates = [self._candidate(name) for name in placement.prefills]
        message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request), prefill_candidates=candidates)
        computes = placement.prefills[0] if placement.prefills else placement.decode
        total, missing = len(request.prompt_token_ids) + len(request.output_token_ids), placement.missing_tokens
        self.workers.routed(placement.decode, request.request_id, 0, 0)
        blocks = hashes(self.workers.member(computes).block_size)
        self.workers.routed(computes, request.request_id, missing, (total**2 - (total - missing) ** 2) // 2, blocks)
        waited_for: tuple[str, ...] = (computes, placement.decode)
        breakers, instances, failed = self.placer.breakers, {each.id: each.instance for each in candidates}, set[str]()
        for first in candidates[:1]:
            breakers.asked(first.id, first.instance)
        try:
            async with aclosing(
                self._sessions.generate(placement.decode, self.workers.member(placement.decode).address, message)
            ) as responses:
                async for response in responses:
                    if response.HasField("prefill"):
                        for name in set(response.prefill.failed) - failed:
                            breakers.failed(name, instances.get(name, ""))
                        failed.update(response.prefill.failed)
                        route.prefill = response.prefill.prefill_id
                        route.reason = f"{placement.reason}; {response.prefill.reason}"
                        if (route.prefill or placement.decode) != computes:
                            self.workers.unrouted(computes, request.request_id)
                    output = convert.output_from_proto(response.output)
                    if output.cache is not None:
                        route.num_cached_tokens = output.cache.num_cached_tokens
                    if output.tokens or output.finish_reason is not None:
                        if waited_for and route.prefill and route.prefill not in failed:
                            breakers.succeeded(route.prefill, instances.get(route.prefill, ""))
                        for worker_id in waited_for:  # their own loads have it by now, whether we were told or not
                            self.workers.unrouted(worker_id, request.request_id)
                        waited_for = ()
                        yield output
        finally:
            for worker_id in waited_for:
                self.workers.unrouted(worker_id, request.request_id)

    def _candidate(self, worker_id: str) -> decode_pb2.PrefillCandidate:
        member = self.workers.member(worker_id)
        return decode_pb2.PrefillCandidate(
            id=worker_id,
            address=member.address,
            instance=member.instance,
            machine=member.machine,
            tensor_parallel_size=member.tensor_parallel_size,
        )
