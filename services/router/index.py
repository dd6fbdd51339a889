"""PrefixIndex: which workers hold which KV blocks, exactly, from their events; and which they are about to hold, from what was sent there.

Block hash → set of workers, as the bits of an integer. A worker's bit is its *place*; what is asked for comes as arrays by place.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.types import BlocksStored, KVEvent, Tier

Depths = NDArray[np.int64]


class PrefixIndex:
    def __init__(self) -> None:
        self._workers: list[str | None] = []  # by place
        self._places: dict[str, int] = {}
        self._holders: dict[bytes, int] = {}
        self._blocks: dict[str, set[bytes]] = {}
        self._expected: dict[bytes, int] = {}  # who computes it now, or will
        self._expectations: dict[str, dict[str, Sequence[bytes]]] = {}  # worker → request → blocks

    def apply(self, worker: str, events: Iterable[KVEvent], *, snapshot: bool = False) -> None:
        """Takes in a worker's events, in order. A snapshot replaces what was known of it."""
        bit, blocks = 1 << self._place(worker), self._blocks[worker]
        if snapshot:
            for key in blocks:
                _clear(self._holders, key, bit)
            blocks.clear()
        for event in events:
            if event.tier is not Tier.DEVICE:
                continue
            for key in event.block_hashes:
                if isinstance(event, BlocksStored):
                    self._holders[key] = self._holders.get(key, 0) | bit
                    blocks.add(key)
                elif key in blocks:
                    blocks.discard(key)
                    _clear(self._holders, key, bit)

    def remove(self, worker: str) -> None:
        """Forgets a worker."""
        place = self._places.pop(worker, None)
        if place is None:
            return
        for key in self._blocks.pop(worker):
            _clear(self._holders, key, 1 << place)
        for hashes in self._expectations.pop(worker).values():
            for key in hashes:
                _clear(self._expected, key, 1 << place)
        self._workers[place] = None

    def expect(self, worker: str, request_id: str, hashes: Sequence[bytes]) -> None:
        """The worker was sent a request, for which it will compute these blocks, unless `settle` comes first."""
        bit = 1 << self._place(worker)
        self._expectations[worker][request_id] = hashes
        for key in hashes:
            self._expected[key] = self._expected.get(key, 0) | bit

    def settle(self, worker: str, request_id: str) -> None:
        """What the request has computed there is held by now, and the rest will not be. Of equal blocks that others compute there too, it
        is no longer known that they do: they are told as they are held."""
        hashes = self._expectations.get(worker, {}).pop(request_id, ())
        for key in hashes:
            _clear(self._expected, key, 1 << self._places[worker])

    def places(self, workers: Iterable[str]) -> NDArray[np.intp]:
        """Where each is in what `depths` gives; until one of them is removed."""
        return np.array([self._place(worker) for worker in workers], dtype=np.intp)

    def depths(self, hashes: Sequence[bytes]) -> tuple[Depths, Depths]:
        """By place, how many leading blocks of `hashes` each worker holds; and how many it will hold when it has computed what was sent
        there."""
        held = _depths(self._holders, {}, hashes, len(self._workers))
        return held, (_depths(self._holders, self._expected, hashes, len(self._workers)) if self._expected else held)

    def blocks(self, worker: str) -> frozenset[bytes]:
        """What a worker is known to hold; for comparison with the worker's own."""
        return frozenset(self._blocks.get(worker, ()))

    def __len__(self) -> int:
        return len(self._holders)

    def _place(self, worker: str) -> int:
        place = self._places.get(worker)
        if place is None:
            if None not in self._workers:
                self._workers.append(None)
            place = self._places[worker] = self._workers.index(None)
            self._workers[place] = worker
            self._blocks[worker], self._expectations[worker] = set(), {}
        return place


def _depths(holders: dict[bytes, int], more: dict[bytes, int], hashes: Sequence[bytes], count: int) -> Depths:
    """One AND a block; a worker costs more only at the block where its run ends."""
    depths = np.zeros(count, dtype=np.int64)
    alive = (1 << count) - 1
    depth = 0
    for depth, key in enumerate(hashes):
        left = alive & (holders.get(key, 0) | more.get(key, 0) if more else holders.get(key, 0))
        if left != alive:
            if depth:
                _write(depths, alive ^ left, depth)
            alive = left
            if not alive:
                return depths
    if hashes:
        _write(depths, alive, depth + 1)
    return depths


def _write(depths: Depths, bits: int, depth: int) -> None:
    if bits.bit_count() > 8:
        size = -(-len(depths) // 8)
        chosen = np.unpackbits(np.frombuffer(bits.to_bytes(size, "little"), dtype=np.uint8), count=len(depths), bitorder="little")
        depths[chosen.view(bool)] = depth
        return
    while bits:
        lowest = bits & -bits
        depths[lowest.bit_length() - 1] = depth
        bits ^= lowest


def _clear(holders: dict[bytes, int], key: bytes, bit: int) -> None:
    left = holders.get(key, 0) & ~bit
    if left:
        holders[key] = left
    else:
        holders.pop(key, None)
