"""The gRPC face for clients: the same generation as HTTP, without OpenAI's shapes."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from baton.errors import BatonError, InvalidRequest
from baton.hosting.worker import Context, guarded
from baton.rpc import convert
from baton.rpc.v1 import router_pb2 as pb
from baton.rpc.v1 import router_pb2_grpc
from baton.types import SamplingParams
from services.router.admission import Claim
from services.router.app import Gateway
from services.router.edge import note_failure
from services.router.generation import Ask, allowance
from services.router.tenants import Tenant


class RouterServicer(router_pb2_grpc.RouterServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._calls = set[Context]()  # under way

    async def Generate(self, request: pb.RouterGenerateRequest, context: Context) -> AsyncIterator[pb.RouterGenerateResponse]:
        self._calls.add(context)
        context.add_done_callback(self._calls.discard)
        request.request_id = request.request_id or f"grpc-{secrets.token_hex(8)}"
        async with guarded(context), noted(self._gateway, request), self._gateway.generator.grace.limit():
            gateway = self._gateway
            tenant = gateway.tenant(_metadata(context, "authorization"))
            gateway.generator.admission.check_rates(tenant)
            request_id = request.request_id
            ask = await gateway.understood(lambda: self._ask(request, request_id), request.ByteSize())
            async with aclosing(
                gateway.generator.run(request_id, [ask], _claim(request, context, tenant), _metadata(context, "traceparent") or "")
            ) as stream:
                async for choice, piece in stream:
                    answer = pb.RouterGenerateResponse(
                        request_id=request_id,
                        text=piece.text,
                        tokens=[convert.token_to_proto(token) for token in piece.tokens],
                    )
                    if piece.finish_reason is not None:
                        answer.finish_reason = convert.finish_to_proto(piece.finish_reason)
                        answer.stop_reason = str(piece.stop_reason or "")
                        answer.usage.prompt_tokens = len(ask.prompt_token_ids)
                        answer.usage.completion_tokens = choice.num_tokens
                        answer.usage.cached_tokens = choice.cache.num_cached_tokens if choice.cache else 0
                        answer.route = str(choice.route)
                    yield answer

    async def finished(self) -> None:
        """Until no call is under way."""
        while self._calls:
            await asyncio.sleep(0.02)

    def _ask(self, request: pb.RouterGenerateRequest, request_id: str) -> Ask:
        self._gateway.check_model(request.model or None)
        if "" in request.stop:
            raise InvalidRequest("a stop string must not be empty; leave it out", param="stop")
        prompt = self._prompt(request)
        self._gateway.generator.check(prompt, self._gateway.max_model_len)
        return Ask(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=self._sampling(request, len(prompt)),
            seed=request.seed if request.HasField("seed") else None,
            stop=tuple(request.stop),
            salt=request.salt,
        )

    def _prompt(self, request: pb.RouterGenerateRequest) -> list[int]:
        tokenizer, limit, kind = self._gateway.tokenizer, self._gateway.max_model_len, request.WhichOneof("input")
        if kind == "text":
            return tokenizer.encode(request.text, limit=limit)
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "chat":
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False, limit=limit)
        raise InvalidRequest("input is missing: send text, token_ids or chat", param="input")

    def _sampling(self, request: pb.RouterGenerateRequest, num_prompt_tokens: int) -> SamplingParams:
        """proto3 has no defaults: in `sampling`, 0 for top_p and repetition_penalty means off, for max_tokens as many as fit, and
        temperature 0 is greedy."""
        asked = request.sampling.max_tokens if request.HasField("sampling") else 0
        most = allowance(asked or None, num_prompt_tokens, self._gateway.max_model_len)
        if not request.HasField("sampling"):
            defaults = self._gateway.defaults
            names = ("temperature", "top_p", "top_k", "repetition_penalty")
            return SamplingParams(max_tokens=most, **{name: defaults[name] for name in names if defaults.get(name) is not None})
        sampling = convert.sampling_from_proto(request.sampling)
        return dataclasses.replace(
            sampling,
            max_tokens=most,
            top_p=sampling.top_p or 1.0,
            repetition_penalty=sampling.repetition_penalty or 1.0,
        )


@asynccontextmanager
async def noted(gateway: Gateway, request: pb.RouterGenerateRequest) -> AsyncGenerator[None]:
    """Errors are counted and logged as HTTP's are."""
    try:
        yield
    except BatonError as error:
        note_failure(error, gateway.metrics, request.request_id, "Router.Generate")
        raise


def _claim(request: pb.RouterGenerateRequest, context: Context, tenant: Tenant) -> Claim:
    """A call that has a deadline wants its first token before, whatever else it wants."""
    for name in ("ttft_slo_s", "itl_slo_s"):
        if request.HasField(name) and not getattr(request, name) > 0:
            raise InvalidRequest(f"{name} must be a number of seconds above 0", param=name)
    return Claim(
        tenant=tenant,
        priority=request.priority if request.HasField("priority") else None,
        ttft_slo_s=request.ttft_slo_s if request.HasField("ttft_slo_s") else None,
        itl_slo_s=request.itl_slo_s if request.HasField("itl_slo_s") else None,
        deadline_s=context.time_remaining(),
    )


def _metadata(context: Context, name: str) -> str | None:
    return next((str(value) for key, value in context.invocation_metadata() or () if key == name), None)
