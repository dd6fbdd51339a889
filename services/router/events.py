"""Server-sent events to a client that may go away."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import BatonError, RequestCancelled
from services.router.grace import Grace

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_STRAIGHT = "baton.send"  # the server's own, in a scope


class EventStream(Response):
    """Server-sent events. Chunks go to the server past the framework's layers: each of them costs every token something, and has nothing
    to say once an answer has started."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], headers: Mapping[str, str], grace: Grace, failed: Callable[[BatonError], bytes]
    ) -> None:
        """`failed`: the event that tells of an error. The last one is `[DONE]`, also then."""
        self._events, self.status_code, self.background = events, 200, None
        self._grace, self._failed = grace, failed
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        straight: Send = scope.get(_STRAIGHT, send)

        async def tell() -> None:
            async with aclosing(self._events):
                async for event in self._events:
                    await straight({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = DONE
        try:
            async with self._grace.limit():
                await until_gone(receive, tell)
        except RequestCancelled:
            return
        except BatonError as error:
            last = self._failed(error) + DONE
        await straight({"type": "http.response.body", "body": last})


def front(app: ASGIApp) -> ASGIApp:
    """The app, for a server: with what EventStream needs."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_STRAIGHT] = send
        await app(scope, receive, send)

    return serve


async def until_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """The work's result; RequestCancelled, and the work cancelled, when the client goes away first."""

    async def run() -> T:
        return await work()

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(run()), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestCancelled("the client went away")
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
