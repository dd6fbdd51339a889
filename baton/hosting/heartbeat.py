"""Streams that are never silent: so that silence means a lost peer."""

import asyncio
from collections.abc import AsyncIterator

from baton.types import GenerateOutput


async def with_heartbeat(outputs: AsyncIterator[GenerateOutput], interval_s: float) -> AsyncIterator[GenerateOutput]:
    """The outputs, and an empty one whenever none came for `interval_s`."""
    pending: asyncio.Task[GenerateOutput] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(outputs))
            done, _ = await asyncio.wait([pending], timeout=interval_s)
            if not done:
                yield GenerateOutput()
                continue
            try:
                output = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield output
    finally:
        if pending is not None:
            pending.cancel()


async def _next(outputs: AsyncIterator[GenerateOutput]) -> GenerateOutput:
    return await anext(outputs)
