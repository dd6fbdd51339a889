"""KV that one worker writes straight into blocks which another has reserved, past the pool. Both halves, for the engine's thread.

    decode worker: Reservations                         prefill worker: Pusher
    takes blocks, says where they lie  ── PushTarget ─▶ pushes each as soon as its tokens are computed, the last one half full
    what has arrived joins the cache  ◀─ how many ────  and keeps its own until the push has ended
    settled: the rest is free again   ◀─ the lease is over: nothing of it is read or written any more

A push that fails or takes too long is given up at once; but a write that was given up may still happen. So its blocks stay taken: there
until it has settled, here until the lease has ended well or its session is fenced (docs/transfer.md).
"""

import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.kv.push import Door, PushResult, PushStatus
from baton.runtime.feed import Feed
from baton.scheduling.blocks import BlockPool
from baton.scheduling.cache import KVCache
from baton.types import LeaseEnd, PushTarget

logger = logging.getLogger(__name__)
MAX_RESERVED_FRACTION = 0.5  # of all blocks, unless it is one request's
_KEPT = 0.95  # of what a push counts for in `token_s`, after one more
_REMEMBERED = 4096  # leases that are over
Checksums = Callable[[Sequence[int]], list[int]]
"""Of blocks, whatever the number of ranks that share them."""


class Sender(Protocol):
    """All ranks' (`runtime.spread`). `done` and `settled` are each called once, on any thread; see `kv.push`."""

    def push(
        self,
        target: PushTarget,
        first: int,
        block_ids: Sequence[int],
        done: Callable[[PushResult], None],
        settled: Callable[[], None],
    ) -> None:
        """The blocks are the target's from its `first` one on."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    @property
    def doors(self) -> tuple[Door, ...]:
        """Of each rank. Replaced as a whole by a new generation."""
        ...

    @property
    def revocable(self) -> bool: ...

    def advance(self) -> None:
        """Nothing, until the generation before is fenced."""
        ...

    def fence(self) -> None:
        """May fail part-way, and be tried again."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Shipment:
    """What one request sends."""

    target: PushTarget
    on_progress: Callable[[], None]
    num_tokens: int  # that were known at its start: all their KV is sent
    num_sent: int  # leading blocks that were handed to the sender, or were never wanted
    num_arrived: int
    done: set[int] = field(default_factory=set[int])  # blocks that have arrived, beyond num_arrived
    num_open: int = 0  # pushes that have not ended
    num_unsettled: int = 0
    sums: list[int] = field(default_factory=list[int])  # of the blocks sent, with push.verify
    failed: bool = False
    dirty: bool = False  # a push has not ended well: some of its bytes may still land
    closed: bool = False
    waiting: list[Callable[[LeaseEnd], None]] = field(default_factory=list["Callable[[LeaseEnd], None]"])  # for the lease's end

    @property
    def end(self) -> int:
        return self.target.first_block + self.target.num_blocks

    @property
    def ended(self) -> bool:
        return self.num_open == 0 and (self.failed or self.num_arrived >= self.end)


class Pusher:
    def __init__(
        self,
        pool: BlockPool,
        sender: Sender | None,
        *,
        block_size: int,
        post: Callable[[Callable[[], None]], None],
        checksums: Checksums | None = None,
    ) -> None:
        """`checksums`: what is sent has them."""
        self._checksums = checksums
        self._pool, self._sender, self._size, self._post = pool, sender, block_size, post
        self._shipments: dict[str, Shipment] = {}  # by lease
        self._over: OrderedDict[str, LeaseEnd] = OrderedDict()
        self._taken: dict[int, list[int]] = {}
        self._calls = 0
        self._tokens = self._seconds = 0.0  # pushed, and what it took; faded

    @property
    def token_s(self) -> float:
        """Seconds that a token's KV is on its way, lately; 0 where none has gone."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def open(self, target: PushTarget, num_tokens: int, on_progress: Callable[[], None]) -> Shipment:
        """`on_progress` is called on the engine's thread when a push has ended, until the shipment is closed."""
        shipment = Shipment(target, on_progress, num_tokens, num_sent=target.first_block, num_arrived=target.first_block)
        fits = target.num_blocks and shipment.end <= -(-num_tokens // self._size)
        if self._sender is None or not fits or target.lease in self._over or target.lease in self._shipments:
            shipment.failed = True
        else:
            self._shipments[target.lease] = shipment
        return shipment

    def send(self, shipment: Shipment, block_ids: Sequence[int], num_computed: int) -> None:
        """The KV of the request's first tokens lies in its blocks now."""
        complete = num_computed >= shipment.num_tokens
        end = min(-(-shipment.num_tokens // self._size) if complete else num_computed // self._size, shipment.end)
        first = shipment.num_sent
        if end <= first or shipment.failed or shipment.closed or self._sender is None:
            return
        pinned = list(block_ids[first:end])
        self._pool.reuse(pinned)
        call = self._calls = self._calls + 1
        self._taken[call] = pinned
        shipment.num_sent = end
        shipment.num_open += 1
        shipment.num_unsettled += 1
        if self._checksums is not None:
            shipment.sums += self._checksums(pinned)

        def done(result: PushResult) -> None:
            self._post(lambda: self._ended(shipment, range(first, end), result))

        target, settled = shipment.target, lambda: self._post(lambda: self._settled(shipment, call))
        self._sender.push(target, first - target.first_block, pinned, done, settled)

    def close(self, shipment: Shipment) -> None:
        """The request is gone: nothing more is sent."""
        shipment.closed = True
        self._forget_if_over(shipment)

    def when_over(self, lease: str, done: Callable[[LeaseEnd], None]) -> None:
        """Ends the lease: nothing more is sent. Calls `done` when all that was sent has ended."""
        shipment = self._shipments.get(lease)
        if shipment is None:
            end = self._over.get(lease, LeaseEnd(known=False, clean=True))
            self._remember(lease, end)  # who asks again is told the same: to have been asked is not to have known
            done(end)
            return
        shipment.failed = True
        shipment.waiting.append(done)
        self._forget_if_over(shipment)

    def held(self) -> list[list[int]]:
        return list(self._taken.values())

    def stop(self) -> None:
        """The sender is closed: what is under way has ended."""
        for shipment in list(self._shipments.values()):
            shipment.failed = shipment.dirty = True
            shipment.num_unsettled = 0
            self._forget_if_over(shipment)

    def _ended(self, shipment: Shipment, blocks: range, result: PushResult) -> None:
        shipment.num_open -= 1
        shipment.dirty = shipment.dirty or result.lands_late
        if result.status is PushStatus.GOOD:
            self._tokens = _KEPT * self._tokens + len(blocks) * self._size
            self._seconds = _KEPT * self._seconds + result.seconds
            shipment.done.update(blocks)
            while shipment.num_arrived in shipment.done:
                shipment.done.discard(shipment.num_arrived)
                shipment.num_arrived += 1
        else:
            shipment.failed = True
        if not shipment.closed:
            shipment.on_progress()

    def _settled(self, shipment: Shipment, call: int) -> None:
        self._pool.release(self._taken.pop(call))
        shipment.num_unsettled -= 1
        self._forget_if_over(shipment)

    def _forget_if_over(self, shipment: Shipment) -> None:
        lease = shipment.target.lease
        if shipment.num_unsettled == 0 and (shipment.closed or shipment.failed) and self._shipments.get(lease) is shipment:
            del self._shipments[lease]
            end = LeaseEnd(known=True, clean=not shipment.dirty)
            self._remember(lease, end)
            for done in shipment.waiting:
                done(end)

    def _remember(self, lease: str, end: LeaseEnd) -> None:
        self._over[lease] = end
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Waiting:
    feed: Feed
    answer: Callable[[PushTarget | None], None]
    deadline: float


@dataclass(slots=True, eq=False)
class Reservation:
    feed: Feed
    doors: tuple[Door, ...]
    first: int  # block of the prompt
    block_ids: list[int]
    num_arrived: int = 0
    fenced: bool = False  # its sessions have ended: nothing writes there but its sender's device, over NVLink
    corrupt: bool = False  # the next block is not what was sent: none from there on is used


class Reservations:
    def __init__(
        self,
        cache: KVCache,
        receiver: Receiver | None,
        *,
        after_steps: Callable[[Callable[[], None]], None],
        patience_s: float,
        checksums: Checksums | None = None,
    ) -> None:
        """`after_steps` runs a function once blocks that are free by now are written by no step any more. Room is waited for as long as
        `patience_s`. `checksums`: those that come with a push are compared with them."""
        self._checksums = checksums
        self.values = {"push_verified": 0.0, "push_corrupt": 0.0}
        self._cache, self._receiver, self._after_steps = cache, receiver, after_steps
        self._by_lease: dict[str, Reservation] = {}
        self._patience_s = patience_s
        self._waiting: deque[_Waiting] = deque()

    def reserve(self, feed: Feed, answer: Callable[[PushTarget | None], None]) -> None:
        """Blocks for what is neither here nor in the pool of a request that was looked up, when there is room; None where there is none in
        time, or nothing is missing."""
        self._waiting.append(_Waiting(feed, answer, time.monotonic() + self._patience_s))
        self.serve()

    def serve(self) -> None:
        """Those who wait for room, in their order. Called between steps."""
        while self._waiting:
            first_in_line = self._waiting[0]
            feed, now = first_in_line.feed, time.monotonic()
            first = max(feed.num_found, len(self._cache.match(feed.request)))
            count = self._cache.blocks_for(feed.num_tokens) - first
            wanted = self._receiver is not None and count > 0 and feed.is_awaited
            room = wanted and self._has_room(count + max(feed.num_found - feed.num_loaded - len(feed.in_flight), 0))
            if wanted and not room and now < first_in_line.deadline:
                return
            self._waiting.popleft()
            if room:
                self._take(feed, first, count, first_in_line.answer)
            else:
                first_in_line.answer(None)

    @property
    def next_deadline(self) -> float | None:
        return self._waiting[0].deadline if self._waiting else None

    def _has_room(self, count: int) -> bool:
        pool = self._cache.pool
        reserved = sum(len(other.block_ids) - other.num_arrived for other in self._by_lease.values())
        return count <= pool.num_free and (not reserved or reserved + count <= MAX_RESERVED_FRACTION * pool.num_blocks)

    def _take(self, feed: Feed, first: int, count: int, answer: Callable[[PushTarget | None], None]) -> None:
        assert self._receiver is not None
        lease, doors = secrets.token_hex(8), self._receiver.doors
        reservation = Reservation(feed, doors, first, self._cache.pool.take(count))
        self._by_lease[lease] = reservation
        target = PushTarget(lease=lease, first_block=first, shards=tuple(door.shard(reservation.block_ids) for door in doors))
        self._after_steps(lambda: answer(target))

    def arrived(self, lease: str, num_blocks: int, sums: Sequence[int] = ()) -> None:
        """The first blocks of the prompt, this many, are known to have been written whole. `sums`: of those reserved, from the first on."""
        reservation = self._by_lease.get(lease)
        if reservation is None or reservation.corrupt:
            return
        feed, size, start = reservation.feed, self._cache.block_size, reservation.num_arrived
        reservation.num_arrived = max(start, min(num_blocks - reservation.first, len(reservation.block_ids)))
        if self._checksums is not None:
            reservation.num_arrived = self._verified(reservation, start, sums, self._checksums)
        for index in range(start, reservation.num_arrived):
            block_id, number = reservation.block_ids[index], reservation.first + index
            full = (number + 1) * size <= feed.num_tokens
            if full:
                self._cache.pool.register([block_id], [feed.request.block_hashes[number]])
            if not feed.is_awaited:
                self._cache.pool.release([block_id])
            elif full:
                self._cache.pin(feed.request.request_id, [block_id])
            else:
                self._cache.give_tail(feed.request.request_id, block_id, feed.num_tokens)

    def _verified(self, reservation: Reservation, start: int, sums: Sequence[int], checksums: Checksums) -> int:
        """How many have arrived as they were sent."""
        end = min(reservation.num_arrived, len(sums))
        for index, found in enumerate(checksums(reservation.block_ids[start:end]), start):
            self.values["push_verified"] += 1
            if found != sums[index]:
                self.values["push_corrupt"] += 1
                reservation.corrupt = True
                request = reservation.feed.request.request_id
                logger.critical(
                    "block %d of %s was pushed here and is not what was sent; it is not used", reservation.first + index, request
                )
                return index
        return reservation.num_arrived

    def is_open(self, lease: str) -> bool:
        """Whether it has blocks, and sessions that no fence has ended."""
        reservation = self._by_lease.get(lease)
        return reservation is not None and not reservation.fenced

    def settle(self, lease: str) -> None:
        """Nothing of the lease is written any more: what has not arrived is free. Idempotent."""
        reservation = self._by_lease.pop(lease, None)
        if reservation is not None:
            self._cache.pool.release(reservation.block_ids[reservation.num_arrived :])

    def end_old(self) -> None:
        """Sessions before the present one are fenced. Where that ends every write, their leases are settled; else they wait for their
        senders, but for no other fence."""
        for lease, reservation in list(self._by_lease.items()):
            if self._receiver is None or reservation.doors != self._receiver.doors:
                reservation.fenced = True
                if self._receiver is None or self._receiver.revocable:
                    self.settle(lease)

    def held(self) -> list[list[int]]:
        return [reservation.block_ids[reservation.num_arrived :] for reservation in self._by_lease.values()]
