"""Checksums of KV blocks, for test builds (`push.verify`, `pool.verify`): taken when a block was computed, compared when it is said to have
arrived. What differs is counted, logged, and not used. KV in host memory only: a GPU's cannot be read from here.

A pool object is the block and, behind it, its checksum, so whoever finds one finds both; its key says so. A push's checksums travel with
the news of what has arrived.
"""

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from baton.kv.mooncake import WAVE, MooncakeStore
from baton.kv.store import Buffer, checksum
from baton.kv.transfer import KVTransfer

logger = logging.getLogger(__name__)
_TRAILER = 8  # bytes
_OTHER_SUM = -2  # among Mooncake's codes


class CheckedStore(MooncakeStore):
    """Each call is made by one thread at a time: one loads, one saves."""

    def __init__(self, master: str, **settings: Any) -> None:
        super().__init__(master, **settings)
        self._sums: dict[int, tuple[str, int]] = {}  # by a block's address: what is to be saved from there
        self._trailers = {method: (ctypes.c_uint64 * WAVE)() for method in ("batch_get_into", "batch_put_from")}
        self._wave = WAVE  # whatever the protocol: there is no room for more trailers
        for trailers in self._trailers.values():
            self.register(Buffer(ctypes.addressof(trailers), ctypes.sizeof(trailers)))

    def take(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> None:
        """Before `put`, when the blocks hold what was computed."""
        self._sums.update((buffer.address, (key, checksum(buffer))) for key, buffer in zip(keys, buffers, strict=True))

    _trailer = _TRAILER

    def _object(self, key: str) -> str:
        return f"{key}+crc32"

    def _intact(self, key: str, buffer: Buffer, trailer: bytes) -> bool:
        return self._checked(key, buffer, int.from_bytes(trailer, sys.byteorder)) == buffer.nbytes

    def _move(self, method: str, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        trailers = self._trailers[method]
        if method == "batch_put_from":
            for i, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
                name, total = self._sums.pop(buffer.address, ("", 0))
                trailers[i] = total if name == key else checksum(buffer)
        start = ctypes.addressof(trailers)
        addresses = [[buffer.address, start + i * _TRAILER] for i, buffer in enumerate(buffers)]
        sizes = [[buffer.nbytes, _TRAILER] for buffer in buffers]
        codes = self._call(method + "_multi_buffers", [self._object(key) for key in keys], addresses, sizes)
        if method == "batch_put_from":
            return codes
        return [
            self._checked(key, buffer, trailers[i]) if code == buffer.nbytes + _TRAILER else code
            for i, (code, key, buffer) in enumerate(zip(codes, keys, buffers, strict=True))
        ]

    def _checked(self, key: str, buffer: Buffer, expected: int) -> int:
        self.stats.blocks_verified += 1
        if checksum(buffer) == expected:
            return buffer.nbytes
        self.stats.blocks_corrupt += 1
        logger.critical("block %s came from the KV pool with another content than it was saved with; it is not used", key)
        return _OTHER_SUM


class CheckedTransfer(KVTransfer):
    def __init__(self, store: CheckedStore) -> None:
        super().__init__(store, stats=store.stats)
        self._checked = store

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        self._checked.take(keys, buffers)
        super().save(keys, buffers, done)
