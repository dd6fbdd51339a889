"""PrefixIndex: which workers hold which KV blocks, exactly, from their events; which they are about to hold, from what was sent there; and
what they can read from the pool, as far as it was noticed.

One table for all of it, since a look-up that misses the cache is what a decision pays most for: block hash → who can have it, as the bits
of an integer. A worker has `_LANES` of them, from its *place* on, each for the ways to have the block that the lane allows, and those
before: it is on the device; it will be, when that is computed which was sent there; it is in host memory; in files; in the pool. So the AND
of a prompt's first blocks has the bits of those who can have all of them, in each way. Blocks that were told together mostly share one
integer.
"""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate, islice, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.types import BlocksStored, Digest, KVEvent, Tier

Depths = NDArray[np.floating[Any]]  # by lane and place
Readers = tuple[str, int]  # of the same blocks in the pool: fingerprint, and degree of tensor parallelism
OWN_TIERS = (Tier.DEVICE, Tier.HOST, Tier.FILES)  # what a worker holds for itself, fastest first
FETCHED = (Tier.HOST, Tier.FILES, Tier.POOL)
_untyped: Any = operator
_AND: Callable[[int, int], int] = _untyped.and_
_OR: Callable[[int, int], int] = _untyped.or_
_XOR: Callable[[int, int], int] = _untyped.xor
_LANES = 5
_COMING = 2  # beside `_WAYS`: it will be on the device
_WAYS = {Tier.DEVICE: 1, Tier.HOST: 4, Tier.FILES: 8}
_OWN = sum(_WAYS.values())
_STRETCH = 64  # blocks that are looked at before it is asked whether anybody's run goes on
_WEIGHTS = 2.0 ** np.arange(23, -1, -1, dtype=np.float32)  # of digits; what is counted is exact in 24 of them
MOST_POOL_BLOCKS = 1 << 18  # remembered, for each kind of reader; those that were saved first are forgotten first


@dataclass(slots=True)
class _Holder:
    """A worker; or a pool, which has its blocks in one way."""

    bits: Sequence[int]  # in the table, of a block that it has in these ways
    blocks: dict[bytes, int] = field(default_factory=dict[bytes, int])  # in which ways
    digests: dict[Tier, Digest] = field(default_factory=lambda: {tier: Digest(tier, 0, 0) for tier in OWN_TIERS})
    coming: dict[str, Sequence[bytes]] = field(default_factory=dict[str, Sequence[bytes]])  # by request
    readers: Readers | None = None
    reading: int = 0  # a pool's: the bits of those who read it


class PrefixIndex:
    def __init__(self) -> None:
        self._table: dict[bytes, int] = {}
        self._places: dict[str | Readers, int] = {}
        self._free: list[int] = []  # places
        self._holders: dict[str, _Holder] = {}
        self._pools: dict[Readers, _Holder] = {}

    def reads(self, worker: str, readers: Readers) -> None:
        """Whose pool a worker reads, once it is known. Pools that nobody reads are remembered until there is another kind of reader: the
        only worker may be starting again, or a new version may have replaced it."""
        self._holder(worker).readers = readers
        pool = self._pools.get(readers)
        if pool is None:
            for unread in [key for key, each in self._pools.items() if not each.reading]:
                self._forget_pool(unread)
            pool = self._pools[readers] = _Holder((0, 1 << _LANES * self._place(readers)))
        pool.reading |= self._last_lane(worker)

    def apply(self, worker: str, events: Iterable[KVEvent], *, snapshot: bool = False) -> None:
        """Takes in a worker's events, in order. A snapshot replaces what was known of it."""
        holder = self._holder(worker)
        if snapshot:
            self._set(holder, list(holder.blocks), _OWN, on=False)
            holder.digests = {tier: Digest(tier, 0, 0) for tier in OWN_TIERS}
        for event in events:
            stored = isinstance(event, BlocksStored)
            if event.tier in _WAYS:
                changed = self._set(holder, event.block_hashes, _WAYS[event.tier], on=stored)
                held = holder.digests[event.tier]
                count = held.num_blocks + (len(changed) if stored else -len(changed))
                holder.digests[event.tier] = Digest(event.tier, count, reduce(_XOR, map(int.from_bytes, changed), held.xor))
            elif event.tier is Tier.POOL and holder.readers is not None:
                self._notice(self._pools[holder.readers], event.block_hashes, stored)

    def remove(self, worker: str) -> None:
        """Forgets a worker."""
        holder = self._holders.get(worker)
        if holder is None:
            return
        self._set(holder, list(holder.blocks), _OWN | _COMING, on=False)
        if holder.readers is not None:
            self._pools[holder.readers].reading ^= self._last_lane(worker)
        del self._holders[worker]
        self._free.append(self._places.pop(worker))

    def expect(self, worker: str, request_id: str, hashes: Sequence[bytes]) -> None:
        """The worker was sent a request, for which it will compute these blocks, unless `settle` comes first."""
        holder = self._holder(worker)
        holder.coming[request_id] = hashes
        self._set(holder, hashes, _COMING, on=True)

    def settle(self, worker: str, request_id: str) -> None:
        """What the request has computed there is held by now, and the rest will not be. Of equal blocks that others compute there too, it
        is no longer known that they do: they are told as they are held."""
        holder = self._holders.get(worker)
        if holder is not None:
            self._set(holder, holder.coming.pop(request_id, ()), _COMING, on=False)

    def places(self, workers: Iterable[str]) -> NDArray[np.intp]:
        """Where each is in what `reaches` gives; until one of them is removed."""
        return np.array([self._place(worker) for worker in workers], dtype=np.intp)

    def reaches(self, hashes: Sequence[bytes], places: NDArray[np.intp]) -> Depths:
        """How many leading blocks of `hashes` the worker at each of these places holds on its device; how many it will hold, when it has
        computed what was sent there; and how many it can have by fetching: from its host memory, from its files too, from the pool too.

        Who has the first n blocks has the first n - 1. So digit k of a worker's number is the XOR of its bits after 2ᵏ blocks, and after
        each 2ᵏ more; half of which are those for digit k + 1."""
        states, length, reading = self._states(hashes)
        count, digits, digit = self._num_bits, list[int](), 0
        for k in reversed(range(len(states).bit_length())):
            digit = reduce(_XOR, states[(1 << k) - 1 :: 2 << k], digit)
            digits.append(digit ^ reading if length >> k & 1 else digit)
        size, weights = -(-count // 8), _WEIGHTS[len(_WEIGHTS) - len(digits) :]
        packed = np.frombuffer(b"".join([digit.to_bytes(size, "little") for digit in digits]), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(digits), size), axis=1, count=count, bitorder="little")
        return (weights @ bits.astype(np.float32)).reshape(-1, _LANES).T.take(places, axis=1)

    def blocks(self, worker: str, tier: Tier = Tier.DEVICE) -> frozenset[bytes]:
        """What a worker is known to hold; for comparison with the worker's own."""
        known = self._holders[worker].blocks if worker in self._holders else {}
        return frozenset(key for key, ways in known.items() if ways & _WAYS[tier])

    def digests(self, worker: str) -> dict[Tier, Digest]:
        """Of what a worker is known to hold."""
        return dict(self._holders[worker].digests) if worker in self._holders else {}

    def agrees(self, worker: str, digests: Iterable[Digest]) -> bool:
        """Whether that is what the worker says it holds; in tiers of which it says nothing it may be anything."""
        known = self.digests(worker)
        return all(known[each.tier] == each for each in digests if each.tier in known)

    def __len__(self) -> int:
        """Blocks on devices; what several hold counts for each of them."""
        return sum(holder.digests[Tier.DEVICE].num_blocks for holder in self._holders.values())

    def _states(self, hashes: Sequence[bytes]) -> tuple[list[int], int, int]:
        """Who can have all blocks up to each of them, until nobody can. Of the first ones, so many, the readers of their pools, whose bits
        are the last, can have all: these bits are missing there."""
        states, alive = list[int](), (1 << self._num_bits) - 1
        pools = [(pool.bits[1], pool.reading) for pool in self._pools.values() if pool.reading and pool.blocks]
        beginning = self._table.get(hashes[0], 0) if pools and hashes else 0
        whole, others = [pool for pool in pools if pool[0] & beginning], [pool for pool in pools if not pool[0] & beginning]
        bits, readers = reduce(_OR, (bit for bit, _ in whole), 0), reduce(_OR, (reading for _, reading in whole), 0)
        length, alive, within = 0, alive & ~readers, bool(whole)
        for begin in range(0, len(hashes), _STRETCH):
            who = list(map(self._table.get, hashes[begin : begin + _STRETCH], repeat(0)))
            for bit, reading in others if within else pools:
                who = [some | reading if some & bit else some for some in who]
            if within:  # all blocks so far are in these pools
                some = list(accumulate(who, _AND, initial=alive))
                num = bisect_left(some, True, lo=1, key=lambda state: state & bits != bits) - 1
                states += some[1 : num + 1]
                length, alive, who = length + num, some[num], who[num:]
                if not who:
                    continue
                within, alive = False, alive | readers
                for bit, reading in whole:
                    who = [some | reading if some & bit else some for some in who]
            states += islice(accumulate(who, _AND, initial=alive), 1, None)
            alive = states[-1]
            if not alive:
                break
        return states, length, readers

    def _set(self, holder: _Holder, keys: Iterable[bytes], ways: int, *, on: bool) -> list[bytes]:
        """It has these blocks in these ways, or has not; those for which that is new."""
        table, blocks, bits, changed = self._table, holder.blocks, holder.bits, list[bytes]()
        before = after = turn = 0
        for key in keys:
            old = blocks.get(key, 0)
            new = old | ways if on else old & ~ways
            if new == old:
                continue
            changed.append(key)
            if new:
                blocks[key] = new
            else:
                del blocks[key]
            was, now = bits[old], bits[new]
            if was is now:
                continue
            known = table.get(key, 0)
            if known is not before or turn != (old << 4 | new):  # else the same as for the block before it
                before, turn, after = known, old << 4 | new, now if known == was else known ^ was ^ now
            if after:
                table[key] = after
            else:
                del table[key]
        return changed

    def _notice(self, pool: _Holder, keys: Sequence[bytes], stored: bool) -> None:
        """What workers tell of a pool: what they saved, and where a prefix was not found any more. The pool itself tells nothing, so this
        is what is likely, not what is so."""
        for key in keys:
            if key in pool.blocks:  # the latest again
                pool.blocks[key] = pool.blocks.pop(key)
        self._set(pool, keys, 1, on=stored)
        self._set(pool, list(islice(pool.blocks, max(len(pool.blocks) - MOST_POOL_BLOCKS, 0))), 1, on=False)

    def _forget_pool(self, readers: Readers) -> None:
        pool = self._pools.pop(readers)
        self._set(pool, list(pool.blocks), 1, on=False)
        self._free.append(self._places.pop(readers))

    def _holder(self, worker: str) -> _Holder:
        holder = self._holders.get(worker)
        if holder is None:
            first = _LANES * self._place(worker)
            lanes = [0, *(((1 << _LANES) - (1 << lane)) << first for lane in range(_LANES - 1))]
            holder = self._holders[worker] = _Holder([lanes[(ways & -ways).bit_length()] for ways in range(16)])
        return holder

    def _last_lane(self, worker: str) -> int:
        return 1 << _LANES * self._place(worker) + _LANES - 1

    def _place(self, who: str | Readers) -> int:
        if who not in self._places:
            self._places[who] = self._free.pop() if self._free else len(self._places)
        return self._places[who]

    @property
    def _num_bits(self) -> int:
        return _LANES * (len(self._places) + len(self._free))
