"""Loader: prefetch from the tiers behind the device (host memory, KV pool, files) into the prefix cache. Belongs to the engine's thread.

A submitted request goes through here before the scheduler sees it:

    start ─▶ lookup in all tiers ─▶ decide: fetch or compute ─▶ load ─▶ [held: load what gets offered, until released] ─▶ ready
                 │ budget                  ▲     │ nothing        │ budget, each call
                 └─────────────────────────┘     └────────────────┴──▶ what is missing gets computed

What a request has lost by the time that it is admitted goes the same way once more (`runtime.refetch`), but into blocks that are its own.

Each block comes from the fastest tier that has it, and is saved to those that are faster still (`runtime.saving`). Loaded blocks are
registered under their hashes and pinned; the scheduler's ordinary match finds them. A call that takes longer than its budget is given up as
a miss, and that tier with it for this request; but its blocks stay taken until it has really returned, because it may still write.
Loading never makes a request fail.
"""

import logging
import math
import time
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import compress, takewhile

from baton.runtime.feed import Feed
from baton.runtime.saving import Saver
from baton.runtime.tier import Tiers
from baton.scheduling.cache import KVCache
from baton.scheduling.fetching import num_to_fetch
from baton.scheduling.request import Request, RequestStatus
from baton.types import Fetch, Pace
from baton.types import Tier as TierName

logger = logging.getLogger(__name__)

MAX_BLOCKS_PER_LOAD = 64  # one call's worth: smaller calls give earlier progress
LOOKUP_SHARE = 0.5  # of the budget: a question, without data
SURPRISE = 1.5  # a tier that turns out to be so much slower than was assumed is decided about again
TOUCH_S = 60.0  # that a prefix on the device is not told again to be in use
_REMEMBERED = 4096  # such prefixes


class Loader:
    """`post` runs a function on the engine's thread; `after_steps` too, once blocks that are free by now are written by no step any more.
    `pace` tells what steps take here, `step_tokens` are the most of one, `backlog` gives the requests that the scheduler has. `on_ready`
    and `on_matched` are called on the engine's thread."""

    def __init__(
        self,
        cache: KVCache,
        tiers: Tiers,
        saver: Saver,
        *,
        budget_s: float,
        pace: Callable[[], Pace],
        step_tokens: int,
        backlog: Callable[[], Sequence[Request]],
        post: Callable[[Callable[[], None]], None],
        after_steps: Callable[[Callable[[], None]], None],
        on_matched: Callable[[Feed], None],
        on_ready: Callable[[Feed], None],
    ) -> None:
        self._cache, self._tiers, self._saver = cache, tiers, saver
        self._budget_s, self._post, self._after_steps = budget_s, post, after_steps
        self._pace, self._step_tokens, self._backlog = pace, step_tokens, backlog
        self._on_matched, self._on_ready = on_matched, on_ready
        self._taken: dict[int, list[int]] = {}  # blocks of calls in flight, by call
        self._calls = 0
        self._feeds: dict[Feed, None] = {}  # with a deadline, oldest first
        self._fetching: dict[Feed, None] = {}  # with something to load
        self._wanting: dict[Feed, None] = {}  # of them, those that wait for free blocks
        self._outlasting = [tier for tier in tiers if tier.name != TierName.HOST]
        self._touched: OrderedDict[bytes, float] = OrderedDict()  # last blocks of prefixes

    def start(self, feed: Feed) -> None:
        """Looks up what the own cache and the tiers have of the request's known tokens."""
        request, cache = feed.request, self._cache
        feed.num_tokens, feed.num_blocks = request.num_tokens, len(request.block_hashes)
        feed.decides = not feed.hold
        matched = cache.match(request)
        cache.pool.reuse(matched)
        cache.pin(request.request_id, matched)
        feed.num_matched = feed.num_found = feed.num_available = feed.num_loaded = len(matched)
        first, last = (0, feed.num_blocks) if feed.await_saves else (len(matched), cache.num_matchable_blocks(request))
        self._look_up(feed, range(first, last))
        if self._outlasting and first > 0:
            self._touch(request.block_hashes[:first])

    def fetch_again(self, feed: Feed) -> None:
        """The request is set aside, and has blocks: looks up what they lack, and fills them."""
        num_here = feed.request.num_computed_tokens // self._cache.block_size
        feed.next_refetch, feed.room_deadline = feed.request.num_preemptions + 1, None
        feed.num_matched = min(feed.num_matched, num_here)
        feed.num_available = feed.num_loaded = num_here
        feed.sources, feed.failed, feed.in_flight = {}, set(), []
        feed.looked_up, feed.ready, feed.decides = False, False, True
        self._look_up(feed, range(num_here, self._limit(feed)))

    def _limit(self, feed: Feed) -> int:
        """Leading blocks of which the request may have KV."""
        request, matchable = feed.request, self._cache.num_matchable_blocks(feed.request)
        if request.status is RequestStatus.LOADING:
            return matchable
        return min(matchable, len(request.block_hashes)) if request.status is RequestStatus.FETCHING else 0  # it was preempted meanwhile

    def _look_up(self, feed: Feed, asked: range) -> None:
        feed.asked = asked
        if not asked or not self._tiers:
            self._found(feed)
            return
        self._expect(feed, self._budget_s * LOOKUP_SHARE)
        keys = [self._tiers.key(key) for key in feed.request.block_hashes[asked.start : asked.stop]]
        feed.answered = {number for number, tier in enumerate(self._tiers) if tier.doubtful}
        for number, tier in enumerate(self._tiers):
            tier.lookup(keys, lambda held, number=number: self._post(lambda: self._looked_up(feed, number, asked, held)))
        if len(feed.answered) == len(self._tiers):
            self._found(feed)

    def _touch(self, prefix: Sequence[bytes]) -> None:
        """A lookup whose answer nobody needs: what is always found on the device is what tiers have not heard of for longest, and would
        drop first, though other workers may need it, and this one after a restart. Host memory better keeps what the device does not."""
        now = time.monotonic()
        if now - self._touched.get(prefix[-1], -TOUCH_S) < TOUCH_S:
            return
        self._touched[prefix[-1]] = now
        self._touched.move_to_end(prefix[-1])
        if len(self._touched) > _REMEMBERED:
            self._touched.popitem(last=False)
        keys = list(map(self._tiers.key, prefix))
        for tier in self._outlasting:
            tier.lookup(keys, lambda held: None)

    def offer(self, feed: Feed, num_blocks: int) -> None:
        """The shared tiers hold the first `num_blocks` full blocks by now."""
        num_blocks = min(num_blocks, feed.num_blocks)
        if not self._tiers.shared or not feed.is_awaited or num_blocks <= feed.num_available:
            return
        for block in range(feed.num_available, num_blocks):
            feed.sources[block] = sorted({*feed.sources.get(block, ()), *self._tiers.shared})
        feed.num_available = num_blocks
        self._advance(feed)

    def release(self, feed: Feed) -> None:
        feed.hold = False
        self._advance(feed)

    def close(self, feed: Feed) -> None:
        """The request is gone. Calls in flight keep their blocks until they return."""
        feed.closed = True
        self._feeds.pop(feed, None)
        self._fetching.pop(feed, None)
        self._wanting.pop(feed, None)
        self._cache.unpin(feed.request.request_id)

    def _looked_up(self, feed: Feed, number: int, asked: range, held: list[bool]) -> None:
        """A tier has answered. Slower ones are not waited for once all is found, unless it matters what they have; they may still help."""
        if feed.closed or feed.ready or feed.asked is not asked:
            return
        feed.answered.add(number)
        if False in held:
            self._tiers.missed(number, feed.request.block_hashes[asked[held.index(False)]])
        for block in compress(feed.asked, held):
            if number not in feed.sources.setdefault(block, []):
                insort(feed.sources[block], number)
            feed.keep(number, block, shared=self._tiers[number].shared)
        if feed.looked_up:
            return
        num_heard = next((other for other in range(len(self._tiers)) if other not in feed.answered), len(self._tiers))
        found_all = not feed.await_saves and all(block in feed.sources and feed.sources[block][0] < num_heard for block in feed.asked)
        if found_all or num_heard == len(self._tiers):
            self._found(feed)

    def _found(self, feed: Feed) -> None:
        """The lookup is over, whoever has answered."""
        self._settle(feed)
        feed.looked_up = True
        feed.count_saved()
        limit, end = self._limit(feed), feed.num_loaded
        while end < limit and end in feed.sources:
            end += 1
        feed.num_available = end
        self._decide(feed)
        feed.num_found = feed.num_available
        self._on_matched(feed)
        self._advance(feed)

    def _decide(self, feed: Feed) -> None:
        """Fetch or compute: lowers num_available to where computing is predicted to be faster."""
        start, end, size = feed.num_loaded, feed.num_available, self._cache.block_size
        if start >= end:
            return
        feed.assumed_s = {number: self._tiers.block_s(number) for number in range(len(self._tiers))}
        pace = self._pace()
        if not (pace.token_s or pace.pair_s):
            return
        queued = Counter[int]()
        for other in self._fetching:
            if other is not feed:
                queued[other.source_of(other.num_loaded) or 0] += other.num_available - other.num_loaded
        numbers = list(feed.sources_of(range(start, end)))
        fetch_s = [feed.assumed_s[number] * (1 + queued.pop(number, 0)) for number in numbers]
        compute_s = [self._compute_s(pace, size, block * size) for block in range(start, start + len(numbers))]
        missing = ((request.num_tokens - request.num_computed_tokens, request.num_computed_tokens) for request in self._backlog())
        wait_s = sum(self._compute_s(pace, count, position) for count, position in missing if count > 1)
        count = num_to_fetch(fetch_s, compute_s, wait_s)
        for number in numbers[count:]:
            self._tiers[number].decline(1)
        feed.num_available = start + count
        logger.debug(
            "%s: %d of %d blocks are fetched from %s: %.3g s to fetch all, %.3g s to compute them, %.3g s before the engine is free",
            feed.request.request_id, count, end - start, ", ".join(sorted({self._tiers[number].name for number in numbers})),
            sum(fetch_s), sum(compute_s), wait_s,
        )  # fmt: skip

    def _compute_s(self, pace: Pace, tokens: int, position: int) -> float:
        """With their share of the steps that they fill."""
        return pace.prompt_s(tokens, position) + pace.base_s * tokens / self._step_tokens

    def _advance(self, feed: Feed) -> None:
        """Starts the next load, or hands the request to the scheduler when nothing is left to wait for."""
        if feed.closed or feed.ready or not feed.looked_up or feed.in_flight:
            return
        number = self._next_source(feed)
        if number is not None and feed.decides and self._surprises(feed, number):
            self._decide(feed)
            number = self._next_source(feed)
        end = min(feed.num_available, self._limit(feed), feed.num_loaded + MAX_BLOCKS_PER_LOAD)
        if number is not None and end > feed.num_loaded:
            end = min(end, self._room(feed, end))
            self._fetching[feed] = None
            count = sum(1 for _ in takewhile(number.__eq__, feed.sources_of(range(feed.num_loaded, end))))
            if count:
                self._load(feed, number, count)
                return
            if self._wait_for_room(feed):
                return
        self._fetching.pop(feed, None)
        if not feed.hold:
            feed.ready = True
            self._on_ready(feed)

    def _surprises(self, feed: Feed, number: int) -> bool:
        return self._tiers.block_s(number) > SURPRISE * feed.assumed_s.get(number, math.inf)

    def _wait_for_room(self, feed: Feed) -> bool:
        """While others compute, they hold all blocks; a request that waits for memory anyway may as well fetch what it then gets."""
        now = time.monotonic()
        if feed.room_deadline is None:
            feed.room_deadline = now + self._budget_s
        others = [other for other in self._backlog() if other.status is RequestStatus.RUNNING or not feed.has_own_room]
        waits = now < feed.room_deadline and bool(others)
        if waits:
            self._wanting[feed] = None
        return waits

    def _next_source(self, feed: Feed) -> int | None:
        return feed.source_of(feed.num_loaded) if feed.num_loaded < feed.num_available else None

    def _load(self, feed: Feed, number: int, count: int) -> None:
        feed.source, feed.in_flight, feed.begun = number, self._take(feed, count), time.time()
        hashes = feed.request.block_hashes[feed.num_loaded : feed.num_loaded + count]
        call = self._calls = self._calls + 1
        self._taken[call] = feed.in_flight
        self._expect(feed, self._budget_s)
        keys, buffers = [self._tiers.key(key) for key in hashes], [self._tiers.buffer(block_id) for block_id in feed.in_flight]

        def loaded(found: list[bool]) -> None:
            self._post(lambda: self._loaded(feed, call, hashes, found))

        self._after_steps(lambda: self._tiers[number].load(keys, buffers, loaded))

    def _room(self, feed: Feed, end: int) -> int:
        """Leading blocks that there is memory for, if no more than `end` are wanted."""
        request, cache = feed.request, self._cache
        if not feed.has_own_room:
            return feed.num_loaded + cache.pool.num_free
        if not cache.extend(request, end * cache.block_size):
            cache.extend(request, min(end, len(request.block_ids) + cache.pool.num_free) * cache.block_size)
        return len(request.block_ids)

    def _take(self, feed: Feed, count: int) -> list[int]:
        if not feed.has_own_room:
            return self._cache.pool.take(count)
        own = feed.request.block_ids[feed.num_loaded : feed.num_loaded + count]
        self._cache.pool.reuse(own)  # the call may outlast the request
        return own

    def _loaded(self, feed: Feed, call: int, hashes: list[bytes], found: list[bool]) -> None:
        block_ids = self._taken.pop(call)
        late = feed.closed or feed.in_flight is not block_ids
        good = 0 if late else found.index(False) if False in found else len(found)
        self._cache.pool.release(block_ids[good:])
        self._cache.pool.register(block_ids[:good], hashes[:good])
        if late:
            return
        self._settle(feed)
        if feed.has_own_room:
            self._cache.pool.release(block_ids[:good])
        else:
            self._cache.pin(feed.request.request_id, block_ids[:good])
        first, number = feed.num_loaded, feed.source
        for block, hit in enumerate(found, first):
            if hit:
                feed.keep(number, block, shared=self._tiers[number].shared)
            else:
                feed.sources[block].remove(number)
                feed.kept[number].discard(block)
                if not feed.sources[block]:  # a later offer may have it again
                    feed.num_available = min(feed.num_available, block)
        feed.num_loaded += good
        feed.in_flight = []
        feed.fetches.append(Fetch(self._tiers[number].name, good, feed.begun, time.time() - feed.begun))
        faster = [other for other in self._tiers.direct if other < number]
        self._saver.save(feed, dict(enumerate(block_ids[:good], first)), faster)
        self._advance(feed)

    def tick(self, now: float) -> None:
        """Gives up calls that are past their deadline; loads on where there is room now."""
        for feed in list(self._wanting):
            del self._wanting[feed]
            self._advance(feed)
        for feed in [feed for feed in self._feeds if feed.deadline is not None and feed.deadline <= now]:
            self._settle(feed)
            if feed.looked_up:
                feed.failed.add(feed.source)
                feed.in_flight = []
                if feed.has_own_room:  # the call may still write where the next would
                    feed.num_available = feed.num_loaded
                self._advance(feed)
            else:
                self._found(feed)

    @property
    def next_deadline(self) -> float | None:
        if self._wanting:
            return 0.0
        return min((feed.deadline for feed in self._feeds if feed.deadline is not None), default=None)

    def held(self) -> list[list[int]]:
        """Blocks of calls in flight, for the integrity check."""
        return list(self._taken.values())

    def _expect(self, feed: Feed, within_s: float) -> None:
        feed.deadline = time.monotonic() + within_s
        self._feeds[feed] = None

    def _settle(self, feed: Feed) -> None:
        feed.deadline = None
        self._feeds.pop(feed, None)
