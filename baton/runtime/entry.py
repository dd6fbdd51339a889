"""Entry: what the engine's thread keeps of a request beside the scheduler's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.runtime.feed import Feed
from baton.runtime.pushing import Shipment
from baton.runtime.sequence import EngineSequence
from baton.scheduling.request import Request, RequestStatus
from baton.types import CacheReport, GenerateOutput, TokenLogprobs


@dataclass(slots=True, eq=False)
class Entry:
    """The other half is `EngineSequence`, the event loop's."""

    request: Request
    feed: Feed
    sequence: EngineSequence
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict[int, TokenLogprobs])  # by position
    finish: GenerateOutput | None = None  # held back until the saves, or the pushes, have ended
    shipment: Shipment | None = None
    when_looked_up: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])  # or when it has ended before

    @property
    def is_computed(self) -> bool:
        """What is left is to tell somebody, or to wait for its KV to be where it was asked to be; or nobody waits for it any more."""
        return self.request.finish_reason is not None or self.sequence.ended

    @property
    def is_held(self) -> bool:
        """Somebody else computes its prompt."""
        return self.feed.hold and self.request.status is RequestStatus.LOADING

    @property
    def awaits(self) -> bool:
        """Its KV is not yet where it was asked to be."""
        return (self.feed.await_saves and not self.feed.saves_ended) or (self.shipment is not None and not self.shipment.ended)

    @property
    def num_saved_blocks(self) -> int:
        """To be told of: who gets the blocks pushed need not load them."""
        return 0 if self.shipment is not None and not self.shipment.failed else self.feed.num_saved_blocks

    @property
    def num_pushed_blocks(self) -> int:
        return 0 if self.shipment is None else self.shipment.num_arrived

    @property
    def pushed_sums(self) -> tuple[int, ...]:
        shipment = self.shipment
        return () if shipment is None else tuple(shipment.sums[: shipment.num_arrived - shipment.target.first_block])

    def cache_report(self, num_cached: int, block_size: int) -> CacheReport:
        """Of a request that is scheduled for the first time, with so many tokens computed."""
        prompt, feed = self.request.num_prompt_tokens, self.feed
        cached = min(num_cached, prompt)
        local = min(cached, feed.num_matched * block_size)
        pool = min(cached, feed.num_found * block_size) - local
        return CacheReport(num_prompt_tokens=prompt, num_local_tokens=local, num_pool_tokens=pool, num_prefill_tokens=cached - local - pool)

    def run_waiting(self) -> None:
        """What waited until it was looked up, or had ended."""
        waiting, self.when_looked_up = self.when_looked_up, []
        for action in waiting:
            action()

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        if self.request.sampling.prompt_logprobs is None:
            return ()
        return (None, *(self.prompt_logprobs[i] for i in range(1, self.request.num_prompt_tokens)))
