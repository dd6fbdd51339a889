"""RankKV: one rank's KV memory and what moves it: its share of direct pushes, and its tiers. Every rank has one; rank 0 leads them
(`runtime.spread`), so the others' part of a block goes where its own goes."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.config import WorkerConfig, pool_master
from baton.errors import ConfigError
from baton.kv.connect import connect_push
from baton.kv.direct import DirectReceiver
from baton.kv.layout import KVLayout, block_key
from baton.kv.pool import KVPool
from baton.kv.push import Door
from baton.kv.shards import Share, ShareSender, share_checksum
from baton.kv.tiers import connect_tiers
from baton.kv.transfer import KVTransfer
from baton.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKV:
    pool: KVPool  # of this rank's share
    layout: KVLayout  # of the whole
    share: Share
    prefix: str  # of its keys in tiers: workers with other numbers of ranks have others
    sender: ShareSender | None
    receiver: DirectReceiver | None
    tiers: Sequence[KVTransfer]

    def key(self, block_hash: bytes) -> str:
        """Of this rank's share, in tiers: `block_key`, as fast as it can be for all blocks of a long prompt."""
        return self.prefix + block_hash.hex()

    def door(self) -> Door:
        assert self.receiver is not None
        return Door(self.receiver.machine, self.receiver.sessions, self.pool.region.address, self.pool.layout.block_bytes)

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        return [share_checksum(self.layout, self.share, self.pool.buffer(block_id)) for block_id in block_ids]


def connect_kv(config: WorkerConfig, pool: KVPool, layout: KVLayout, share: Share, fingerprint: str, *, apart: bool = False) -> RankKV:
    """`apart`: this worker's ranks are on several machines. Raises ConfigError where what the configuration asks for is not to be had."""
    host = config.host.model_copy(update={"bytes": config.host.bytes // share.size})
    store = config.pool.model_copy(update={"master": pool_master(config.pool, config.cluster)})
    prefix = block_key(fingerprint, b"", share.rank, share.size)
    tiers = connect_tiers(host, store, config.files, pool.tensor, pool.layout.block_bytes, prefix=prefix, cluster=config.cluster.name)
    reached_at = config.push.host or config.server.advertise or config.server.host
    push = config.push.model_copy(update={"host": reached_at})
    if apart:
        _check_reach("pool.master", *store.master.removeprefix("etcd://").split(";"))
        if config.role is not Role.UNIFIED and push.protocols != ():
            _check_reach("push.host or server.advertise", reached_at)
    direct, receiver = connect_push(push, config.role, pool.region, cuda=pool.tensor.is_cuda, apart=apart)
    sender = None if direct is None else ShareSender(direct, layout, share, pool.buffer)
    return RankKV(pool=pool, layout=layout, share=share, prefix=prefix, sender=sender, receiver=receiver, tiers=tiers)


def _check_reach(name: str, *addresses: str) -> None:
    """Raises ConfigError for one that is this machine's alone."""
    for address in addresses:
        host = address.rpartition(":")[0] or address
        if host == "localhost" or host.startswith("127."):
            raise ConfigError(f"{name}={address}: this worker's ranks are on several machines; give an address that all of them reach")
