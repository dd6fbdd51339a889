"""KVTransfer: one tier, that is a KVStore whose blocking calls are made on threads of their own, so that nobody else waits for them.

One thread looks up, one loads, one saves. What fails is left alone for a while (a breaker for each kind of call: a lookup asks the
pool's master alone, so its success says nothing of the nodes): meanwhile such calls are misses at once, then one call probes. While a call
hangs, further ones are misses at once, too. Measures how fast the store gives blocks. Torch-free. Knows nothing of requests; what a miss
means is the caller's business.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from baton.errors import StoreError
from baton.kv.holdings import Holdings
from baton.kv.store import Buffer, KVStore, Usage
from baton.scheduling.fetching import Rate

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 5.0
DOUBT_S = 0.5  # a lookup in hand for longer is not what others should wait behind
STALLED_S = 3.0  # a call in hand for longer hangs; a store gives up a node that is stopped after 2
MAX_QUEUED = 1024  # calls per thread; more are misses at once
CLOSE_S = 10.0  # a call that hangs for longer is left behind with its thread


@dataclass(slots=True)
class TransferStats:
    """Totals since the start; blocks, bytes and seconds of calls that went through."""

    blocks_loaded: int = 0
    blocks_missed: int = 0
    blocks_saved: int = 0
    blocks_refused: int = 0
    bytes_loaded: int = 0
    bytes_saved: int = 0
    seconds_loading: float = 0.0
    seconds_saving: float = 0.0
    blocks_near: int = 0  # of those loaded: copied from memory that a process of this machine shares (kv.neighbours)
    blocks_verified: int = 0  # of a pool: those whose seals were compared
    blocks_corrupt: int = 0
    failures: int = 0
    skipped: int = 0  # calls not made because the store was left alone, or the queue was full
    blocks_declined: int = 0  # found, but computed instead, which was predicted to be faster
    blocks_left_out: int = 0  # not saved, since too many others waited for that

    def values(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Breaker:
    """Open after a failure, for a back-off that doubles with each further one. Thread-safe enough: losing a race costs one call."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._backoff = 0.0
        self._until = 0.0
        self.in_hand = 0  # calls made and not answered yet

    @property
    def open(self) -> bool:
        return time.monotonic() < self._until

    @property
    def probing(self) -> bool:
        """The back-off is over, and no call has gone through since."""
        return self._backoff > 0 and not self.open

    def failed(self, error: Exception) -> None:
        if not self._backoff:
            logger.warning("KV %s: %s; going on without it", self._kind, error)
        self._backoff = min(max(self._backoff * 2, FIRST_BACKOFF_S), MAX_BACKOFF_S)
        self._until = time.monotonic() + self._backoff

    def worked(self) -> None:
        if self._backoff:
            logger.info("KV %s: back again", self._kind)
        self._backoff = self._until = 0.0


class _Lane:
    """One thread that makes calls one after the other."""

    def __init__(self, name: str) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_QUEUED)
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """How long the call in hand takes already; 0 without one."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, call: Callable[[], None]) -> bool:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            return False
        return True

    def flush(self, limit_s: float) -> bool:
        """Waits until the calls that are there have been made; False where that takes longer."""
        with self._queue.all_tasks_done:
            return self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, limit_s)

    def end(self, limit_s: float) -> bool:
        """After the calls already there; False where they take longer."""
        deadline = time.monotonic() + limit_s
        try:
            self._queue.put(None, timeout=limit_s)
        except queue.Full:
            return False
        self._thread.join(max(deadline - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            self._busy_since = time.monotonic()
            try:
                call()
            except Exception:
                logger.exception("what a KV transfer should tell could not be told")
            finally:
                self._busy_since = None
                self._queue.task_done()


class KVTransfer:
    """`done` of each call is called exactly once: on an I/O thread, or at once, by the caller's, where the call is not made."""

    def __init__(
        self,
        store: KVStore,
        name: str = "pool",
        *,
        shared: bool = True,
        direct: bool = True,
        usage: Callable[[], Usage] | None = None,
        stats: TransferStats | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        """`shared`: other workers can read what is saved here. `direct`: is saved to from the device, rather than from another tier.
        `stats`: where the store counts, too. `holdings`: what the store keeps up to date, if it is this worker's own."""
        self.name, self.shared, self.direct, self.holdings = name, shared, direct, holdings
        self._store, self._usage = store, usage
        self._lookup_breaker, self._load_breaker, self._save_breaker = (_Breaker(f"{name}, {kind}") for kind in ("lookup", "load", "save"))
        self.stats, self._rate = stats or TransferStats(), Rate()
        self._lookups, self._loads, self._saves = (_Lane(f"kv-{name}-{kind}") for kind in ("lookup", "load", "save"))
        self._lock = threading.Lock()
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether the store answered last time, and does not hang now."""
        breakers = (self._lookup_breaker, self._load_breaker, self._save_breaker)
        longest = max(lane.busy_s for lane in (self._lookups, self._loads, self._saves))
        return not any(breaker.open for breaker in breakers) and longest < STALLED_S

    @property
    def doubtful(self) -> bool:
        """Whether a lookup may well hang: the last one failed, or one has been in hand for long."""
        return self._lookup_breaker.probing or self._lookups.busy_s > DOUBT_S

    def values(self) -> dict[str, float]:
        return {**self.stats.values(), **(asdict(self._usage()) if self._usage is not None else {})}

    def seconds(self, nbytes: int) -> float:
        """Predicted for loading so much, from what loading took; 0 while nothing was measured."""
        return self._rate.seconds(nbytes)

    def decline(self, num_blocks: int) -> None:
        """What was found here is computed instead."""
        self.stats.blocks_declined += num_blocks

    def leave_out(self, num_blocks: int) -> None:
        """What would be saved here is not, since this tier is behind with its saves."""
        self.stats.blocks_left_out += num_blocks

    def lookup(self, keys: Sequence[str], done: Callable[[list[bool]], None]) -> None:
        """`done(found)`: which keys can be read now."""
        if self._load_breaker.open or self._loads.busy_s > STALLED_S:  # what is found could not be loaded
            self._skip([False] * len(keys), done)
        else:
            self._submit(self._lookups, self._lookup_breaker, lambda: self._store.contains(keys), [False] * len(keys), done)

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        """`done(found)`, a flag for each key; from then on nothing is written to the buffers."""

        def call() -> list[bool]:
            started = time.monotonic()
            found = self._store.get(keys, buffers)
            seconds, nbytes = time.monotonic() - started, _bytes(buffers, found)
            self._rate.add(nbytes, seconds)
            self.stats.seconds_loading += seconds
            self.stats.blocks_loaded += sum(found)
            self.stats.blocks_missed += len(found) - sum(found)
            self.stats.bytes_loaded += nbytes
            return found

        self._submit(self._loads, self._load_breaker, call, [False] * len(keys), done)

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        """`done(stored)`, a flag for each key; the buffers must keep their content until then."""

        def call() -> list[bool]:
            started = time.monotonic()
            stored = self._store.put(keys, buffers)
            self.stats.seconds_saving += time.monotonic() - started
            self.stats.blocks_saved += sum(stored)
            self.stats.blocks_refused += len(stored) - sum(stored)
            self.stats.bytes_saved += _bytes(buffers, stored)
            return stored

        self._submit(self._saves, self._save_breaker, call, [False] * len(keys), done)

    def flush(self, limit_s: float) -> None:
        """Before `close`: waits until what was given to be saved has been, or has failed; for `limit_s` at most."""
        if not self._closed and not self._saves.flush(limit_s):
            logger.warning("KV %s: what is still to be saved is lost", self.name)

    def close(self) -> None:
        """Ends the threads after the calls in hand; calls still queued are misses. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + CLOSE_S
        ended = [lane.end(max(deadline - time.monotonic(), 0)) for lane in (self._lookups, self._loads, self._saves)]
        if all(ended):
            self._store.close()
        else:
            logger.warning("KV %s: a call hangs; its thread is left behind", self.name)

    def _submit(self, lane: _Lane, breaker: _Breaker, call: Callable[[], T], miss: T, done: Callable[[T], None]) -> None:
        with self._lock:  # nothing enters a lane behind its end
            left_alone = self._closed or breaker.open or (breaker.probing and breaker.in_hand) or lane.busy_s > STALLED_S
            if not left_alone and lane.submit(lambda: done(self._make(breaker, call, miss))):
                breaker.in_hand += 1
                return
        self._skip(miss, done)

    def _skip(self, miss: T, done: Callable[[T], None]) -> None:
        with self._lock:
            self.stats.skipped += 1
        done(miss)

    def _make(self, breaker: _Breaker, call: Callable[[], T], miss: T) -> T:
        if self._closed or breaker.open:
            with self._lock:
                self.stats.skipped += 1
                breaker.in_hand -= 1
            return miss
        try:
            result = call()
        except Exception as error:
            if not isinstance(error, StoreError):
                logger.exception("the KV store failed in a way that its adapter does not know")
            with self._lock:
                self.stats.failures += 1
                breaker.failed(error)
                breaker.in_hand -= 1
            return miss
        with self._lock:
            breaker.worked()
            breaker.in_hand -= 1
        return result


def _bytes(buffers: Sequence[Buffer], moved: Sequence[bool]) -> int:
    return sum(buffer.nbytes for buffer, good in zip(buffers, moved, strict=True) if good)
