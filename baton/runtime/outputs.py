"""Outputs: what requests are told of what was computed for them, up to their end. Belongs to the engine's thread; what a step gives all of
them is delivered by one call on the event loop.

A request that has its last token may still wait for its KV to be where it was asked to be: the finish reason is kept back until then.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from baton.runtime.entry import Entry
from baton.runtime.feed import Feed
from baton.runtime.sequence import Delivery, EngineSequence
from baton.scheduling.plan import ScheduledRequest, StepResult
from baton.types import GenerateOutput, OutputToken


class Outputs:
    def __init__(self, *, await_saves: Callable[[Feed], None], end: Callable[[Entry], None]) -> None:
        """`await_saves` is told of a request that waits for nothing but its saves, `end` of one that waits for nothing."""
        self._await_saves, self._end = await_saves, end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queued: list[tuple[EngineSequence, Delivery]] = []

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Where they are delivered. Once, before the engine's thread runs."""
        self._loop = loop

    def tell(self, entry: Entry, delivery: Delivery) -> None:
        self._queued.append((entry.sequence, delivery))

    def computed(self, entry: Entry, item: ScheduledRequest, result: StepResult) -> None:
        """A step has computed `item` of the request."""
        request = entry.request
        first = item.end == request.num_prompt_tokens
        for offset, logprobs in enumerate(result.prompt_logprobs.get(request.request_id, ())):
            entry.prompt_logprobs[item.start + 1 + offset] = logprobs
        token = result.tokens.get(request.request_id) if item.samples else None
        output = GenerateOutput(
            tokens=(token,) if token is not None else (),
            prompt_logprobs=entry.take_prompt_logprobs() if token is not None and first else (),
            num_computed_tokens=item.end,
            num_saved_blocks=entry.num_saved_blocks,
            num_pushed_blocks=entry.num_pushed_blocks,
            pushed_sums=entry.pushed_sums,
            cache=request.cache,
            fetches=entry.feed.take_fetches() if entry.feed.fetches else (),
        )
        self._emit(entry, output)

    def pushed(self, entry: Entry, token: OutputToken) -> None:
        """A token was sampled elsewhere."""
        self._emit(entry, GenerateOutput(tokens=(token,), num_saved_blocks=entry.num_saved_blocks))

    def progressed(self, entry: Entry) -> None:
        """Some of its KV is where it was asked to be."""
        if entry.finish is not None and not entry.awaits:
            self._finish(entry, entry.finish)
        else:
            self.tell(entry, _with_kv(entry, GenerateOutput(num_computed_tokens=entry.request.num_computed_tokens)))

    def flush(self) -> bool:
        """Delivers what is queued. False where nobody listens any more."""
        if self._queued and self._loop is not None:
            batch, self._queued = self._queued, []
            try:
                self._loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop is closed
                return False
        return True

    def _emit(self, entry: Entry, output: GenerateOutput) -> None:
        """Queues an output; adds the finish reason, and ends the request, when it has one and nothing is awaited any more."""
        request = entry.request
        if request.finish_reason is not None:
            last = replace(output, finish_reason=request.finish_reason, stop_token_id=request.stop_token_id, cache=request.cache)
            if not entry.awaits:
                self._finish(entry, last)
                return
            entry.finish = replace(last, tokens=(), prompt_logprobs=())
            if entry.feed.await_saves:
                self._await_saves(entry.feed)
        self.tell(entry, output)

    def _finish(self, entry: Entry, last: GenerateOutput) -> None:
        self.tell(entry, _with_kv(entry, last))
        self._end(entry)


def _with_kv(entry: Entry, output: GenerateOutput) -> GenerateOutput:
    """And what is known of the request's KV elsewhere."""
    pushed, sums = entry.num_pushed_blocks, entry.pushed_sums
    return replace(output, num_saved_blocks=entry.num_saved_blocks, num_pushed_blocks=pushed, pushed_sums=sums)


def _deliver(batch: list[tuple[EngineSequence, Delivery]]) -> None:
    for sequence, output in batch:
        sequence.deliver(output)
