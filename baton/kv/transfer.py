"""KVTransfer: a KVStore's blocking calls on two threads of their own, so that nobody else waits for them.

One thread looks up and loads, the other saves. A store that fails is left alone for a while (a breaker): meanwhile every call is a miss at
once, then one call probes. Torch-free. Knows nothing of requests; what a miss means is the caller's business.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from baton.errors import StoreError
from baton.kv.store import Buffer, KVStore

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 5.0
MAX_QUEUED = 1024  # calls per thread; more are misses at once


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
    failures: int = 0
    skipped: int = 0  # calls not made because the store was left alone, or the queue was full

    def values(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Breaker:
    """Open after a failure, for a back-off that doubles with each further one. Thread-safe enough: losing a race costs one call."""

    def __init__(self) -> None:
        self._backoff = 0.0
        self._until = 0.0

    @property
    def open(self) -> bool:
        return time.monotonic() < self._until

    def failed(self, error: Exception) -> None:
        if not self._backoff:
            logger.warning("KV pool: %s; going on without it", error)
        self._backoff = min(max(self._backoff * 2, FIRST_BACKOFF_S), MAX_BACKOFF_S)
        self._until = time.monotonic() + self._backoff

    def worked(self) -> None:
        if self._backoff:
            logger.info("KV pool: back again")
        self._backoff = self._until = 0.0


class KVTransfer:
    """`done` of each call is called exactly once, on an I/O thread; at once where the call is not made."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._breaker = _Breaker()
        self.stats = TransferStats()
        self._queues = {name: queue.Queue[Callable[[], None] | None](MAX_QUEUED) for name in ("kv-load", "kv-save")}
        self._threads = [threading.Thread(target=self._serve, args=(q,), name=name, daemon=True) for name, q in self._queues.items()]
        self._closed = False
        for thread in self._threads:
            thread.start()

    @property
    def available(self) -> bool:
        """Whether the store answered last time."""
        return not self._breaker.open

    def register(self, region: Buffer) -> None:
        self._store.register(region)

    def lookup(self, keys: Sequence[str], done: Callable[[int], None]) -> None:
        """`done(n)`: the first n keys can be read now."""

        def call() -> None:
            found = self._call(lambda: self._store.contains(keys), [False] * len(keys))
            done(found.index(False) if False in found else len(found))

        self._submit("kv-load", call, lambda: done(0))

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        """`done(found)`, a flag for each key; from then on nothing is written to the buffers."""

        def call() -> None:
            started = time.monotonic()
            found = self._call(lambda: self._store.get(keys, buffers), [False] * len(keys))
            self.stats.blocks_loaded += sum(found)
            self.stats.blocks_missed += len(found) - sum(found)
            self.stats.bytes_loaded += sum(buffer.nbytes for buffer, hit in zip(buffers, found, strict=True) if hit)
            self.stats.seconds_loading += time.monotonic() - started
            done(found)

        self._submit("kv-load", call, lambda: done([False] * len(keys)))

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        """`done(stored)`, a flag for each key; the buffers must keep their content until then."""

        def call() -> None:
            started = time.monotonic()
            stored = self._call(lambda: self._store.put(keys, buffers), [False] * len(keys))
            self.stats.blocks_saved += sum(stored)
            self.stats.blocks_refused += len(stored) - sum(stored)
            self.stats.bytes_saved += sum(buffer.nbytes for buffer, kept in zip(buffers, stored, strict=True) if kept)
            self.stats.seconds_saving += time.monotonic() - started
            done(stored)

        self._submit("kv-save", call, lambda: done([False] * len(keys)))

    def close(self) -> None:
        """Ends the threads after the calls in hand; calls still queued are misses. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for q in self._queues.values():
            q.put(None)
        for thread in self._threads:
            thread.join()
        self._store.close()

    def _submit(self, name: str, call: Callable[[], None], skip: Callable[[], None]) -> None:
        if not self._closed and not self._breaker.open:
            try:
                self._queues[name].put_nowait(call)
                return
            except queue.Full:
                pass
        self.stats.skipped += 1
        skip()

    def _call(self, call: Callable[[], list[bool]], misses: list[bool]) -> list[bool]:
        if self._breaker.open or self._closed:
            self.stats.skipped += 1
            return misses
        try:
            result = call()
        except Exception as error:
            if not isinstance(error, StoreError):
                logger.exception("the KV store failed in a way that its adapter does not know")
            self.stats.failures += 1
            self._breaker.failed(error)
            return misses
        self._breaker.worked()
        return result

    def _serve(self, q: "queue.Queue[Callable[[], None] | None]") -> None:
        while (call := q.get()) is not None:
            try:
                call()
            except Exception:
                logger.exception("a KV transfer failed")


class NoTransfer:
    """No pool: every lookup finds nothing, every save is refused."""

    available = False

    def __init__(self) -> None:
        self.stats = TransferStats()

    def register(self, region: Buffer) -> None:
        pass

    def lookup(self, keys: Sequence[str], done: Callable[[int], None]) -> None:
        done(0)

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        done([False] * len(keys))

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        done([False] * len(keys))

    def close(self) -> None:
        pass
