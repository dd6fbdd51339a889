"""Which direct paths between workers a configuration asks for. (Which tiers: `kv.tiers`.)"""

import logging
from collections.abc import Callable
from typing import TypeVar

from baton.config import PushConfig
from baton.errors import BatonError
from baton.kv.direct import DirectReceiver, DirectSender
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.store import Buffer
from baton.kv.transfer_engine import found_protocols
from baton.types import Role

logger = logging.getLogger(__name__)
T = TypeVar("T")


def connect_push(config: PushConfig, role: Role, region: Buffer, *, cuda: bool) -> tuple[DirectSender | None, DirectReceiver | None]:
    """Of the memory `region`, a GPU's if `cuda`: a prefill worker sends, a decode worker receives. Raises ConfigError where Mooncake or a
    protocol that was asked for is not to be had."""
    if role is Role.UNIFIED or config.protocols == ():
        return None, None
    options = {"host": config.host, "devices": config.devices}
    if role is Role.PREFILL:
        senders = _each(config, cuda, lambda protocol: MooncakeSender(region, protocol=protocol, limit_s=config.limit_s, **options))
        return DirectSender(senders), None
    return None, DirectReceiver(_each(config, cuda, lambda protocol: MooncakeReceiver(region, protocol=protocol, **options)))


def _each(config: PushConfig, cuda: bool, make: Callable[[str], T]) -> dict[str, T]:
    """By protocol. What is merely thought to be there is left out where it is not."""
    if config.protocols is not None:
        return {protocol: make(protocol) for protocol in config.protocols}
    made: dict[str, T] = {}
    for protocol in found_protocols(cuda):
        try:
            made[protocol] = make(protocol)
        except BatonError as error:
            if protocol == "tcp":
                raise
            logger.warning("KV is not pushed over %s: %s", protocol, error.message)
    return made
