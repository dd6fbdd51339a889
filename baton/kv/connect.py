"""Which KV pool a configuration asks for."""

from baton.config import PoolConfig
from baton.kv.mooncake import MooncakeStore
from baton.kv.store import Buffer
from baton.kv.transfer import KVTransfer, NoTransfer


def connect_pool(pool: PoolConfig, region: Buffer) -> KVTransfer | NoTransfer:
    """Transfers for the memory `region`. The pool itself may come later. Raises ConfigError where Mooncake is not installed."""
    if not pool.master:
        return NoTransfer()
    store = MooncakeStore(pool.master, host=pool.host, protocol=pool.protocol, devices=pool.devices, local_buffer=pool.local_buffer)
    store.register(region)
    return KVTransfer(store)
