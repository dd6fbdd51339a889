"""Sessions: the router's streams to decode workers. All sequences at a worker share one, so that what a step gives them is one message; it
is open while it has any. When the router is behind, what it has not taken waits at the worker, and several steps become one message.

A stream that breaks, or is silent for a lease, ends all its calls with WorkerLost; a call's own failure ends that call alone.
"""

import asyncio
import collections
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import grpc.aio

from baton.errors import BatonError, WorkerLost
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc


class _Inbox:
    """One call's news. What has piled up because its reader was behind is taken as one response: then a router with too much to do sends
    fewer and longer chunks, and not older and older ones."""

    def __init__(self) -> None:
        self._news: collections.deque[decode_pb2.GenerateResponse | BatonError] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, news: decode_pb2.GenerateResponse | BatonError) -> None:
        self._news.append(news)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> decode_pb2.GenerateResponse:
        """Raises what the call failed with."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        first = self._news.popleft()
        if isinstance(first, BatonError):
            raise first
        while self._news and not isinstance(self._news[0], BatonError) and not self._news[0].HasField("prefill"):
            first.MergeFrom(cast("decode_pb2.GenerateResponse", self._news.popleft()))
        return first


class Sessions:
    def __init__(self, channels: Channels, *, lease_s: float) -> None:
        self._channels, self._lease_s = channels, lease_s
        self._sessions: dict[str, _Session] = {}

    async def generate(
        self, worker_id: str, address: str, request: decode_pb2.GenerateRequest
    ) -> AsyncGenerator[decode_pb2.GenerateResponse]:
        """Responses until the one with a finish reason. Leaving early cancels the call. Raises WorkerLost, or what the worker says."""
        session = self._sessions.get(address)
        if session is None or session.ended:
            session = self._sessions[address] = _Session(self._channels.narrow(address), worker_id, self._lease_s)
        number, inbox = session.start(request)
        going_on = True
        try:
            while going_on:
                try:
                    news = await inbox.take()
                except BatonError:
                    going_on = False
                    raise
                going_on = not news.output.finish_reason
                yield news
        finally:
            session.leave(number, cancel=going_on)
            if session.ended and self._sessions.get(address) is session:
                del self._sessions[address]


class _Session:
    def __init__(self, channel: grpc.aio.Channel, worker_id: str, lease_s: float) -> None:
        self._worker_id, self._lease_s = worker_id, lease_s
        self._inboxes: dict[int, _Inbox] = {}
        self._numbers = itertools.count()
        self._requests: asyncio.Queue[decode_pb2.SessionRequest | None] = asyncio.Queue()
        stub: Any = decode_pb2_grpc.DecodeStub(channel)
        self._call = stub.Session(self._outgoing())
        self._reader = asyncio.create_task(self._read(), name=f"session-{worker_id}")
        self.ended = False

    def start(self, request: decode_pb2.GenerateRequest) -> tuple[int, _Inbox]:
        number, inbox = next(self._numbers), _Inbox()
        self._inboxes[number] = inbox
        self._requests.put_nowait(decode_pb2.SessionRequest(call=number, start=request))
        return number, inbox

    def leave(self, number: int, *, cancel: bool) -> None:
        """Who leaves last ends the session."""
        self._inboxes.pop(number, None)
        if cancel:
            self._requests.put_nowait(decode_pb2.SessionRequest(call=number))
        if not self._inboxes and not self.ended:
            self._end()
            self._reader.cancel()

    def _end(self) -> None:
        """gRPC leaves the task that waits for requests alone when a call that has failed already is cancelled: it is told to end."""
        self.ended = True
        self._call.cancel()
        self._requests.put_nowait(None)

    async def _outgoing(self) -> AsyncIterator[decode_pb2.SessionRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: BatonError = WorkerLost(f"{self._worker_id} ended the stream too early")
        try:
            while True:
                async with asyncio.timeout(self._lease_s):
                    message = await self._call.read()
                if not isinstance(message, decode_pb2.SessionEvents):
                    break
                for event in message.events:
                    inbox = self._inboxes.get(event.call)
                    if inbox is not None:
                        failed = event.HasField("failure")
                        inbox.put(convert.failure_from_proto(event.failure) if failed else event.response)
        except grpc.aio.AioRpcError as failure:
            error = convert.error_from_rpc(failure, self._worker_id)
        except TimeoutError:
            error = WorkerLost(f"{self._worker_id} was silent for {self._lease_s:g} s")
        except (asyncio.CancelledError, grpc.aio.UsageError):  # its channel was closed under it; or nobody is left
            error = WorkerLost(f"{self._worker_id} has left the cluster")
        finally:
            self._end()
            for inbox in self._inboxes.values():
                inbox.put(error)
            self._inboxes.clear()
