"""Decode.Generate: the entrance of a request to the workers. Generates here; has the prompt computed here or by a prefill worker."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc.aio

from baton.errors import BatonError, Draining, Overloaded, WorkerLost
from baton.hosting.engine import Sequence
from baton.hosting.heartbeat import with_heartbeat
from baton.hosting.worker import Context, Intake, as_ours, guarded
from baton.metrics import WorkerMetrics
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from baton.tracing import NO_SPAN, OFF, Span, Tracer, cache_values, tell_fetches
from baton.types import CacheReport, GenerateOutput, PushTarget
from services.decode.leases import Leases

logger = logging.getLogger(__name__)


class Feeding:
    """How one request gets its prompt's KV: what was decided, what was found, what a prefill worker reported."""

    def __init__(self, num_prompt_tokens: int, span: Span = NO_SPAN) -> None:
        self.prefill_id = ""
        self.span, self.lookup, self.push = span, NO_SPAN, NO_SPAN
        self.reason = ""
        self.matched: tuple[int, int] = (0, 0)  # tokens: own prefix cache, pool
        self.prefill_cache: CacheReport | None = None
        self.failed: list[str] = []  # prefill workers
        self._num_prompt_tokens = num_prompt_tokens
        self._told = self._reported = False

    def decide(self, prefill_id: str, reason: str) -> None:
        self._told = self._told and (prefill_id, reason) == (self.prefill_id, self.reason)
        self.prefill_id, self.reason = prefill_id, reason

    def news(self) -> decode_pb2.PrefillDecision | None:
        """The decision, if it was not told yet."""
        if self._told or not self.reason:
            return None
        self._told = True
        return decode_pb2.PrefillDecision(prefill_id=self.prefill_id, reason=self.reason, failed=self.failed)

    def report(self, output: GenerateOutput) -> CacheReport | None:
        """With the first token and the end: where the prompt's KV came from, with what the prefill worker found in its own cache counted
        as cached. What was found and has not come is told with the decision."""
        first = bool(output.tokens) and not self._reported
        if not first and (output.finish_reason is None or output.cache is None):
            return None
        self._reported = True
        local, pool = self.matched
        cache = output.cache or CacheReport(num_prompt_tokens=self._num_prompt_tokens, num_local_tokens=local, num_pool_tokens=pool)
        if self.prefill_cache is None:
            lost = local + pool - cache.num_cached_tokens
            if first and lost > 0:
                self.decide(self.prefill_id, f"{self.reason}; {lost} that were found did not come")
            return cache
        found = max(cache.num_pool_tokens, self.prefill_cache.num_cached_tokens - cache.num_local_tokens)
        computed = max(self._num_prompt_tokens - cache.num_local_tokens - found, 0)
        return dataclasses.replace(cache, num_pool_tokens=found, num_prefill_tokens=computed)


class Outbox:
    """Events of a session that are not sent yet. Not bounded here: they are no more than the session's sequences may have tokens."""

    def __init__(self) -> None:
        self._events: list[decode_pb2.SessionEvent] = []
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: decode_pb2.SessionEvent) -> None:
        self._events.append(event)
        self._filled.set()

    async def take(self, patience_s: float) -> list[decode_pb2.SessionEvent]:
        """All there are; none when none came in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        return events


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    def __init__(
        self,
        intake: Intake,
        fingerprint: str,
        channels: Channels,
        metrics: WorkerMetrics,
        *,
        lease_s: float,
        max_local_prefill_tokens: int,
        unified: bool,
        pool_available: Callable[[], bool],
        leases: Leases | None,
        tensor_parallel_size: int = 1,
        tracer: Tracer = OFF,
        block_bytes: int = 0,
    ) -> None:
        """`leases`: where KV can be pushed into this worker's memory."""
        self._degree, self._tracer, self._block_bytes = tensor_parallel_size, tracer, block_bytes
        self._intake, self._fingerprint, self._channels, self._metrics = intake, fingerprint, channels, metrics
        self._lease_s, self._max_local, self._unified = lease_s, max_local_prefill_tokens, unified
        self._pool_available, self._leases = pool_available, leases

    async def Generate(self, request: decode_pb2.GenerateRequest, context: Context) -> AsyncIterator[decode_pb2.GenerateResponse]:
        async with guarded(context), aclosing(self._generate(request)) as responses:
            async for response in with_heartbeat(responses, self._lease_s / 4):
                yield response or decode_pb2.GenerateResponse(output=common_pb2.SequenceOutput())

    async def Session(self, requests: AsyncIterator[decode_pb2.SessionRequest], context: Context) -> None:
        """Ends when the caller has said its last word and all its calls have ended; with it, whatever is left of them."""
        async with guarded(context):
            outbox, calls = Outbox(), dict[int, asyncio.Task[None]]()

            async def take_requests() -> None:
                async for request in requests:
                    number = request.call
                    if request.HasField("start"):
                        calls[number] = asyncio.create_task(self._call(number, request.start, outbox), name=f"call-{number}")
                        calls[number].add_done_callback(lambda _, number=number: calls.pop(number, None))
                    elif number in calls:
                        calls[number].cancel()

            taking = asyncio.create_task(take_requests())
            try:
                while calls or outbox or not taking.done():
                    await context.write(decode_pb2.SessionEvents(events=await outbox.take(self._lease_s / 4)))
            finally:
                left = [taking, *calls.values()]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _call(self, number: int, request: decode_pb2.GenerateRequest, outbox: "Outbox") -> None:
        """One call of a session."""
        try:
            async with aclosing(self._generate(request)) as responses:
                async for response in responses:
                    outbox.put(decode_pb2.SessionEvent(call=number, response=response))
        except Exception as error:
            outbox.put(decode_pb2.SessionEvent(call=number, failure=convert.failure_to_proto(as_ours(error))))

    async def _generate(self, request: decode_pb2.GenerateRequest) -> AsyncGenerator[decode_pb2.GenerateResponse]:
        sequence_request = convert.request_from_proto(request.sequence)
        why_here = self._why_here(request)
        candidates = [] if why_here else list(request.prefill_candidates)
        sequence = self._intake.submit(sequence_request, hold=bool(candidates))
        span = self._tracer.start("decode", "server", sequence_request.traceparent)
        feeding, feeder = Feeding(len(sequence_request.prompt_token_ids), span), None
        feeding.decide("", why_here)
        if why_here and not self._unified:
            self._metrics.prefill("local")
        try:
            if candidates:
                feeding.lookup = span.child("kv lookup")
                name = f"feed-{sequence_request.request_id}"
                feeder = asyncio.create_task(self._feed(sequence, request.sequence, candidates, feeding), name=name)
            async for output in sequence:
                report = feeding.report(output)
                self._count(output, report)
                if report is not None and span.on:
                    span.set(cache_values(report))
                if output.fetches and span.on:
                    tell_fetches(span, output.fetches, self._block_bytes)
                message = convert.output_to_proto(output if output.cache is report else dataclasses.replace(output, cache=report))
                yield decode_pb2.GenerateResponse(output=message, prefill=feeding.news())
        except Exception as error:
            span.end(error)
            raise
        finally:
            feeding.lookup.end()
            span.set({"baton.prefill": feeding.prefill_id or "local", "baton.prefill.reason": feeding.reason})
            if feeder is not None:
                feeder.cancel()
            self._intake.done(sequence_request.request_id)
            span.end()

    def _why_here(self, request: decode_pb2.GenerateRequest) -> str:
        """Why the prompt is computed here, whatever its length; empty where a prefill worker may be asked."""
        if self._unified:
            return "unified worker"
        if not request.prefill_candidates:
            return "no prefill worker asked, computed here"
        if request.sequence.sampling.HasField("prompt_logprobs"):
            return "prompt logprobs, computed here"
        if self._leases is None and not self._pool_available():  # its KV could not come here
            return "no KV pool and no direct push, computed here"
        return ""

    async def _feed(
        self, sequence: Sequence, request: common_pb2.SequenceRequest, candidates: list[decode_pb2.PrefillCandidate], feeding: Feeding
    ) -> None:
        """Conditional disaggregation: what is missing is computed here if it is short, else by the first candidate that manages it. In the
        end the sequence is released, whatever happened."""
        try:
            room, why = True, "no prefill worker managed it"
            for candidate in candidates:
                pushed, num_blocks = False, 0
                span = NO_SPAN
                try:
                    async with self._reserved(sequence, candidate, room, feeding) as (target, arrived):
                        room = target is not None  # who has waited for it in vain does not wait again
                        if not await self._asks(candidate, sequence, request, feeding):
                            return
                        if target is None and not self._pool_available():
                            feeding.decide("", "no room to have it pushed here, and no KV pool, computed here")
                            break
                        if target is None and candidate.tensor_parallel_size not in (0, self._degree):
                            why = "no room to have it pushed here, and other shares in the pool"
                            continue
                        span = feeding.span.child(f"prefill {candidate.id}", "client")
                        feeding.push = span.child("kv push") if target is not None else NO_SPAN
                        async for output in self._prefill(candidate, request, target, span.traceparent):
                            feeding.prefill_cache = output.cache or feeding.prefill_cache
                            num_blocks = max(num_blocks, output.num_pushed_blocks, output.num_saved_blocks)
                            arrived(output.num_pushed_blocks, output.pushed_sums)
                            sequence.offer_blocks(output.num_saved_blocks)
                            for token in output.tokens:
                                pushed = True
                                sequence.push_token(token)
                    self._metrics.prefill("remote" if num_blocks else "fallback")  # a prompt that nothing came of is computed here
                    return
                except BatonError as error:
                    span.end(error)
                    told = (request.request_id, candidate.id, error.message)
                    logger.warning("prefill of %s by %s failed: %s", *told, extra={"request_id": request.request_id})
                    if not isinstance(error, Draining | Overloaded):
                        feeding.failed.append(candidate.id)
                    feeding.decide(candidate.id, f"{candidate.id} failed: {error.message}")
                    if pushed:
                        break
                finally:
                    feeding.push.end()
                    span.end()
            else:
                feeding.decide("", f"{why}, computed here")
            self._metrics.prefill("fallback")
        except Exception as error:
            known = {"request_id": request.request_id}
            logger.exception("having %s prefilled failed in a way that is not known here", request.request_id, extra=known)
            feeding.decide("", f"{type(error).__name__} while asking for a prefill, computed here")
            self._metrics.prefill("fallback")
        finally:
            sequence.release()

    async def _asks(
        self, candidate: decode_pb2.PrefillCandidate, sequence: Sequence, request: common_pb2.SequenceRequest, feeding: Feeding
    ) -> bool:
        """Whether enough is missing to ask a prefill worker, which `feeding` gets to know."""
        feeding.matched = await sequence.matched()  # known by now where blocks are reserved
        feeding.lookup.set({"baton.kv.local_tokens": feeding.matched[0], "baton.kv.found_tokens": feeding.matched[1]})
        feeding.lookup.end()
        known, so_far = len(request.prompt_token_ids) + len(request.output_token_ids), len(request.output_token_ids)
        missing = known - sum(feeding.matched)
        told = f"{missing} of {known} tokens{f' (prompt and {so_far} so far)' if so_far else ''} missing"
        if missing <= self._max_local:
            feeding.decide("", f"{told}, computed here")
            self._metrics.prefill("local")
            return False
        feeding.decide(candidate.id, feeding.reason or told)
        return True

    @contextlib.asynccontextmanager
    async def _reserved(
        self, sequence: Sequence, candidate: decode_pb2.PrefillCandidate, room: bool, feeding: Feeding
    ) -> AsyncIterator[tuple[PushTarget | None, Callable[[int, tuple[int, ...]], None]]]:
        """Blocks for the candidate to write into, if there may be `room`, and how to say that so many have arrived. Their lease ends here,
        well or not."""
        leases = self._leases if room else None
        target = await sequence.reserve(beyond=self._max_local) if leases is not None else None
        last = 0

        def arrived(num_blocks: int, sums: tuple[int, ...]) -> None:
            nonlocal last
            if target is not None and num_blocks > last:
                last = num_blocks
                sequence.blocks_pushed(target.lease, num_blocks, sums)
                here = num_blocks - target.first_block
                if feeding.push.on:
                    feeding.push.set({"baton.kv.blocks": here, "baton.kv.bytes": here * self._block_bytes, "baton.kv.lease": target.lease})
                if here >= target.num_blocks:
                    feeding.push.end()

        broken = False
        try:
            yield target, arrived
        except BatonError as error:
            broken = True
            feeding.push.end(error)
            raise
        finally:
            if target is not None and leases is not None:
                well = last >= target.first_block + target.num_blocks
                leases.end(target.lease, candidate, well=well, broken=broken)

    async def _prefill(
        self, candidate: decode_pb2.PrefillCandidate, request: common_pb2.SequenceRequest, target: PushTarget | None, traceparent: str
    ) -> AsyncIterator[GenerateOutput]:
        """The outputs of one prefill call, which is cancelled if it is left early. Raises a BatonError where it fails or falls silent."""
        message = prefill_pb2.PrefillRequest(sequence=request, fingerprint=self._fingerprint)
        if traceparent:
            message.sequence.traceparent = traceparent
        if target is not None:
            message.target.CopyFrom(convert.target_to_proto(target))
        call = prefill_pb2_grpc.PrefillStub(self._channels.get(candidate.address)).Prefill(message)
        try:
            while True:
                async with asyncio.timeout(self._lease_s):
                    output = await call.read()
                if not isinstance(output, common_pb2.SequenceOutput):  # the end
                    return
                yield convert.output_from_proto(output)
        except grpc.aio.AioRpcError as error:
            raise convert.error_from_rpc(error, candidate.id) from error
        except TimeoutError as error:
            raise WorkerLost(f"{candidate.id} was silent for {self._lease_s:g} s") from error
        finally:
            with contextlib.suppress(asyncio.InvalidStateError):
                call.cancel()

    def _count(self, output: GenerateOutput, report: CacheReport | None) -> None:
        self._metrics.generation_tokens.inc(len(output.tokens))
        if output.finish_reason is not None and report is not None:
            self._metrics.prompt_tokens.inc(report.num_prompt_tokens)
            self._metrics.prefix_cache_queries.inc(report.num_prompt_tokens)
            self._metrics.prefix_cache_hits.inc(report.num_cached_tokens)
