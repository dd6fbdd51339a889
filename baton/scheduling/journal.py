"""Journal: what came to a tier of a worker's KV and went since it was last asked, and the digest of what is there.

The digest is a count and the XOR of the block hashes, kept up with each change, so it costs what changes and not what is held. Whoever has
followed the changes has the same one, or has missed something. Hashes are SHA-256's, so that sets which differ agree by a chance of 2⁻¹²⁸.
"""

from collections.abc import Iterable, Sequence

from baton.types import BlocksRemoved, BlocksStored, Digest, KVEvent, Tier


class Journal:
    """Not thread-safe."""

    def __init__(self, tier: Tier) -> None:
        self._tier, self._events = tier, list[KVEvent]()
        self._count = self._xor = 0

    @property
    def digest(self) -> Digest:
        """Of what is there when everything told so far has happened."""
        return Digest(self._tier, self._count, self._xor)

    def stored(self, hashes: Sequence[bytes]) -> None:
        """None of them was there."""
        if hashes:
            self._count += len(hashes)
            self._xor ^= xor_of(hashes)
            self._events.append(BlocksStored(tuple(hashes), self._tier))

    def removed(self, hashes: Sequence[bytes]) -> None:
        """All of them were there."""
        if hashes:
            self._count -= len(hashes)
            self._xor ^= xor_of(hashes)
            self._events.append(BlocksRemoved(tuple(hashes), self._tier))

    def drain(self) -> list[KVEvent]:
        """What was stored and removed since the last call, in order."""
        events, self._events = self._events, []
        return events


def xor_of(hashes: Iterable[bytes]) -> int:
    total = 0
    for key in hashes:
        total ^= int.from_bytes(key)
    return total
