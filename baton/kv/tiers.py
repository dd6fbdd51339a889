"""The tiers of a worker's KV behind the device, fastest first; docs/tiers.md has the picture. Each is a KVTransfer of its own, so that none
waits for another; what is loaded from where, `runtime.loading` decides, what is saved, `runtime.saving`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from baton.config import FilesConfig, HostConfig, PoolConfig
from baton.kv.files import FileStore
from baton.kv.holdings import Holdings
from baton.kv.host import HostStore
from baton.kv.memory import CpuMemory, memory_beside, summing_for
from baton.kv.mooncake import MooncakeStore
from baton.kv.neighbours import Neighbours, meeting_place, pool_name
from baton.kv.staged import StagedStore
from baton.kv.store import Buffer
from baton.kv.transfer import KVTransfer
from baton.kv.verify import VerifiedTransfer
from baton.types import Tier


class HostTier(KVTransfer):
    """What is saved here is written back from here to a tier behind, so that the device's blocks need not wait for that one."""

    def __init__(self, store: HostStore, behind: KVTransfer | None, holdings: Holdings | None = None) -> None:
        super().__init__(store, "host", shared=False, usage=store.usage, holdings=holdings)
        self._host, self._behind = store, behind

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        def saved(stored: list[bool]) -> None:
            if self._behind is not None:
                self._write_back([key for key, good in zip(keys, stored, strict=True) if good], self._behind)
            done(stored)

        super().save(keys, buffers, saved)

    def _write_back(self, keys: Sequence[str], behind: KVTransfer) -> None:
        held = self._host.hold(keys)
        if held:
            behind.save(list(held), list(held.values()), lambda _: self._host.release(held))
        behind.leave_out(len(keys) - len(held))


def connect_tiers(
    host: HostConfig, pool: PoolConfig, files: FilesConfig, memory: torch.Tensor, block_bytes: int, *, prefix: str = "", cluster: str = ""
) -> list[KVTransfer]:
    """For `memory`, all KV blocks of this worker. `prefix`: of this worker's keys; a block hash in hex follows. A pool may come later;
    `cluster` is its name where it has several masters. Raises ConfigError where a tier can't be had."""
    tiers: list[KVTransfer] = []
    beside = memory_beside(memory)
    if files.path:
        filed = Holdings(Tier.FILES, prefix)
        store = FileStore(Path(files.path), files.bytes, filed, shared=files.shared)
        served = store if isinstance(beside, CpuMemory) else StagedStore(store, beside, block_bytes)
        direct = files.shared or not host.bytes  # who waits for what is shared does not wait for the host first
        own = None if files.shared else filed
        tiers.append(KVTransfer(served, "files", shared=files.shared, direct=direct, usage=store.usage, holdings=own))
    if pool.master:
        near = meeting_place(pool.near)
        summing = summing_for(memory)
        summing.sums([Buffer(memory.data_ptr(), block_bytes)])  # what is compiled for it is compiled now
        mooncake = MooncakeStore(
            pool.master,
            host=pool.host,
            cluster=cluster,
            protocol=pool.protocol,
            devices=pool.devices,
            local_buffer=pool.local_buffer,
            near=Neighbours(near, beside, pool_name(pool.master, cluster)) if near is not None else None,
            summing=summing,
        )
        mooncake.register(Buffer(memory.data_ptr(), memory.nbytes))
        tiers.append(VerifiedTransfer(mooncake) if pool.verify else KVTransfer(mooncake, stats=mooncake.stats))
    if host.bytes:
        behind = next((tier for tier in tiers if not tier.direct), None)
        held = Holdings(Tier.HOST, prefix)
        tiers.append(HostTier(HostStore(host.bytes, block_bytes, beside, held), behind, held))
    return tiers[::-1]
