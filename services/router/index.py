"""PrefixIndex: which workers hold which KV blocks, exactly, from their events. Block hash → set of workers, as the bits of an integer."""

from collections.abc import Iterable, Sequence

from baton.types import BlocksStored, KVEvent, Tier


class PrefixIndex:
    def __init__(self) -> None:
        self._bits: dict[str, int] = {}  # worker → its bit
        self._holders: dict[bytes, int] = {}
        self._blocks: dict[str, set[bytes]] = {}

    def apply(self, worker: str, events: Iterable[KVEvent], *, snapshot: bool = False) -> None:
        """Takes in a worker's events, in order. A snapshot replaces what was known of it."""
        if snapshot:
            self.remove(worker)
        if worker not in self._bits:
            self._bits[worker] = 1 << next(i for i in range(len(self._bits) + 1) if 1 << i not in self._bits.values())
            self._blocks[worker] = set()
        bit, blocks = self._bits[worker], self._blocks[worker]
        for event in events:
            if event.tier is not Tier.DEVICE:
                continue
            for key in event.block_hashes:
                if isinstance(event, BlocksStored):
                    self._holders[key] = self._holders.get(key, 0) | bit
                    blocks.add(key)
                elif key in blocks:
                    blocks.discard(key)
                    self._clear(key, bit)

    def remove(self, worker: str) -> None:
        """Forgets a worker."""
        bit = self._bits.pop(worker, 0)
        for key in self._blocks.pop(worker, ()):
            self._clear(key, bit)

    def match(self, hashes: Sequence[bytes], workers: Iterable[str]) -> dict[str, int]:
        """For each worker, how many leading blocks of `hashes` it holds."""
        left = {worker: self._bits.get(worker, 0) for worker in workers}
        matched = dict.fromkeys(left, 0)
        for depth, key in enumerate(hashes, 1):
            holders = self._holders.get(key, 0)
            left = {worker: bit for worker, bit in left.items() if bit & holders}
            if not left:
                break
            for worker in left:
                matched[worker] = depth
        return matched

    def blocks(self, worker: str) -> frozenset[bytes]:
        """What a worker is known to hold; for comparison with the worker's own."""
        return frozenset(self._blocks.get(worker, ()))

    def __len__(self) -> int:
        return len(self._holders)

    def _clear(self, key: bytes, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]
