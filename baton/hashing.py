"""Block hashes: the names of KV blocks, the same in every process, on every machine, for ever (`HASH_SCHEME` changes when they do).

A block's hash is SHA-256 over (previous hash, the block's token ids as little-endian uint32), cut to 128 bits. The chain starts from a
salt, so equal hashes mean equal tokens, equal prefixes and equal salts. Python's own `hash` is never used: it differs per process.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from struct import pack

HASH_SCHEME = "sha256-128/1"
HASH_BYTES = 16


def root_hash(salt: str = "") -> bytes:
    """The hash before the first block. `salt` separates caches (tenant, adapter, images)."""
    return hashlib.sha256(b"baton:" + salt.encode()).digest()[:HASH_BYTES]


def block_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block that follows `previous`. 16 bytes."""
    return hashlib.sha256(previous + pack(f"<{len(token_ids)}I", *token_ids)).digest()[:HASH_BYTES]


def _words(token_ids: Sequence[int]) -> bytes:
    """As little-endian uint32."""
    if isinstance(token_ids, array) and token_ids.itemsize == 4 and sys.byteorder == "little":
        return token_ids.tobytes()
    return pack(f"<{len(token_ids)}I", *token_ids)


def num_matchable_blocks(num_tokens: int, block_size: int) -> int:
    """Leading full blocks that a request with so many known tokens may find in a cache. The last token is always computed, since its logits
    are wanted; and the block that it fills with it."""
    return (num_tokens - 1) // block_size


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
    """Hashes of all full blocks of `token_ids`; the partial last block has none.

    `known` are the hashes of the leading blocks where they were computed before: only the rest is hashed.
    """
    hashes = list(known)
    previous = hashes[-1] if hashes else root_hash(salt)
    start = len(hashes) * block_size
    end = len(token_ids) - len(token_ids) % block_size
    words = _words(token_ids[start:end])
    for at in range(0, len(words), 4 * block_size):
        previous = hashlib.sha256(previous + words[at : at + 4 * block_size]).digest()[:HASH_BYTES]
        hashes.append(previous)
    return hashes
