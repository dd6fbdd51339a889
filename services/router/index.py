"""PrefixIndex: which workers hold which KV blocks, exactly, from their events; which they are about to hold, from what was sent there; and
what they can read from the pool, as far as it was noticed.

Block hash → set of workers, as the bits of an integer. A worker's bit is its *place*; what is asked for comes as arrays by place.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.types import BlocksStored, Digest, KVEvent, Tier

Depths = NDArray[np.int64]
Readers = tuple[str, int]  # of the same blocks in the pool: fingerprint, and degree of tensor parallelism
OWN_TIERS = (Tier.DEVICE, Tier.HOST, Tier.FILES)  # what a worker holds for itself, fastest first
FETCHED = (Tier.HOST, Tier.FILES, Tier.POOL)
_untyped: Any = operator
_OR: Callable[[int, int], int] = _untyped.or_
_AND: Callable[[int, int], int] = _untyped.and_
_NE: Callable[[int, int], bool] = _untyped.ne
_STRETCH = 64  # blocks that are looked at together
MOST_POOL_BLOCKS = 1 << 18  # remembered, for each kind of reader; those that were saved first are forgotten first


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
        self.pool = PoolIndex()
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
        held, coming, *_ = self.reaches(hashes)
        return held, coming

    def reaches(self, hashes: Sequence[bytes]) -> list[Depths]:
        """As `depths`; then how many it can have by fetching from its host memory, and from its files too."""
        layers = [self._holders[Tier.DEVICE], self._expected, self._holders[Tier.HOST], self._holders[Tier.FILES]]
        return _depths(layers, hashes, len(self._workers))

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


class PoolIndex:
    """What the pool holds, as workers noticed it: they tell what they saved, and where a prefix was not found any more. The pool itself
    tells nothing, so this is what is likely, not what is so."""

    def __init__(self) -> None:
        self._blocks: dict[Readers, dict[bytes, None]] = {}

    def apply(self, readers: Readers, events: Iterable[KVEvent]) -> None:
        blocks = self._blocks.setdefault(readers, {})
        for event in events:
            if event.tier is not Tier.POOL:
                continue
            for key in event.block_hashes:
                blocks.pop(key, None)
                if isinstance(event, BlocksStored):
                    blocks[key] = None
        while len(blocks) > MOST_POOL_BLOCKS:
            del blocks[next(iter(blocks))]

    def ends(self, readers: Readers, hashes: Sequence[bytes]) -> Depths | None:
        """For each number of leading blocks that somebody has, where the run ends that goes on in the pool. None: nothing is there."""
        blocks = self._blocks.get(readers)
        if not blocks:
            return None
        count = len(hashes)
        held = np.fromiter(map(blocks.__contains__, hashes), dtype=np.bool_, count=count)
        gaps = np.append(np.where(held, count, np.arange(count)), count)
        return np.minimum.accumulate(gaps[::-1])[::-1]


def _depths(layers: Sequence[Mapping[bytes, int]], hashes: Sequence[bytes], count: int) -> list[Depths]:
    """For each layer, by place, how many leading blocks are in it or in one before. One AND a block, for each layer that has any."""
    used = [layers[0], *(layer for layer in layers[1:] if layer)]
    runs = [[(1 << count) - 1] for _ in used]  # whose runs go on, from the block in `starts` on
    starts = [[0] for _ in used]
    for begin in range(0, len(hashes), _STRETCH):
        stretch, bits = hashes[begin : begin + _STRETCH], [0] * _STRETCH
        for layer, run, start in zip(used, runs, starts, strict=True):
            bits = list(map(_OR, bits, map(layer.get, stretch, repeat(0))))
            alive = list(accumulate(bits, _AND, initial=run[-1]))
            for number in compress(range(len(stretch)), map(_NE, alive[1:], alive)):
                run.append(alive[number + 1])
                start.append(begin + number)
        if not runs[-1][-1]:
            break
    told = (_lengths(run, [*start, len(hashes)], count) for run, start in zip(runs, starts, strict=True))
    latest = next(told)
    return [latest, *((latest := next(told)) if layer else latest for layer in layers[1:])]


def _lengths(runs: Sequence[int], starts: Sequence[int], count: int) -> Depths:
    """By place, the block at which its run ends. `runs[i]`: whose run goes on from block `starts[i]` to `starts[i + 1]`; always fewer."""
    size = -(-count // 8)
    packed = np.frombuffer(b"".join(bits.to_bytes(size, "little") for bits in runs), dtype=np.uint8).reshape(len(runs), size)
    bits = np.unpackbits(packed, axis=1, count=count, bitorder="little")
    return np.array(starts, dtype=np.int64)[np.add.reduce(bits, axis=0, dtype=np.uint8 if len(runs) < 256 else np.uint32)]


def _clear(holders: dict[bytes, int], key: bytes, bit: int) -> None:
    left = holders.get(key, 0) & ~bit
    if left:
        holders[key] = left
    else:
        holders.pop(key, None)
