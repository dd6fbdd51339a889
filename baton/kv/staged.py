"""StagedStore: lets a store that reads and writes memory with the CPU serve KV that lies on a device, by way of pinned host memory."""

import threading
from collections.abc import Sequence

from baton.kv.store import Buffer, KVStore, Memory

SLOTS = 16  # blocks that are staged together


class StagedStore:
    """One staging area for loads and one for saves, which come from one thread each. Blocks in host memory are passed through."""

    def __init__(self, store: KVStore, memory: Memory, block_bytes: int) -> None:
        self._store, self._memory = store, memory
        self._load_lock, self._save_lock = threading.Lock(), threading.Lock()
        self._load_area, self._save_area = (_slots(memory.allocate(SLOTS * block_bytes), block_bytes) for _ in range(2))

    def register(self, region: Buffer) -> None:
        pass

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return self._store.contains(keys)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        if all(map(self._memory.is_host, buffers)):
            return self._store.get(keys, buffers)
        found: list[bool] = []
        with self._load_lock:
            for start in range(0, len(keys), SLOTS):
                targets = buffers[start : start + SLOTS]
                staged = self._load_area[: len(targets)]
                here = self._store.get(keys[start : start + SLOTS], staged)
                good = [(target, source) for target, source, hit in zip(targets, staged, here, strict=True) if hit]
                self._memory.copy([target for target, _ in good], [source for _, source in good])
                found += here
        return found

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        if all(map(self._memory.is_host, buffers)):
            return self._store.put(keys, buffers)
        stored: list[bool] = []
        with self._save_lock:
            for start in range(0, len(keys), SLOTS):
                sources = buffers[start : start + SLOTS]
                staged = self._save_area[: len(sources)]
                self._memory.copy(staged, sources)
                stored += self._store.put(keys[start : start + SLOTS], staged)
        return stored

    def close(self) -> None:
        self._store.close()


def _slots(area: Buffer, block_bytes: int) -> list[Buffer]:
    return [Buffer(area.address + offset, block_bytes) for offset in range(0, area.nbytes, block_bytes)]
