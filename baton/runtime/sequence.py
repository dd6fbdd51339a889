"""EngineSequence: the event loop's half of a request, see hosting.engine.Sequence. The engine's thread has the other half."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from baton.errors import BatonError
from baton.scheduling.request import Request
from baton.types import FinishReason, GenerateOutput, OutputToken, PushTarget

if TYPE_CHECKING:
    from baton.runtime.engine import Engine

Delivery = GenerateOutput | BatonError | tuple[int, int]
"""What the engine's thread sends: an output, the error that ended the request, or what was matched (own cache, pool), in tokens."""


class EngineSequence:
    """See hosting.engine.Sequence. The event loop's half of a request."""

    def __init__(self, engine: "Engine", request: Request) -> None:
        """`request` as it was submitted."""
        self.request_id = request.request_id
        self._engine, self._request, self._num_known = engine, request, request.num_tokens
        self._outputs: asyncio.Queue[GenerateOutput | BatonError] = asyncio.Queue()
        self._matched: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self.ended = False  # told its end, or cancelled

    async def matched(self) -> tuple[int, int]:
        return await asyncio.shield(self._matched)

    def offer_blocks(self, num_blocks: int) -> None:
        self._engine.post_to(self.request_id, lambda entry: self._engine.loader.offer(entry.feed, num_blocks))

    async def reserve(self, beyond: int = 0) -> PushTarget | None:
        answer: Future[PushTarget | None] = Future()
        self._engine.reserve(self.request_id, beyond, answer.set_result)
        reserved = asyncio.wrap_future(answer)
        try:
            return await asyncio.shield(reserved)
        except asyncio.CancelledError:
            reserved.add_done_callback(self._give_back)
            raise

    def _give_back(self, reserved: asyncio.Future[PushTarget | None]) -> None:
        """Of who has gone meanwhile: nobody else knows of the lease."""
        target = reserved.result()
        if target is not None:
            self._engine.leases.settle(target.lease)

    def blocks_pushed(self, lease: str, num_blocks: int, sums: tuple[int, ...] = ()) -> None:
        self._engine.post_to(self.request_id, lambda entry: self._engine.reservations.arrived(lease, num_blocks, sums))

    def push_token(self, token: OutputToken) -> None:
        """Told at once, before the engine's thread knows of it; but the last token of all comes with the finish reason, from there."""
        told = not self.ended and self._request.ends_with(self._num_known, token.token_id) is None
        self._num_known += 1
        if told:
            self._outputs.put_nowait(GenerateOutput(tokens=(token,)))
        self._engine.post_to(self.request_id, lambda entry: self._engine.push(entry, token, told=told))

    def release(self) -> None:
        self._engine.post_to(self.request_id, lambda entry: self._engine.loader.release(entry.feed))

    async def __aiter__(self) -> AsyncIterator[GenerateOutput]:
        while True:
            output = await self._outputs.get()
            if isinstance(output, BatonError):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    def close(self) -> None:
        if not self.ended:
            self._end()
            self._outputs.put_nowait(GenerateOutput(finish_reason=FinishReason.ABORT))
            self._engine.cancel(self)

    def deliver(self, output: Delivery) -> None:
        """On the event loop."""
        if isinstance(output, tuple):
            if not self._matched.done():
                self._matched.set_result(output)
            return
        self._outputs.put_nowait(output)
        if isinstance(output, BatonError) or output.finish_reason is not None:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self._engine.ended(self)
        if not self._matched.done():
            self._matched.set_result((0, 0))
