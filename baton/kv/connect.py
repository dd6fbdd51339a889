"""Which KV pool, and which direct paths between workers, a configuration asks for."""

from baton.config import PoolConfig, PushConfig
from baton.kv.direct import DirectReceiver, DirectSender
from baton.kv.mooncake import MooncakeStore
from baton.kv.store import Buffer
from baton.kv.transfer import KVTransfer, NoTransfer
from baton.types import Role


def connect_pool(pool: PoolConfig, region: Buffer) -> KVTransfer | NoTransfer:
    """Transfers for the memory `region`. The pool itself may come later. Raises ConfigError where Mooncake is not installed."""
    if not pool.master:
        return NoTransfer()
    store = MooncakeStore(pool.master, host=pool.host, protocol=pool.protocol, devices=pool.devices, local_buffer=pool.local_buffer)
    store.register(region)
    return KVTransfer(store)


def connect_push(config: PushConfig, role: Role, region: Buffer) -> tuple[DirectSender | None, DirectReceiver | None]:
    """Of the memory `region`: a prefill worker sends, a decode worker receives. Raises ConfigError where Mooncake or a protocol is not to
    be had."""
    if not config.protocols:
        return None, None
    sender = DirectSender(region, config) if role is Role.PREFILL else None
    receiver = DirectReceiver(region, config) if role is Role.DECODE else None
    return sender, receiver
