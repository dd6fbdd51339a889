"""KVStore: what Baton asks of a KV pool, or of another tier (docs/tiers.md), and a store in this process's memory for tests.

Calls block and are made on I/O threads only (`kv.transfer`). Keys are opaque strings (`kv.layout.block_key`), values whole blocks. The
pool is a cache: a lost or refused block is a miss (False), never an error. `StoreError` is for a pool that as a whole can't answer.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of this process's memory, inside a region that was registered."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a store with a budget: bytes, and blocks that went since the start."""

    used_bytes: int = 0
    capacity_bytes: int = 0
    evictions: int = 0
    damaged: int = 0  # blocks whose content was not what had been put


def checksum(buffer: Buffer) -> int:
    """64 bits (XXH3) of memory that the CPU can read."""
    import xxhash  # here, so that kernels and engine can be tried on a machine that has nothing but torch

    return xxhash.xxh3_64_intdigest(memoryview((ctypes.c_char * buffer.nbytes).from_address(buffer.address)))


SUMS = ("xxh3", "nh")  # the kinds of checksums that there are: of a CPU and of a GPU


class Summing:
    """How a worker takes checksums of blocks: here, of memory that the CPU can read."""

    name = SUMS[0]

    def sums(self, buffers: Sequence[Buffer]) -> list[int]:
        """64 bits of each."""
        return [checksum(buffer) for buffer in buffers]

    def settle(self) -> None:
        """Waits until what others were told to be in the blocks is there."""


class KVStore(Protocol):
    def register(self, region: Buffer) -> None:
        """Makes a region usable as source and target of transfers. Raises StoreError."""
        ...

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Which keys, of a prompt in its order, could be read now. They count as used, of which what was used longest ago goes first, and
        of what was used together the end. Raises StoreError."""
        ...

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        """Reads each key into its buffer; False where it is missing or of another size. When the call has returned, nothing of it is
        written any more. Raises StoreError (then too)."""
        ...

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        """Writes each buffer under its key; True where the pool holds the key now (also when it held it before), False where refused.
        Raises StoreError."""
        ...

    def close(self) -> None: ...


class Memory(Protocol):
    """Memory of the host beside that of a device (`kv.memory`). Copies return when they are done, and let Python's other threads run
    meanwhile."""

    def allocate(self, nbytes: int) -> Buffer:
        """Host memory that lives as long as this object."""
        ...

    def adopt(self, region: Buffer, *, read_only: bool) -> None:
        """Makes host memory that somebody else has mapped a source, and a target unless it is `read_only`, of fast copies. Raises
        RuntimeError where the device can't."""
        ...

    def disown(self, region: Buffer) -> None:
        """Undoes `adopt`, when no copy is under way."""
        ...

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        """Each source to its target, of equal size; both lie in host memory from here or in the device's KV memory."""
        ...

    def is_host(self, buffer: Buffer) -> bool:
        """Whether the CPU can read and write there."""
        ...


class MemoryStore:
    """An LRU of at most `capacity` bytes in this process. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._values: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def register(self, region: Buffer) -> None:
        pass

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._lock:
            return [key in self._values for key in keys]

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        found: list[bool] = []
        with self._lock:
            for key, buffer in zip(keys, buffers, strict=True):
                value = self._values.get(key)
                hit = value is not None and len(value) == buffer.nbytes
                if value is not None and hit:
                    self._values.move_to_end(key)
                    ctypes.memmove(buffer.address, value, buffer.nbytes)
                found.append(hit)
        return found

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        stored: list[bool] = []
        with self._lock:
            for key, buffer in zip(keys, buffers, strict=True):
                if key not in self._values and buffer.nbytes <= self._capacity:
                    self._values[key] = ctypes.string_at(buffer.address, buffer.nbytes)
                    self._used += buffer.nbytes
                    while self._used > self._capacity:
                        self._used -= len(self._values.popitem(last=False)[1])
                stored.append(key in self._values)
        return stored

    def close(self) -> None:
        with self._lock:
            self._values.clear()
            self._used = 0
