"""Prefill.Prefill: computes a prompt, writes its KV into the decode worker's memory or the pool, and gives the first token."""

import dataclasses
from collections.abc import AsyncIterator, Callable

from baton.errors import InvalidRequest, TransferError
from baton.hosting.heartbeat import with_heartbeat
from baton.hosting.worker import Context, Intake, guarded
from baton.metrics import WorkerMetrics
from baton.rpc import convert
from baton.rpc.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from baton.tracing import OFF, Span, Tracer, cache_values, tell_fetches
from baton.types import GenerateOutput, GenerateRequest, PushTarget


class PrefillServicer(prefill_pb2_grpc.PrefillServicer):
    def __init__(
        self,
        intake: Intake,
        fingerprint: str,
        metrics: WorkerMetrics,
        *,
        instance: str,
        heartbeat_s: float,
        can_push: Callable[[PushTarget], bool],
        pool_available: Callable[[], bool],
        tensor_parallel_size: int = 1,
        tracer: Tracer = OFF,
        block_bytes: int = 0,
    ) -> None:
        self._degree, self._tracer, self._block_bytes = tensor_parallel_size, tracer, block_bytes
        self._intake, self._fingerprint, self._metrics, self._heartbeat_s = intake, fingerprint, metrics, heartbeat_s
        self._instance = instance
        self._can_push, self._pool_available = can_push, pool_available

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Context) -> AsyncIterator[common_pb2.SequenceOutput]:
        async with guarded(context):
            if request.fingerprint != self._fingerprint:
                raise InvalidRequest(
                    f"the decode worker's KV fingerprint {request.fingerprint} is not this prefill worker's {self._fingerprint}: they "
                    "serve different weights, block sizes or dtypes; give both the same model folder and engine settings"
                )
            sequence_request = _for_one_token(convert.request_from_proto(request.sequence))
            target = convert.target_from_proto(request.target) if request.HasField("target") else None
            if target is not None and not self._can_push(target):
                if len(target.shards) != self._degree:
                    raise TransferError(
                        f"there is no direct path to this decode worker, and in the KV pool it finds blocks of {len(target.shards)} ranks "
                        f"alone, not of {self._degree}: give both one of push.protocols, or the same engine.tensor_parallel_size"
                    )
                if not self._pool_available():
                    raise TransferError("there is no direct path to this decode worker, and no KV pool: give both one of push.protocols")
                target = None  # the pool, then
            sequence = self._intake.submit(sequence_request, await_saves=target is None, push=target)
            span = self._tracer.start("prefill", "server", sequence_request.traceparent)
            self._metrics.prompt_tokens.inc(len(sequence_request.prompt_token_ids))
            try:
                async for news in with_heartbeat(aiter(sequence), self._heartbeat_s):
                    output = news or GenerateOutput()
                    self._count(output)
                    if span.on:
                        self._tell(span, output, target)
                    yield convert.output_to_proto(output)
            except Exception as error:
                span.end(error)
                raise
            finally:
                span.end()
                self._intake.done(sequence_request.request_id)

    async def EndLease(self, request: prefill_pb2.EndLeaseRequest, context: Context) -> prefill_pb2.EndLeaseResponse:
        async with guarded(context):
            end = await self._intake.engine.leases.settled(request.lease)
        return prefill_pb2.EndLeaseResponse(clean=end.clean, known=end.known, instance=self._instance)

    def _count(self, output: GenerateOutput) -> None:
        self._metrics.generation_tokens.inc(len(output.tokens))
        if output.tokens and output.cache is not None:
            self._metrics.prefix_cache_queries.inc(output.cache.num_prompt_tokens)
            self._metrics.prefix_cache_hits.inc(output.cache.num_cached_tokens)

    def _tell(self, span: Span, output: GenerateOutput, target: PushTarget | None) -> None:
        done = max(output.num_pushed_blocks - (target.first_block if target else 0), 0)
        if target is not None and done:
            span.set({"baton.kv.pushed_blocks": done, "baton.kv.pushed_bytes": done * self._block_bytes})
        if output.num_saved_blocks:
            span.set({"baton.kv.saved_blocks": output.num_saved_blocks})
        if output.cache is not None:
            span.set(cache_values(output.cache))
        tell_fetches(span, output.fetches, self._block_bytes)


def _for_one_token(request: GenerateRequest) -> GenerateRequest:
    wanted = len(request.output_token_ids) + 1
    sampling = dataclasses.replace(request.sampling, max_tokens=wanted, min_tokens=min(request.sampling.min_tokens, wanted))
    return dataclasses.replace(request, sampling=sampling)
