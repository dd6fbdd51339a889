"""What ranks keep of a block, and how it gets from the ranks of one worker to those of another. Torch-free.

    the whole block   [num_layers, 2, heads 0 1 2 3, block_size, head_dim]
    2 ranks           [num_layers, 2, heads 0 1, …]   [num_layers, 2, heads 2 3, …]        an equal part each, in their order

Between equal numbers of ranks a share is one copy. Else two ranks have a range of heads in common, or nothing: one copy for each layer
and each of K and V, which lie as far apart as either side's share has heads.
"""

import ctypes
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from baton.kv.direct import DirectSender
from baton.kv.layout import KVLayout
from baton.kv.push import Copy, PushResult, PushStatus
from baton.kv.store import Buffer
from baton.types import PushShard


@dataclass(frozen=True, slots=True)
class Share:
    """Of a block: that of rank `rank` of `size`."""

    rank: int
    size: int

    def heads(self, layout: KVLayout) -> range:
        """`layout`: of the whole."""
        count = layout.num_kv_heads // self.size
        return range(self.rank * count, (self.rank + 1) * count)


def common_heads(layout: KVLayout, source: Share, target: Share) -> range:
    here, there = source.heads(layout), target.heads(layout)
    return range(max(here.start, there.start), min(here.stop, there.stop))


def share_copies(layout: KVLayout, source: Share, target: Share, blocks: Sequence[tuple[int, int]]) -> list[Copy]:
    """What `source` has of `target`'s share. `blocks`: addresses of the one's and the other's share of each; `layout`: of the whole."""
    if source == target:
        nbytes = layout.share(source.size).block_bytes
        return [Copy(here, there, nbytes) for here, there in blocks]
    heads, here, there = common_heads(layout, source, target), source.heads(layout), target.heads(layout)
    nbytes = len(heads) * layout.head_bytes
    if not nbytes:
        return []
    offsets = [
        (half * len(here) + heads.start - here.start, half * len(there) + heads.start - there.start)
        for half in range(2 * layout.num_layers)
    ]
    size = layout.head_bytes
    return [Copy(source + here * size, target + there * size, nbytes) for source, target in blocks for here, there in offsets]


def share_checksum(layout: KVLayout, share: Share, buffer: Buffer) -> int:
    """Of one rank's share of a block: those of all shares, added modulo 2³², are the same for any number of ranks."""
    total, heads = 0, share.heads(layout)
    view = memoryview((ctypes.c_char * buffer.nbytes).from_address(buffer.address)).cast("B")
    for half in range(2 * layout.num_layers):
        for index, head in enumerate(heads):
            start = (half * len(heads) + index) * layout.head_bytes
            total += zlib.crc32(view[start : start + layout.head_bytes], half * layout.num_kv_heads + head)
    return total % 2**32


class Joint:
    """Several pushes that are told of as one: when the last has ended, and when the last has settled. Each calls `done` and `settled`;
    thread-safe."""

    def __init__(self, count: int, done: Callable[[PushResult], None], settled: Callable[[], None]) -> None:
        self._done, self._settled = done, settled
        self._results: list[PushResult] = []
        self._to_end = self._to_settle = count
        self._lock = threading.Lock()

    def done(self, result: PushResult) -> None:
        with self._lock:
            self._results.append(result)
            self._to_end -= 1
            last = self._to_end == 0
        if last:
            self._done(_merged(self._results))

    def settled(self) -> None:
        with self._lock:
            self._to_settle -= 1
            last = self._to_settle == 0
        if last:
            self._settled()


def _merged(results: Sequence[PushResult]) -> PushResult:
    bad = [result for result in results if result.status is not PushStatus.GOOD]
    unknown = any(result.status is PushStatus.UNKNOWN for result in bad)
    status = PushStatus.GOOD if not bad else PushStatus.UNKNOWN if unknown else PushStatus.FAILED
    return PushResult(
        status,
        sum(result.nbytes for result in results),
        max(result.seconds for result in results),
        "; ".join(dict.fromkeys(result.reason for result in bad)),
        lands_late=any(result.lands_late for result in results),
    )


class ShareSender:
    """One rank's part of a push: what it has of the blocks goes to each rank that keeps some of it."""

    def __init__(self, direct: DirectSender, layout: KVLayout, share: Share, buffer: Callable[[int], Buffer]) -> None:
        """`layout`: of the whole; `buffer`: this rank's share of a block."""
        self.direct = direct
        self._layout, self._share, self._buffer = layout, share, buffer

    def peers(self, size: int) -> list[int]:
        """Which of `size` ranks keep some of what this one has."""
        return [rank for rank in range(size) if common_heads(self._layout, self._share, Share(rank, size))]

    def push(
        self, shards: Sequence[PushShard], block_ids: Sequence[int], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        """`shards`: of all ranks there, their addresses for these blocks alone. See `kv.push.Sender`. Between different numbers of ranks
        copies are many, so they are spelled out on the sender's threads, not on the caller's."""
        peers, size = self.peers(len(shards)), len(shards)
        joint = Joint(len(peers), done, settled)
        addresses = [self._buffer(block_id).address for block_id in block_ids]
        for rank in peers:
            blocks = list(zip(addresses, shards[rank].addresses, strict=True))
            copies = partial(share_copies, self._layout, self._share, Share(rank, size), blocks)
            self.direct.push(shards[rank], copies, joint.done, joint.settled)

    def close(self) -> None:
        self.direct.close()
