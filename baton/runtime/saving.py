"""Saver: saves blocks of KV to the tiers behind the device (host memory, KV pool, files). Belongs to the engine's thread.

What was computed goes to all tiers that are saved to directly, and so does a prefill's cached prompt, as far as they lack it; what was
pushed here, to private ones; what was loaded, to those faster than its own (`runtime.loading`). Each block is pinned until its call has
returned. A request may wait for its saves to shared tiers, no longer than the budget. Saving never makes one fail.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from baton.runtime.feed import Feed
from baton.runtime.tier import Tiers
from baton.scheduling.cache import KVCache

MAX_SAVING_FRACTION = 0.5  # of all blocks may wait to be saved; beyond, saves are skipped


class Saver:
    """`post` runs a function on the engine's thread; `on_saved` is called there."""

    def __init__(
        self,
        cache: KVCache,
        tiers: Tiers,
        *,
        budget_s: float,
        post: Callable[[Callable[[], None]], None],
        on_saved: Callable[[Feed], None],
    ) -> None:
        self._cache, self._tiers, self._budget_s, self._post, self._on_saved = cache, tiers, budget_s, post, on_saved
        self._taken: dict[int, list[int]] = {}  # blocks of calls in flight, by call
        self._calls = 0
        self._num_saving = Counter[int]()  # blocks, by tier
        self._awaited: dict[Feed, float] = {}  # with their deadlines, oldest first

    def save_new(self, feed: Feed, block_ids: Sequence[int], start: int, end: int) -> None:
        """Tokens start … end were just computed: saves the blocks that became full. `block_ids` are the request's."""
        first, last = start // self._cache.block_size, end // self._cache.block_size
        if last > first and self._tiers.direct:
            self.save(feed, {block: block_ids[block] for block in range(first, last)}, self._tiers.direct)

    def save_matched(self, feed: Feed) -> None:
        """Called when the request was admitted. For a prefill: saves the cached blocks of its prompt that tiers lack. Else those that were
        pushed here, which other workers save, to private tiers."""
        block_ids, end = feed.request.block_ids, min(feed.request.num_computed_tokens // self._cache.block_size, feed.num_blocks)
        if feed.await_saves:
            self.save(feed, {block: block_ids[block] for block in range(end)}, self._tiers.direct)
        elif self._tiers.private:
            self.save(feed, {block: block_ids[block] for block in range(feed.num_matched, end)}, self._tiers.private)

    def save(self, feed: Feed, blocks: dict[int, int], tiers: Sequence[int]) -> None:
        """To each of `tiers` what it lacks of `blocks`: device blocks by their number in the prompt."""
        for number in tiers:
            wanted = [block for block in blocks if block not in feed.kept[number]]
            room = max(int(self._cache.pool.num_blocks * MAX_SAVING_FRACTION / len(self._tiers.direct)) - self._num_saving[number], 0)
            if wanted[room:]:
                self._tiers[number].leave_out(len(wanted[room:]))
            if wanted[:room]:
                self._save_to(number, feed, wanted[:room], [blocks[block] for block in wanted[:room]])

    def await_saves(self, feed: Feed) -> None:
        """All is computed: what is not saved within the budget is given up, and `on_saved` called."""
        self._awaited[feed] = time.monotonic() + self._budget_s

    def close(self, feed: Feed) -> None:
        """The request is gone. What is being saved will be."""
        self._awaited.pop(feed, None)

    def tick(self, now: float) -> None:
        """Gives up waiting for saves that are past their deadline."""
        for feed in [feed for feed, deadline in self._awaited.items() if deadline <= now]:
            self._awaited.pop(feed, None)
            feed.saves_given_up = True
            self._on_saved(feed)

    @property
    def next_deadline(self) -> float | None:
        return min(self._awaited.values(), default=None)

    def held(self) -> list[list[int]]:
        """Blocks of calls in flight, for the integrity check."""
        return list(self._taken.values())

    def _save_to(self, number: int, feed: Feed, wanted: Sequence[int], pinned: list[int]) -> None:
        keys = [self._tiers.key(feed.request.block_hashes[block]) for block in wanted]
        self._cache.pool.reuse(pinned)
        call = self._calls = self._calls + 1
        self._taken[call] = pinned
        self._num_saving[number] += len(pinned)
        feed.num_saving += self._tiers[number].shared
        self._tiers[number].save(
            keys,
            [self._tiers.buffer(block_id) for block_id in pinned],
            lambda stored: self._post(lambda: self._saved(feed, call, number, wanted, stored)),
        )

    def _saved(self, feed: Feed, call: int, number: int, wanted: Sequence[int], stored: list[bool]) -> None:
        pinned, shared = self._taken.pop(call), self._tiers[number].shared
        self._cache.pool.release(pinned)
        self._num_saving[number] -= len(pinned)
        kept = [block for block, good in zip(wanted, stored, strict=True) if good]
        for block in kept:
            feed.keep(number, block, shared=shared)
        self._tiers.stored(number, [feed.request.block_hashes[block] for block in kept])
        if shared:
            feed.num_saving -= 1
            feed.count_saved()
            if not feed.closed:
                self._on_saved(feed)
