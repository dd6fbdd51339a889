"""Tiers of KV behind the device, as the engine's thread sees them: one rank's (`kv.transfer`), or all ranks' (`runtime.spread`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from baton.kv.store import Buffer
from baton.types import BlocksRemoved, BlocksStored, KVEvent
from baton.types import Tier as TierName


class Tier(Protocol):
    """`done` of each call is called exactly once, on any thread."""

    name: str
    shared: bool  # other workers can read it
    direct: bool  # is saved to from here

    @property
    def available(self) -> bool: ...  # it answers, as far as is known

    @property
    def doubtful(self) -> bool: ...  # it is asked, so that one notices when it is back, but not waited for

    def seconds(self, nbytes: int) -> float: ...

    def decline(self, num_blocks: int) -> None: ...

    def leave_out(self, num_blocks: int) -> None: ...

    def lookup(self, keys: Sequence[str], done: Callable[[list[bool]], None]) -> None: ...

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def flush(self, limit_s: float) -> None: ...

    def close(self) -> None: ...


class Tiers:
    """A worker's, fastest first; who loads and saves has numbers for them. And what its routers are told of them."""

    def __init__(self, tiers: Sequence[Tier], *, key: Callable[[bytes], str], buffer: Callable[[int], Buffer], block_size: int) -> None:
        """`key` names a block hash in all of them, `buffer` gives a block's memory. `block_size` in tokens."""
        self._tiers, self.key, self.buffer, self._block_size = tiers, key, buffer, block_size
        self.direct = [number for number, tier in enumerate(tiers) if tier.direct]
        self.shared = [number for number, tier in enumerate(tiers) if tier.shared]
        self.private = [number for number in self.direct if not tiers[number].shared]
        self._news: list[KVEvent] = []  # of the pool

    def __len__(self) -> int:
        return len(self._tiers)

    def __iter__(self) -> Iterator[Tier]:
        return iter(self._tiers)

    def __getitem__(self, number: int) -> Tier:
        return self._tiers[number]

    def block_s(self, number: int) -> float:
        """Seconds that loading a block takes, as far as is known."""
        return self._tiers[number].seconds(self.buffer(0).nbytes)

    def fetch_token_s(self) -> tuple[tuple[TierName, float], ...]:
        """See `Load`. In steps of a fifth, so that what ages slowly is not told all the time."""
        names = frozenset(map(str, TierName))
        told = [(TierName(tier.name), number) for number, tier in enumerate(self._tiers) if tier.name in names and tier.available]
        rates = [(name, self.block_s(number) / self._block_size) for name, number in told]
        return tuple((name, 2 ** (round(4 * math.log2(rate)) / 4) if rate > 0 else 0.0) for name, rate in rates)

    def stored(self, number: int, hashes: Sequence[bytes]) -> None:
        """A tier has saved these blocks."""
        if self._tiers[number].name == TierName.POOL and hashes:
            self._news.append(BlocksStored(tuple(hashes), TierName.POOL))

    def missed(self, number: int, block_hash: bytes) -> None:
        """A lookup in a tier has not found this block, the first of a prompt: there the prefix ends, and no router need know more. Calls
        that were not made say nothing."""
        tier = self._tiers[number]
        if tier.name == TierName.POOL and tier.available and not tier.doubtful:
            self._news.append(BlocksRemoved((block_hash,), TierName.POOL))

    def take_news(self) -> list[KVEvent]:
        """Of the pool, which nobody owns: what was saved there and what was missed, in that order."""
        news, self._news = self._news, []
        return news
