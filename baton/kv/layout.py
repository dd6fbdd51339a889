"""The shape of one KV block, its fingerprint and its name in the pool. Torch-free: every process may ask.

block = [num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]      one contiguous piece of memory, one transfer, one pool object

Where ranks share a model, each has such a block of its share of the heads, under the same number (`kv.shards`).
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from baton.hashing import HASH_SCHEME

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: Literal["float32", "bfloat16"]

    def share(self, size: int) -> "KVLayout":
        """Of one of `size` ranks. A fingerprint is that of the whole: it says nothing of ranks."""
        return replace(self, num_kv_heads=self.num_kv_heads // size)

    @property
    def head_bytes(self) -> int:
        """Of one head's keys, or values, of one layer and block."""
        return self.block_size * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_bytes

    def fingerprint(self, weights: str) -> str:
        """32 hex digits. Two workers exchange KV only if theirs are equal: same weights (`weights` is the loader's fingerprint of them),
        same layout, same hashes."""
        parts = (weights, *map(str, self.block_shape), self.dtype, HASH_SCHEME)
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


def block_key(fingerprint: str, block_hash: bytes, tp_rank: int = 0, tp_size: int = 1) -> str:
    """Name of a block in the pool."""
    return f"{fingerprint}/{tp_rank}of{tp_size}/{block_hash.hex()}"
