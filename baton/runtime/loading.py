"""Traffic between a worker's KV blocks and the KV pool, both ways, for the engine's thread.

Loading is prefetch into the prefix cache. A submitted request goes through here before the scheduler sees it:

    start ─▶ lookup (pool) ─▶ load what was found ─▶ [held: load what gets offered, until released] ─▶ ready
                 │ budget            │ budget
                 └───────────────────┴──▶ what is missing gets computed

Loaded blocks are registered under their hashes and pinned; the scheduler's ordinary match finds them. A call that takes longer than its
budget is given up as a miss, but its blocks stay taken until it has really returned, because it may still write.

Saving pins each block until its call has returned. Neither ever makes a request fail.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.kv.store import Buffer
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request

MAX_SAVING_FRACTION = 0.5  # of all blocks may wait to be saved; beyond, saves are skipped
MAX_BLOCKS_PER_LOAD = 64  # one call's worth: smaller calls give earlier progress


class Transfer(Protocol):
    """`kv.transfer`, as far as it is needed here. `done` is called exactly once, on any thread."""

    def lookup(self, keys: Sequence[str], done: Callable[[int], None]) -> None: ...

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Feed:
    """What one request gets from the pool and gives to it."""

    request: Request
    hold: bool
    await_saves: bool
    num_tokens: int = 0  # known at the start
    num_blocks: int = 0  # full blocks of them
    num_matched: int = 0  # leading blocks of the own prefix cache at the start
    num_found: int = 0  # leading blocks that are here or were in the pool at the start
    num_available: int = 0  # leading blocks that are here or in the pool by now
    num_loaded: int = 0  # leading blocks that are here
    looked_up: bool = False
    ready: bool = False
    closed: bool = False
    deadline: float | None = None  # of the call in flight
    given_up: bool = False  # a call failed or took too long: load no more
    in_flight: list[int] = field(default_factory=list[int])
    saved: set[int] = field(default_factory=set[int])  # block indices known to be in the pool
    num_saved_blocks: int = 0  # leading run of `saved`
    num_saving: int = 0
    saves_deadline: float | None = None  # set when nothing but saves is awaited
    saves_given_up: bool = False

    @property
    def saves_ended(self) -> bool:
        return self.num_saving == 0 or self.saves_given_up


class Loader:
    """`post` runs a function on the engine's thread; `after_steps` too, once blocks that are free by now are written by no step any more.
    `on_ready`, `on_matched` and `on_saved` are called on that thread."""

    def __init__(
        self,
        cache: KVCache,
        transfer: Transfer,
        *,
        key: Callable[[bytes], str],
        buffer: Callable[[int], Buffer],
        budget_s: float,
        post: Callable[[Callable[[], None]], None],
        after_steps: Callable[[Callable[[], None]], None],
        on_matched: Callable[[Feed], None],
        on_ready: Callable[[Feed], None],
        on_saved: Callable[[Feed], None],
    ) -> None:
        self._cache, self._transfer, self._key, self._buffer = cache, transfer, key, buffer
        self._budget_s, self._post, self._after_steps = budget_s, post, after_steps
        self._on_matched, self._on_ready, self._on_saved = on_matched, on_ready, on_saved
        self._taken: dict[int, list[int]] = {}  # blocks of calls in flight, by call
        self._calls = 0
        self._feeds: dict[Feed, None] = {}  # with a deadline, oldest first
        self._num_saving = 0
        self.num_skipped_saves = 0

    # -- loading

    def start(self, feed: Feed) -> None:
        """Looks up what the own cache and the pool have of the request's known tokens."""
        request, cache = feed.request, self._cache
        feed.num_tokens, feed.num_blocks = request.num_tokens, len(request.block_hashes)
        matched = cache.match(request)
        cache.pool.reuse(matched)
        cache.pin(request.request_id, matched)
        feed.num_matched = feed.num_found = feed.num_available = feed.num_loaded = len(matched)
        first = 0 if feed.await_saves else len(matched)
        last = feed.num_blocks if feed.await_saves else cache.num_matchable_blocks(request)
        if first >= last:
            self._looked_up(feed, first, 0)
            return
        self._expect(feed)
        keys = [self._key(key) for key in request.block_hashes[first:last]]
        self._transfer.lookup(keys, lambda count: self._post(lambda: self._looked_up(feed, first, count)))

    def offer(self, feed: Feed, num_blocks: int) -> None:
        """The pool holds the first `num_blocks` full blocks by now."""
        feed.num_available = max(feed.num_available, min(num_blocks, feed.num_blocks))
        self._advance(feed)

    def release(self, feed: Feed) -> None:
        feed.hold = False
        self._advance(feed)

    def close(self, feed: Feed) -> None:
        """The request is gone. Calls in flight keep their blocks until they return."""
        feed.closed = True
        self._feeds.pop(feed, None)
        self._cache.unpin(feed.request.request_id)

    def _looked_up(self, feed: Feed, first: int, count: int) -> None:
        if feed.closed or feed.looked_up:
            return
        self._settle(feed)
        feed.looked_up = True
        feed.saved.update(range(first, first + count))
        self._count_saved(feed)
        limit = self._cache.num_matchable_blocks(feed.request)
        feed.num_available = feed.num_found = max(feed.num_matched, min(first + count, limit))
        self._on_matched(feed)
        self._advance(feed)

    def _advance(self, feed: Feed) -> None:
        """Starts the next load, or hands the request to the scheduler when nothing is left to wait for."""
        if feed.closed or feed.ready or not feed.looked_up or feed.in_flight:
            return
        end = min(feed.num_available, self._cache.num_matchable_blocks(feed.request), feed.num_loaded + MAX_BLOCKS_PER_LOAD)
        count = min(end - feed.num_loaded, self._cache.pool.num_free)
        if count > 0 and not feed.given_up:
            self._load(feed, count)
        elif not feed.hold:
            feed.ready = True
            self._on_ready(feed)

    def _load(self, feed: Feed, count: int) -> None:
        feed.in_flight = self._cache.pool.take(count)
        hashes = feed.request.block_hashes[feed.num_loaded : feed.num_loaded + count]
        call = self._calls = self._calls + 1
        self._taken[call] = feed.in_flight
        self._expect(feed)
        keys, buffers = [self._key(key) for key in hashes], [self._buffer(block_id) for block_id in feed.in_flight]

        def loaded(found: list[bool]) -> None:
            self._post(lambda: self._loaded(feed, call, hashes, found))

        self._after_steps(lambda: self._transfer.load(keys, buffers, loaded))

    def _loaded(self, feed: Feed, call: int, hashes: list[bytes], found: list[bool]) -> None:
        block_ids = self._taken.pop(call)
        good = found.index(False) if False in found else len(found)
        if feed.closed or feed.given_up:
            good = 0
        self._cache.pool.release(block_ids[good:])
        self._cache.pool.register(block_ids[:good], hashes[:good])
        if feed.closed or feed.in_flight is not block_ids:
            return
        self._settle(feed)
        self._cache.pin(feed.request.request_id, block_ids[:good])
        feed.saved.update(range(feed.num_loaded, feed.num_loaded + good))
        feed.num_loaded += good
        feed.in_flight = []
        feed.given_up = feed.given_up or good < len(found)
        self._advance(feed)

    # -- saving

    def save_new(self, feed: Feed, block_ids: Sequence[int], start: int, end: int) -> None:
        """Tokens start … end were just computed: saves the blocks that became full. `block_ids` are the request's."""
        first, last = start // self._cache.block_size, end // self._cache.block_size
        if last > first:
            self.save(feed, block_ids, range(first, last))

    def save_matched(self, feed: Feed) -> None:
        """For a prefill: the cached blocks of its prompt that the pool lacks. Called when the request was admitted."""
        blocks = range(min(feed.request.num_computed_tokens // self._cache.block_size, feed.num_blocks))
        self.save(feed, feed.request.block_ids, blocks)

    def save(self, feed: Feed, block_ids: Sequence[int], indices: Sequence[int]) -> None:
        indices = [index for index in indices if index not in feed.saved]
        if not indices:
            return
        if self._num_saving + len(indices) > self._cache.pool.num_blocks * MAX_SAVING_FRACTION:
            self.num_skipped_saves += len(indices)
            return
        pinned = [block_ids[index] for index in indices]
        keys = [self._key(feed.request.block_hashes[index]) for index in indices]
        self._cache.pool.reuse(pinned)
        call = self._calls = self._calls + 1
        self._taken[call] = pinned
        self._num_saving += len(pinned)
        feed.num_saving += 1
        self._transfer.save(
            keys,
            [self._buffer(block_id) for block_id in pinned],
            lambda stored: self._post(lambda: self._saved(feed, call, indices, stored)),
        )

    def _saved(self, feed: Feed, call: int, indices: Sequence[int], stored: list[bool]) -> None:
        pinned = self._taken.pop(call)
        self._cache.pool.release(pinned)
        self._num_saving -= len(pinned)
        feed.num_saving -= 1
        feed.saved.update(index for index, good in zip(indices, stored, strict=True) if good)
        self._count_saved(feed)
        if not feed.closed:
            self._on_saved(feed)

    def await_saves(self, feed: Feed) -> None:
        """All is computed: what is not saved within the budget is given up, and `on_saved` called."""
        feed.saves_deadline = time.monotonic() + self._budget_s
        self._feeds[feed] = None

    # -- time

    def tick(self, now: float) -> None:
        """Gives up calls that are past their deadline."""
        for feed in [feed for feed in self._feeds if feed.saves_deadline is not None and feed.saves_deadline <= now]:
            feed.saves_deadline, feed.saves_given_up = None, True
            self._feeds.pop(feed, None)
            self._on_saved(feed)
        for feed in [feed for feed in self._feeds if feed.deadline is not None and feed.deadline <= now]:
            self._settle(feed)
            feed.given_up = True
            if feed.looked_up:
                feed.in_flight = []
                self._advance(feed)
            else:
                self._looked_up(feed, 0, 0)

    @property
    def next_deadline(self) -> float | None:
        deadlines = (deadline for feed in self._feeds for deadline in (feed.deadline, feed.saves_deadline) if deadline is not None)
        return min(deadlines, default=None)

    def held(self) -> list[list[int]]:
        """Blocks of calls in flight, for the integrity check."""
        return list(self._taken.values())

    def _expect(self, feed: Feed) -> None:
        feed.deadline = time.monotonic() + self._budget_s
        self._feeds[feed] = None

    def _settle(self, feed: Feed) -> None:
        feed.deadline = None
        self._feeds.pop(feed, None)

    def _count_saved(self, feed: Feed) -> None:
        while feed.num_saved_blocks in feed.saved and feed.num_saved_blocks < feed.num_blocks:
            feed.num_saved_blocks += 1
