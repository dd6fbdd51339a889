"""Which direct paths between workers a configuration asks for. (Which tiers: `kv.tiers`.)"""

import logging
from collections.abc import Callable
from typing import TypeVar

from baton.config import PushConfig
from baton.errors import BatonError, ConfigError
from baton.kv.direct import DirectReceiver, DirectSender
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import ONE_MACHINE
from baton.kv.store import Buffer
from baton.kv.transfer_engine import found_protocols
from baton.types import Role

logger = logging.getLogger(__name__)
T = TypeVar("T")


def connect_push(
    config: PushConfig, role: Role, region: Buffer, *, cuda: bool, apart: bool = False
) -> tuple[DirectSender | None, DirectReceiver | None]:
    """Of the memory `region`, a GPU's if `cuda`: a prefill worker sends, a decode worker receives. `apart`: its ranks are on several
    machines. Raises ConfigError where Mooncake or a protocol that was asked for is not to be had."""
    if role is Role.UNIFIED or config.protocols == ():
        return None, None
    if apart and ONE_MACHINE in (config.protocols or ()):
        raise ConfigError(
            f"push.protocols: {ONE_MACHINE} is not for a worker whose ranks are on several machines; give rdma or tcp, or nothing"
        )
    options = {"host": config.host, "devices": config.devices}
    if role is Role.PREFILL:
        senders = _each(config, cuda, apart, lambda protocol: MooncakeSender(region, protocol=protocol, limit_s=config.limit_s, **options))
        return DirectSender(senders), None
    return None, DirectReceiver(_each(config, cuda, apart, lambda protocol: MooncakeReceiver(region, protocol=protocol, **options)))


def _each(config: PushConfig, cuda: bool, apart: bool, make: Callable[[str], T]) -> dict[str, T]:
    """By protocol. What is merely thought to be there is left out where it is not."""
    if config.protocols is not None:
        return {protocol: make(protocol) for protocol in config.protocols}
    made: dict[str, T] = {}
    for protocol in found_protocols(cuda):
        if apart and protocol == ONE_MACHINE:  # who fences it asks for the death of one process (services/decode/leases.py)
            continue
        try:
            made[protocol] = make(protocol)
        except BatonError as error:
            if protocol == "tcp":
                raise
            logger.warning("KV is not pushed over %s: %s", protocol, error.message)
    return made
