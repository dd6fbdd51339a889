"""The edge of HTTP: each request's id, and what becomes of those that fail: OpenAI's error object, a count, and a line in the log."""

import logging
import math
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import BatonError, InternalError, RequestCancelled, Unauthorized, Unavailable
from baton.metrics import RouterMetrics
from services.router.answers import error_body

if TYPE_CHECKING:
    from services.router.app import Gateway

logger = logging.getLogger(__name__)
ID_HEADER, ROUTE_HEADER = "x-request-id", "x-baton-route"
_EXPOSED = [ID_HEADER, ROUTE_HEADER, "retry-after"]  # to scripts of other origins
_PREFIXES = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl"}  # of ids; others begin with req
_CODES = {404: "not_found", 405: "method_not_allowed"}  # of errors that are none of ours
_MOST_LOGGED = 300  # characters of a message, which may repeat what the client sent


def mount(app: FastAPI, gateway: "Gateway") -> None:
    """The ids, the handlers of errors, and CORS where there are origins that may call."""
    metrics = gateway.metrics

    @app.exception_handler(BatonError)
    async def on_error(request: Request, error: BatonError) -> JSONResponse:
        note_failure(error, metrics, request.state.request_id, called(request))
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        status, message = error.status_code, str(error.detail)
        code = _CODES.get(status, "http_error")
        if message == HTTPStatus(status).phrase:  # Starlette's own: no route took it
            metrics.failed(code)
            _log(logging.INFO, request.state.request_id, called(request), status, code, message)
            routes = [route for route in app.routes if isinstance(route, Route) and route.path.startswith("/v1/")]  # what is for clients
            paths = sorted({f"{' '.join({*(route.methods or ())} - {'HEAD'})} {route.path}" for route in routes})
            message = f"{message}: {called(request)}; there is {', '.join(paths)}"
        return JSONResponse(error_body(message, code, status), status, error.headers)

    app.add_middleware(_Edge, metrics=metrics)
    if origins := list(gateway.allowed_origins):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=_EXPOSED)


class _Edge:
    """Chooses a request's id before anything is read of it, and tells it with every answer. Whatever nobody caught is a bug: a 500."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)[ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception as error:
            if begun:  # the server breaks the connection off, and logs it
                raise
            logger.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
            self._metrics.failed(InternalError.code)
            body = error_body("the router failed on this request; see its log", InternalError.code, 500)
            await JSONResponse(body, 500)(scope, receive, tell)


def _request_id(scope: Scope) -> str:
    """The client's own, or a new one."""
    return Headers(scope=scope).get(ID_HEADER, "")[:128] or f"{_PREFIXES.get(scope['path'], 'req')}-{secrets.token_hex(8)}"


def called(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def error_response(error: BatonError) -> JSONResponse:
    headers: dict[str, str] = {}
    if error.http_status in (429, 503):  # whole seconds
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s or 0), 1) if isinstance(error, Unavailable) else 1)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error.message, error.code, error.http_status, error.param), error.http_status, headers)


def note_failure(error: BatonError, metrics: RouterMetrics, request_id: str, what: str) -> None:
    """Counts what a client is told, unless it is counted already, and logs it. `what`: the method and where it was called."""
    if isinstance(error, RequestCancelled):  # nobody is told
        return
    metrics.failure(error)
    if error.http_status != 429:  # they are counted, and may be many
        _log(logging.WARNING if error.http_status >= 500 else logging.INFO, request_id, what, error.http_status, error.code, error.message)


def _log(level: int, request_id: str, what: str, status: int, code: str, message: str) -> None:
    values = (_line(request_id), _line(what), status, code, _line(message))
    logger.log(level, "%s: %s: %d %s: %s", *values, extra={"request_id": request_id})


def _line(text: str) -> str:
    """No more than a line of the log, whatever a client has put in it."""
    return "".join(each if each.isprintable() else " " for each in text[:_MOST_LOGGED])
