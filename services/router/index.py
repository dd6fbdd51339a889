"""PrefixIndex: which workers hold which KV blocks, exactly, from their events; and which they are about to hold, from what was sent there.

Block hash → set of workers, as the bits of an integer. A worker's bit is its *place*; what is asked for comes as arrays by place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.types import BlocksStored, Digest, KVEvent, Tier

Depths = NDArray[np.int64]
OWN_TIERS = (Tier.DEVICE,)  # what a worker holds for itself


@dataclass(slots=True)
class _Held:
    """By one worker, in one tier."""

    blocks: set[bytes] = field(default_factory=set[bytes])
    xor: int = 0  # of them; see `Digest`


class PrefixIndex:
    def __init__(self) -> None:
        self._workers: list[str | None] = []  # by place
        self._places: dict[str, int] = {}
        self._holders: dict[Tier, dict[bytes, int]] = {tier: {} for tier in OWN_TIERS}
        self._held: dict[str, dict[Tier, _Held]] = {}
        self._expected: dict[bytes, int] = {}  # who computes it now, or will
        self._expectations: dict[str, dict[str, Sequence[bytes]]] = {}  # worker → request → blocks

    def apply(self, worker: str, events: Iterable[KVEvent], *, snapshot: bool = False) -> None:
        """Takes in a worker's events, in order. A snapshot replaces what was known of it."""
        bit, tiers = 1 << self._place(worker), self._held[worker]
        if snapshot:
            self._drop(tiers, bit)
        for event in events:
            held = tiers.get(event.tier)
            if held is None:
                continue
            holders, blocks, xor = self._holders[event.tier], held.blocks, held.xor
            if isinstance(event, BlocksStored):
                for key in event.block_hashes:
                    if key not in blocks:
                        blocks.add(key)
                        holders[key] = holders.get(key, 0) | bit
                        xor ^= int.from_bytes(key)
            else:
                for key in event.block_hashes:
                    if key in blocks:
                        blocks.discard(key)
                        _clear(holders, key, bit)
                        xor ^= int.from_bytes(key)
            held.xor = xor

    def remove(self, worker: str) -> None:
        """Forgets a worker."""
        place = self._places.pop(worker, None)
        if place is None:
            return
        self._drop(self._held.pop(worker), 1 << place)
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
        holders = self._holders[Tier.DEVICE]
        held = _depths(holders, {}, hashes, len(self._workers))
        return held, (_depths(holders, self._expected, hashes, len(self._workers)) if self._expected else held)

    def blocks(self, worker: str, tier: Tier = Tier.DEVICE) -> frozenset[bytes]:
        """What a worker is known to hold; for comparison with the worker's own."""
        return frozenset(self._held[worker][tier].blocks) if worker in self._held else frozenset()

    def digests(self, worker: str) -> dict[Tier, Digest]:
        """Of what a worker is known to hold."""
        return {tier: Digest(tier, len(held.blocks), held.xor) for tier, held in self._held.get(worker, {}).items()}

    def agrees(self, worker: str, digests: Iterable[Digest]) -> bool:
        """Whether that is what the worker says it holds; in tiers of which it says nothing it may be anything."""
        known = self._held.get(worker, {})
        compared = ((known[each.tier], each) for each in digests if each.tier in known)
        return all(held.xor == each.xor and len(held.blocks) == each.num_blocks for held, each in compared)

    def __len__(self) -> int:
        """Blocks that somebody has on his device."""
        return len(self._holders[Tier.DEVICE])

    def _drop(self, tiers: Mapping[Tier, _Held], bit: int) -> None:
        for tier, held in tiers.items():
            for key in held.blocks:
                _clear(self._holders[tier], key, bit)
            held.blocks, held.xor = set(), 0

    def _place(self, worker: str) -> int:
        place = self._places.get(worker)
        if place is None:
            if None not in self._workers:
                self._workers.append(None)
            place = self._places[worker] = self._workers.index(None)
            self._workers[place] = worker
            self._held[worker], self._expectations[worker] = {tier: _Held() for tier in OWN_TIERS}, {}
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
