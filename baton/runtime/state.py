"""StatePublisher: an engine's state, streamed to any number of readers.

A reader gets a snapshot first, then changes with rising sequence numbers, coalesced to one message in `MIN_INTERVAL_S`, and a heartbeat
every `HEARTBEAT_S`. A reader that falls behind loses its backlog and gets a new snapshot.

What an engine has in hand changes while its thread is in a step, too: requests come and are cancelled on the event loop. So its state has a
lock, which the thread holds but for while it waits, or a step is computed (`elsewhere`); then the event loop tells what there is to tell.
All but `StateReader`, `open`, `changed` and `close` belongs to whoever has the lock.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from baton.kv.holdings import Holdings
from baton.runtime.census import Census
from baton.scheduling.blocks import BlockPool
from baton.types import BlocksStored, Digest, KVEvent, MemberState, StateUpdate

MIN_INTERVAL_S = 0.02
HEARTBEAT_S = 1.0
MAX_BACKLOG = 256  # messages
_BUSY_S = 0.002  # until the event loop looks again whether the engine's thread has left its state alone


class StateReader:
    """The event loop's end of one subscription."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._backlog: asyncio.Queue[StateUpdate | None] = asyncio.Queue()
        self._lagging = False

    async def next(self) -> StateUpdate | None:
        """The next message; None when messages were lost and the reader must subscribe again."""
        return await self._backlog.get()

    def send(self, update: StateUpdate) -> None:
        """From the engine's thread."""
        self._loop.call_soon_threadsafe(self._take, update)

    def _take(self, update: StateUpdate) -> None:
        if update.snapshot:
            self._lagging = False
        if self._lagging:
            return
        if self._backlog.qsize() >= MAX_BACKLOG:
            self._lagging = True
            while not self._backlog.empty():
                self._backlog.get_nowait()
            self._backlog.put_nowait(None)
        else:
            self._backlog.put_nowait(update)


class StatePublisher:
    def __init__(
        self, census: Census, pool: BlockPool, holdings: Sequence[Holdings] = (), news: Callable[[], list[KVEvent]] = list
    ) -> None:
        """`holdings`: of this worker's own tiers behind the device. `news`: what it has noticed of tiers that it shares, since the last
        call; of those there is no snapshot."""
        self._census, self._pool, self._holdings, self._news = census, pool, holdings, news
        self.lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None  # the event loop will look
        self._arrived: list[str] = []
        self._readers: dict[StateReader, None] = {}
        self._pending: list[KVEvent] = []
        self._sequence = 0
        self._sent_at = 0.0
        self.load = self._sent = census.measure()
        self._dirty = False
        self._digests: list[Digest] = []  # of the holdings, after what is pending
        self._drain()

    # -- the event loop's side

    def open(self) -> None:
        """Once, on the event loop, before the engine's thread runs."""
        self._loop = asyncio.get_running_loop()

    def changed(self) -> None:
        """Something has come or gone that the engine's thread may not know of: it is told at once, or as soon as it is time."""
        if self._timer is None and self._loop is not None:
            self._look()

    def arrives(self) -> None:
        """Something has come that the engine's thread is about to take in: it tells of it unless it is busy, and is not held up by it."""
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(_BUSY_S, self._look)

    def close(self) -> None:
        """Nothing is told any more, but by the engine's thread."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer, wait = None, _BUSY_S
        if self.lock.acquire(blocking=False):
            try:
                self.publish(now := time.monotonic())
                wait = self.wait(now) if self._dirty else 0.0
            finally:
                self.lock.release()
        if wait > 0 and self._loop is not None:
            self._timer = self._loop.call_later(wait, self._look)

    # -- whoever has the lock

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """The engine's thread leaves the state alone for a while. What it had no time to tell yet, the event loop will."""
        loop = self._loop  # it may end meanwhile
        if self._dirty and self._timer is None and loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self.changed)
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def subscribe(self, reader: StateReader) -> None:
        self._drain()
        self._send_all()
        held = [holdings.snapshot() for holdings in self._holdings]
        events = BlocksStored(self._pool.hashes()), *(event for event, _ in held)
        reader.send(self._update(events, [digest for _, digest in held], snapshot=True))
        self._readers[reader] = None

    def unsubscribe(self, reader: StateReader) -> None:
        self._readers.pop(reader, None)

    def publish(self, now: float) -> None:
        """Sends what has changed, or a heartbeat, if it is time; else nobody has to know what has changed, which takes its time to find."""
        if now - self._sent_at < MIN_INTERVAL_S:
            self._dirty = True  # for all that is known
            return
        self._drain()
        self.measure()
        self._dirty = bool(self._pending or self._arrived) or self.load != self._sent
        if self._dirty or now - self._sent_at >= HEARTBEAT_S:
            self._send_all()
            self._sent_at = now

    def measure(self) -> None:
        self._arrived += self._census.take_arrived()
        self.load = self._census.measure()

    def wait(self, now: float) -> float:
        """Seconds until `publish` has something to send."""
        return self._sent_at + (MIN_INTERVAL_S if self._dirty else HEARTBEAT_S) - now

    def _send_all(self) -> None:
        self._sequence += 1
        events, self._pending = tuple(self._pending), []
        arrived, self._arrived = tuple(self._arrived), []
        self._dirty, self._sent = False, self.load
        update = self._update(events, self._digests, arrived=arrived)
        for reader in list(self._readers):
            try:
                reader.send(update)
            except RuntimeError:  # its loop is closed
                self.unsubscribe(reader)

    def _drain(self) -> None:
        self._pending += [*self._pool.drain_events(), *self._news()]
        told = [holdings.drain() for holdings in self._holdings]
        self._pending += [event for events, _ in told for event in events]
        self._digests = [digest for _, digest in told]

    def _update(self, events: Sequence[KVEvent], digests: Sequence[Digest], **more: Any) -> StateUpdate:
        """`digests`: of the holdings, after `events`."""
        state, digests = MemberState.READY, (self._pool.journal.digest, *digests)
        return StateUpdate(sequence=self._sequence, state=state, load=self.load, events=tuple(events), digests=digests, **more)
