"""The HTTP face: OpenAI's API with vLLM's extensions, and the pages of operators. Parses, streams and maps errors; decides nothing."""

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from baton.errors import BatonError, InvalidRequest, ModelNotFound, RequestCancelled, TooLarge, Unauthorized
from baton.metrics import RouterMetrics
from baton.tokenizer import Tokenizer
from baton.types import MemberState
from services.router import console, edge
from services.router.admission import Claim
from services.router.answers import Answers, error_body, to_json
from services.router.dispatch import Dispatcher
from services.router.events import EventStream, until_gone
from services.router.explain import explain
from services.router.fleet import Worker
from services.router.generation import Ask, Choice, Generator
from services.router.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from services.router.tenants import Tenant, Tenants
from services.router.text import Piece
from services.router.workers import Workers

logger = logging.getLogger(__name__)
T = TypeVar("T")
Stream = AsyncGenerator[tuple[Choice, Piece]]
TTFT_HEADER, TPOT_HEADER = "x-slo-ttft-ms", "x-slo-tpot-ms"
_LARGE = 32 * 2**10  # bytes: understood on another thread, since that takes milliseconds
_GAUGES_S = 1.0


@dataclass(slots=True)
class Gateway:
    """What the handlers share."""

    names: tuple[str, ...]  # of the model
    tokenizer: Tokenizer
    defaults: dict[str, Any]  # generation_config.json
    context_len: int  # the model's own
    dispatcher: Dispatcher
    generator: Generator
    tenants: Tenants
    metrics: RouterMetrics
    max_body: int
    lease_s: float
    allowed_origins: tuple[str, ...] = ()
    draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The name that is shown, also to those who asked for another."""
        return self.names[0]

    @property
    def max_model_len(self) -> int:
        """What the workers take; the model's own limit while none is known."""
        return min(self.dispatcher.workers.max_model_len or self.context_len, self.context_len)

    def not_ready(self) -> str | None:
        """Why no request can be served now."""
        if self.draining:
            return "the router is draining"
        problem = self.dispatcher.placer.problem()
        return None if problem is None else problem.message

    async def keep_gauges(self) -> None:
        """So that they are right within a second, and threads that read them run nothing of ours."""
        while True:
            try:
                self.set_gauges()
            except Exception:
                logger.exception("gauges cannot be set")
            await self.dispatcher.workers.wait_change(_GAUGES_S)

    def set_gauges(self) -> None:
        placer = self.dispatcher.placer
        self.metrics.degraded, self.metrics.num_breakers_open = bool(placer.degraded()), len(placer.breakers.open())

    def tenant(self, authorization: str | None) -> Tenant:
        """Raises Unauthorized."""
        try:
            return self.tenants.of(authorization)
        except Unauthorized as error:
            self.metrics.refused(error, "key", "")
            raise

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            served = f"{', '.join(map(repr, self.names))} {'is' if len(self.names) == 1 else 'are'}"
            raise ModelNotFound(f"the model {name!r} is not served here; {served}, or leave `model` out", param="model")

    async def understood(self, understand: Callable[[], T], num_bytes: int) -> T:
        """What a request says. A large one is understood beside the streams, not instead of them."""
        return await asyncio.to_thread(understand) if num_bytes > _LARGE else understand()


def make_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None, openapi_url=None)
    edge.mount(app, gateway)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _generate(request, gateway, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate(request, gateway, CompletionBody)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _tenant(request, gateway)
        return {"object": "list", "data": [_card(gateway, name) for name in gateway.names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        if not name:
            return await models(request)
        _tenant(request, gateway)
        gateway.check_model(name)
        return _card(gateway, name)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        _tenant(request, gateway)

        def understand(sent: object) -> dict[str, Any]:
            body = parse(TokenizeBody, sent)
            gateway.check_model(body.model)
            ids = body.token_ids(gateway.tokenizer)
            strings = [gateway.tokenizer.piece(token_id) for token_id in ids] if body.return_token_strs else None
            return {"tokens": ids, "count": len(ids), "max_model_len": gateway.max_model_len, "token_strs": strings}

        return await _read(request, gateway, understand)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        _tenant(request, gateway)

        def understand(sent: object) -> str:
            body = parse(DetokenizeBody, sent)
            gateway.check_model(body.model)
            if body.tokens:
                gateway.generator.check(body.tokens, None)
            return gateway.tokenizer.decode(body.tokens, skip_special_tokens=False)

        return {"prompt": await _read(request, gateway, understand)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        problem = gateway.not_ready()
        return {"status": "alive", "ready": problem is None, "problem": problem}  # 200 also then: a new router would be no readier

    @app.get("/ready")
    async def ready() -> Response:
        problem, degraded = gateway.not_ready(), gateway.dispatcher.placer.degraded()
        status = "not ready" if problem is not None else "degraded" if degraded else "ready"
        why = f"{degraded}; until then decode workers compute the prompts, beside their tokens" if degraded else None
        return JSONResponse({"status": status, "problem": problem, "degraded": why}, 200 if problem is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        gateway.set_gauges()
        return Response(gateway.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/cluster")
    async def cluster() -> dict[str, Any]:
        return describe(gateway)

    @app.get("/debug/routes/{request_id}")
    async def route(request: Request, request_id: str) -> Response:
        record = gateway.generator.records.find(request_id, _tenant(request, gateway).name)
        if record is None:
            raise HTTPException(404, f"nothing is known of a request {request_id!r}: give the x-request-id of one of the latest")
        known, policy = record.copy(), gateway.dispatcher.placer.policy
        return await asyncio.to_thread(lambda: JSONResponse({"request_id": request_id, **explain(known, policy)}))

    @app.get("/debug/index")
    async def index(request: Request) -> dict[str, Any]:
        _tenant(request, gateway)
        workers = gateway.dispatcher.workers
        return {"workers": {worker.member.id: describe_index(workers, worker) for worker in workers.all()}}

    @app.get("/debug/index/{worker_id}")
    async def indexed(request: Request, worker_id: str) -> dict[str, Any]:
        _tenant(request, gateway)
        workers = gateway.dispatcher.workers
        for worker in workers.all():
            if worker.member.id == worker_id:
                hashes = {str(tier): sorted(map(bytes.hex, blocks)) for tier, blocks in workers.indexed(worker).items()}
                return {**describe_index(workers, worker), "block_hashes": hashes}
        raise HTTPException(404, f"there is no worker {worker_id!r}; /debug/index names those that there are")

    console.mount(app, gateway)
    for each in app.routes:
        if isinstance(each, Route) and each.methods and "GET" in each.methods:
            each.methods.add("HEAD")
    return app


def describe_index(workers: Workers, worker: Worker) -> dict[str, Any]:
    """What this router knows of the blocks of a worker, and how it came by it."""
    tiers = {str(each.tier): {"blocks": each.num_blocks, "digest": f"{each.xor:032x}"} for each in workers.digests(worker).values()}
    return {
        "instance": worker.member.instance,
        "state": "lost" if worker.state is None else str(worker.state),
        "sequence": worker.sequence,
        "snapshots": worker.snapshots,
        "gaps": worker.gaps,
        "mismatches": worker.mismatches,
        "tiers": tiers,
    }


def describe(gateway: Gateway) -> dict[str, Any]:
    """The cluster as this router sees it."""
    broken = set(gateway.dispatcher.placer.breakers.open())
    workers = [
        {
            "id": w.member.id,
            "role": str(w.member.role),
            "pid": w.member.pid,
            "address": w.member.address,
            "state": "lost" if w.state is None else str(MemberState.DRAINING if w.member.state is MemberState.DRAINING else w.state),
            "breaker": "open" if w.member.id in broken else "closed",
            "running": w.load.num_running,
            "waiting": w.load.num_waiting,
            "waiting_tokens": w.load.num_waiting_tokens,
            "waiting_pairs": w.load.num_waiting_pairs,
            "blocks_free": w.load.blocks_free,
            "blocks_total": w.load.blocks_total,
            "blocks_cached": w.load.blocks_cached,
            "block_size": w.member.block_size,
            "max_num_batched_tokens": w.member.max_num_batched_tokens,
            "pace": dataclasses.asdict(w.load.pace),
            "model": w.member.model,
            "fingerprint": w.member.fingerprint,
            "tensor_parallel_size": w.member.tensor_parallel_size,
            "metrics": w.member.metrics_address,
        }
        for w in sorted(gateway.dispatcher.workers.all(), key=lambda w: (w.member.role, w.member.id))
    ]
    others = [
        {"id": m.id, "role": str(m.role), "pid": m.pid, "address": m.address, "state": str(m.state), "metrics": m.metrics_address}
        for m in gateway.dispatcher.workers.others.values()
    ]
    problem = gateway.not_ready()
    return {
        "model": gateway.model,
        "policy": gateway.dispatcher.policy_name,
        "ready": problem is None,
        "problem": problem,
        "degraded": gateway.dispatcher.placer.degraded() or None,
        "workers": workers,
        "others": sorted(others, key=lambda m: m["id"]),
        "blocks_indexed": gateway.dispatcher.workers.num_indexed,  # what several hold counts for each of them
    }


async def read_body(request: Request, limit: int) -> bytes:
    """Not much further than `limit` bytes."""
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > limit:
                break
    except ClientDisconnect as error:
        raise RequestCancelled("the client went away") from error
    return bytes(data)


async def _read(request: Request, gateway: Gateway, understand: Callable[[object], T]) -> T:
    """What `understand` makes of the body's JSON."""
    data = await read_body(request, gateway.max_body)

    def whole() -> T:
        if len(data) > gateway.max_body:
            raise TooLarge(f"the body is larger than {gateway.max_body} bytes (max_body): send a shorter one")
        try:
            sent = json.loads(data)
        except ValueError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from error
        return understand(sent)

    return await gateway.understood(whole, len(data))


def _tenant(request: Request, gateway: Gateway) -> Tenant:
    return gateway.tenant(request.headers.get("authorization"))


def claim_of(request: Request, tenant: Tenant, body: ChatBody | CompletionBody) -> Claim:
    """The headers are llm-d's; their times are milliseconds."""

    def seconds(name: str) -> float | None:
        text = request.headers.get(name)
        if text is None:
            return None
        try:
            value = float(text) / 1000
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise InvalidRequest(f"{name}: {text!r} is not a number of milliseconds; send one above 0, for example 500", param=name)
        return value

    return Claim(tenant=tenant, priority=body.urgency, ttft_slo_s=seconds(TTFT_HEADER), itl_slo_s=seconds(TPOT_HEADER))


async def _generate(request: Request, gateway: Gateway, cls: type[ChatBody] | type[CompletionBody]) -> Response:
    tenant = _tenant(request, gateway)
    gateway.generator.admission.check_rates(tenant)
    request_id = request.state.request_id

    def understand(sent: object) -> tuple[ChatBody | CompletionBody, list[Ask]]:
        body, limit = parse(cls, sent), gateway.max_model_len
        gateway.check_model(body.model)
        try:
            prompts = body.prompts(gateway.tokenizer, limit)
            for prompt in prompts:
                gateway.generator.check(prompt, limit)
        except InvalidRequest as error:
            error.param = body.asks_with if error.param == "prompt" else error.param
            raise
        return body, body.asks(request_id, prompts, gateway.defaults, limit)

    grace = gateway.generator.grace
    async with grace.limit():
        body, asks = await _read(request, gateway, understand)
        claim = claim_of(request, tenant, body)
        answers = Answers(body, request_id, gateway.model, gateway.tokenizer, asks)
        stream = gateway.generator.run(request_id, asks, claim, request.headers.get("traceparent", ""))
        if not body.stream:
            choices = await until_gone(request.receive, lambda: _collect(stream))
            return JSONResponse(answers.whole(choices), headers=_headers(choices))
        try:  # errors before the first token are HTTP statuses
            first = await until_gone(request.receive, lambda: anext(stream))
        except BaseException:
            await stream.aclose()
            raise

    def failed(error: BatonError) -> bytes:
        edge.note_failure(error, gateway.metrics, request_id, edge.called(request))
        return _event(to_json(error_body(error.message, error.code, error.http_status, error.param)))

    include_usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(stream, first, answers, include_usage=include_usage)
    return EventStream(events, _headers([first[0]]), grace, failed)


async def _collect(stream: Stream) -> list[Choice]:
    choices: dict[int, Choice] = {}
    async with aclosing(stream):
        async for choice, _ in stream:
            choices[choice.index] = choice
    return list(choices.values())


async def _events(stream: Stream, first: tuple[Choice, Piece], answers: Answers, *, include_usage: bool) -> AsyncGenerator[bytes]:
    choices: dict[int, Choice] = {}
    async with aclosing(stream):
        item: tuple[Choice, Piece] | None = first
        while item is not None:
            choices[item[0].index] = item[0]
            line = answers.line(*item)
            if line is not None:
                yield _event(line)
            item = await anext(stream, None)
        if include_usage:
            yield _event(to_json(answers.usage_chunk(list(choices.values()))))


def _event(line: str) -> bytes:
    return f"data: {line}\n\n".encode()


def _headers(choices: Sequence[Choice]) -> dict[str, str]:
    return {edge.ROUTE_HEADER: str(min(choices, key=lambda c: c.index).route)}


def _card(gateway: Gateway, name: str) -> dict[str, Any]:
    """With what clients of OpenAI and vLLM read."""
    return {
        "id": name,
        "object": "model",
        "created": gateway.created,
        "owned_by": "baton",
        "root": name,
        "parent": None,
        "permission": cast("list[Any]", []),
        "max_model_len": gateway.max_model_len,
    }
