"""A gRPC relay in front of a worker, which passes everything on as it is, but spoils the state streams when it is told to:

gap      an update is lost
silent   an update is lost, and the numbers of those that follow hide it
cut      the stream ends
"""

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from baton.rpc.v1 import worker_pb2

FAULTS = ("gap", "silent", "cut")


class Relay(grpc.GenericRpcHandler):
    def __init__(self, target: str, seed: int) -> None:
        self._target, self._rng = target, random.Random(seed)
        self._channel: grpc.aio.Channel | None = None
        self.address = ""
        self.faults: Sequence[str] = FAULTS
        self.share = 0.0  # of the updates are spoiled
        self.spoiled = Counter[str]()  # those with events, by fault

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method

        async def relay(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            assert self._channel is not None
            call = self._channel.stream_stream(method)(requests)
            replies = self._spoil(call, context) if method.endswith("/WatchState") else call
            try:
                async for reply in replies:
                    yield reply
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(relay)

    async def _spoil(self, updates: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        hidden = 0
        async for data in updates:
            update = worker_pb2.StateUpdate.FromString(data)
            if not update.snapshot and self._rng.random() < self.share:
                fault = self._rng.choice(self.faults)
                self.spoiled[fault] += bool(update.events)
                if fault == "cut":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                hidden += fault == "silent"
                continue
            update.sequence -= hidden
            yield update.SerializeToString()


@asynccontextmanager
async def relay(target: str, *, address: str = "127.0.0.1:0", seed: int = 0) -> AsyncIterator[Relay]:
    """Listens at `address`; spoils nothing before it is told a share."""
    handler, server = Relay(target, seed), grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    handler.address = f"{address.rpartition(':')[0]}:{server.add_insecure_port(address)}"
    options = (("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(target, options=options) as handler._channel:
        await server.start()
        try:
            yield handler
        finally:
            await server.stop(0)
