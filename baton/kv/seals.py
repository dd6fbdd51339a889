"""Seals of KV blocks in the pool: eight bytes behind a block, of its key and its content. Readers know by them that it is what was saved.

A pool has no fence: what was sent to a node that is stopped, and was given up since, arrives when the node goes on, in memory that may be
another's by then. A copy may be torn by that, a disk may have lost half of a block. Seals tell all of these.
"""

import ctypes
import hashlib
from collections.abc import Iterable

from baton.kv.store import Buffer

SEAL_BYTES = 8


def seal(key: str, checksum: int) -> bytes:
    """`checksum`: 64 bits of the block's content."""
    return (checksum ^ int.from_bytes(hashlib.blake2b(key.encode(), digest_size=SEAL_BYTES).digest(), "little")).to_bytes(
        SEAL_BYTES, "little"
    )


class Seals:
    """Memory for the seals of one call."""

    def __init__(self, count: int) -> None:
        self._memory = ctypes.create_string_buffer(count * SEAL_BYTES)
        self.region = Buffer(ctypes.addressof(self._memory), count * SEAL_BYTES)

    def address(self, index: int) -> int:
        return self.region.address + index * SEAL_BYTES

    def set(self, seals: Iterable[bytes]) -> None:
        """The first ones."""
        content = b"".join(seals)
        self._memory[: len(content)] = content

    def get(self, index: int) -> bytes:
        return ctypes.string_at(self.address(index), SEAL_BYTES)
