"""HostStore: KV blocks in this machine's memory, in fixed slots of one arena.

Two least recently used lists (segmented LRU): a block comes into *probation*, and what is used again there moves to *protected*, four
fifths of the slots at most, from where the oldest falls back. Eviction takes from probation first. So prompts that come once flush each
other, not the prefixes that requests share. A lookup is what counts as use: it names all of a prompt, and loads come in pieces.

    put ──▶ probation ──looked up──▶ protected
              │  ▲                       │ too many
        evicted  └────────────────────────┘
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from baton.errors import ConfigError
from baton.kv.holdings import Holdings
from baton.kv.store import Buffer, Memory, Usage
from baton.types import Tier

PROTECTED_SHARE = 0.8
HELD_SHARE = 0.5  # of the slots may be held for write-back


class HostStore:
    """Thread-safe. Blocks are copied outside of the lock; a slot that is copied from or to is *held*, and never evicted."""

    def __init__(self, capacity: int, block_bytes: int, memory: Memory, holdings: Holdings | None = None) -> None:
        self._holdings = holdings or Holdings(Tier.HOST, "")
        self._count = capacity // block_bytes
        if self._count < 2:
            raise ConfigError(f"host.bytes={capacity} holds {self._count} blocks of {block_bytes} bytes; give at least two blocks' worth")
        self._block_bytes, self._memory = block_bytes, memory
        try:
            self._arena = memory.allocate(self._count * block_bytes)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"host.bytes={capacity} cannot be had on this machine: {str(error).splitlines()[0]}") from error
        self._free = list(range(self._count))
        self._slots: dict[str, int] = {}
        self._probation, self._protected = OrderedDict[str, None](), OrderedDict[str, None]()
        self._holds = Counter[str]()
        self._evictions = 0
        self._lock = threading.Lock()

    def register(self, region: Buffer) -> None:
        pass

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._lock:
            self._use(keys)
            return [key in self._slots for key in keys]

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        with self._lock:
            found = [key in self._slots and buffer.nbytes == self._block_bytes for key, buffer in zip(keys, buffers, strict=True)]
            hits = [key for key, hit in zip(keys, found, strict=True) if hit]
            sources = [self._buffer(self._slots[key]) for key in hits]
            self._holds.update(hits)
        try:
            self._memory.copy([buffer for buffer, hit in zip(buffers, found, strict=True) if hit], sources)
        finally:
            self.release(hits)
        return found

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        filling: dict[str, tuple[int, Buffer]] = {}
        with self._lock:
            self._use([key for key in keys if key in self._slots])
            for key, buffer in zip(keys, buffers, strict=True):
                if key not in self._slots and key not in filling and buffer.nbytes == self._block_bytes:
                    slot = self._take()
                    if slot is not None:
                        filling[key] = (slot, buffer)
        try:
            self._memory.copy([self._buffer(slot) for slot, _ in filling.values()], [buffer for _, buffer in filling.values()])
        except BaseException:
            with self._lock:
                self._free += [slot for slot, _ in filling.values()]
            raise
        with self._lock:
            for key, (slot, _) in reversed(filling.items()):
                if key in self._slots:  # another thread was faster
                    self._free.append(slot)
                else:
                    self._slots[key] = slot
                    self._probation[key] = None
            self._holdings.stored(*(key for key in filling if key in self._slots))
            return [key in self._slots for key in keys]

    def hold(self, keys: Iterable[str]) -> dict[str, Buffer]:
        """Where those blocks lie that are here; they stay until they are released. Only the first ones, where too much is held already."""
        with self._lock:
            room = max(int(self._count * HELD_SHARE) - sum(self._holds.values()), 0)
            here = [key for key in keys if key in self._slots][:room]
            self._holds.update(here)
            return {key: self._buffer(self._slots[key]) for key in here}

    def release(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._holds[key] -= 1
                if not self._holds[key]:
                    del self._holds[key]

    def usage(self) -> Usage:
        with self._lock:
            return Usage(len(self._slots) * self._block_bytes, self._count * self._block_bytes, self._evictions)

    def close(self) -> None:
        pass

    def _buffer(self, slot: int) -> Buffer:
        return Buffer(self._arena.address + slot * self._block_bytes, self._block_bytes)

    def _use(self, keys: Sequence[str]) -> None:
        """Of a prefix the end is the first to go."""
        for key in reversed(keys):
            if key in self._protected:
                self._protected.move_to_end(key)
            elif key in self._probation:
                del self._probation[key]
                self._protected[key] = None
                if len(self._protected) > self._count * PROTECTED_SHARE:
                    self._probation[self._protected.popitem(last=False)[0]] = None

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        for segment in (self._probation, self._protected):
            for key in segment:
                if key not in self._holds:
                    del segment[key]
                    self._evictions += 1
                    self._holdings.removed(key)
                    return self._slots.pop(key)
        return None
