"""BlockPool: the bookkeeping of a worker's KV blocks. Ids and hashes only; the tensors are `kv.pool`'s.

A block is held (ref > 0), or free. A free block that carries a hash still caches its content until it is taken again:

    take ──▶ held ──release──▶ free, at the tail of the queue ──take (head of the queue: least recently used)──▶ held, hash forgotten
              ▲                     │
              └──────reuse──────────┘  found by its hash

Knows nothing of requests. Only the engine's thread calls it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from baton.scheduling.journal import Journal, xor_of
from baton.types import Digest, KVEvent, Tier


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        # The free queue, least recently used first; O(1) at both ends and in the middle.
        self._free = OrderedDict[int, None].fromkeys(range(num_blocks))
        self.journal = Journal(Tier.DEVICE)

    @property
    def num_free(self) -> int:
        """Blocks that `take` could give now, cached ones among them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._by_hash)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest leading run of `hashes` that is cached. Takes no reference."""
        found: list[int] = []
        for key in hashes:
            block_id = self._by_hash.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_of(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, so that reusing them costs free blocks."""
        return sum(self._refs[block_id] == 0 for block_id in block_ids)

    def num_held_by(self, holders: Iterable[Sequence[int]]) -> int:
        """How many blocks would be free without these references."""
        counts = Counter(block_id for block_ids in holders for block_id in block_ids)
        return sum(self._refs[block_id] == count for block_id, count in counts.items())

    def take(self, count: int) -> list[int]:
        """`count` blocks, each with one reference and no hash; evicts what they cached. The caller has checked `num_free`."""
        taken: list[int] = []
        removed: list[bytes] = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            self._refs[block_id] = 1
            key = self._hashes[block_id]
            if key is not None:
                self._hashes[block_id] = None
                del self._by_hash[key]
                removed.append(key)
            taken.append(block_id)
        self.journal.removed(removed)
        return taken

    def reuse(self, block_ids: Iterable[int]) -> None:
        """One more reference for each block."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._free[block_id]
            self._refs[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One reference less for each; given back in reverse, so that of a prefix the tail is evicted first."""
        for block_id in reversed(block_ids):
            assert self._refs[block_id] > 0, f"block {block_id} released more often than taken"
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:  # caches nothing: the first to be taken again
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """The blocks now hold the content named by `hashes`. A hash that another block carries already stays with that one."""
        stored: list[bytes] = []
        for block_id, key in zip(block_ids, hashes, strict=True):
            if key not in self._by_hash and self._hashes[block_id] is None:
                self._by_hash[key] = block_id
                self._hashes[block_id] = key
                stored.append(key)
        self.journal.stored(stored)

    def hashes(self) -> tuple[bytes, ...]:
        """Everything cached."""
        return tuple(self._by_hash)

    def drain_events(self) -> list[KVEvent]:
        """What was stored and removed since the last call, in order."""
        return self.journal.drain()

    def check_integrity(self, held: Sequence[Sequence[int]]) -> list[str]:
        """Problems, given every holder's block ids: leaked blocks, blocks freed under a holder, an inconsistent index."""
        problems: list[str] = []
        expected = [0] * self.num_blocks
        for block_ids in held:
            for block_id in block_ids:
                expected[block_id] += 1
        for block_id, (refs, wanted) in enumerate(zip(self._refs, expected, strict=True)):
            if refs != wanted:
                problems.append(f"block {block_id} has {refs} references, {wanted} holders")
            if (refs == 0) != (block_id in self._free):
                problems.append(f"block {block_id} with {refs} references is {'in' if block_id in self._free else 'not in'} the free queue")
            key = self._hashes[block_id]
            if key is not None and self._by_hash.get(key) != block_id:
                problems.append(f"block {block_id} carries a hash that leads elsewhere")
        if len(self._by_hash) != sum(key is not None for key in self._hashes):
            problems.append("the hash index and the blocks' hashes differ in number")
        if self.journal.digest != Digest(Tier.DEVICE, len(self._by_hash), xor_of(self._by_hash)):
            problems.append("the digest that the routers are told is not that of the cached blocks")
        return problems
