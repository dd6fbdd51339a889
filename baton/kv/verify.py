"""`pool.verify`, for test builds: a block's checksum is taken on the engine's thread when the block was computed, not when it is put. So
what is written to a block that waits for its save is found out, too. KV in host memory only."""

from collections.abc import Callable, Sequence

from baton.kv.mooncake import MooncakeStore
from baton.kv.store import Buffer
from baton.kv.transfer import KVTransfer


class VerifiedTransfer(KVTransfer):
    def __init__(self, store: MooncakeStore) -> None:
        super().__init__(store, stats=store.stats)
        self._mooncake = store

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        self._mooncake.take(keys, buffers)
        super().save(keys, buffers, done)
