"""Direct push over whatever a pair of workers has in common: one receiver or sender for each protocol that this worker announces."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from baton.config import PushConfig
from baton.errors import TransferError
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Choice, Copy, Offer, PushResult, PushStatus, choose
from baton.kv.store import Buffer
from baton.types import PushTarget

logger = logging.getLogger(__name__)
Protocol = Literal["nvlink_intra", "rdma", "tcp"]


def this_machine() -> str:
    """The same for all processes that could share a device, or see each other's memory."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


class DirectReceiver:
    def __init__(self, region: Buffer, config: PushConfig) -> None:
        """Raises ConfigError if a protocol is not to be had, TransferError."""
        self.machine = this_machine()
        self._receivers = [
            MooncakeReceiver(region, host=config.host, protocol=protocol, devices=config.devices) for protocol in config.protocols
        ]
        self._advanced = False
        self.sessions = self._sessions()
        """Of the present generation: protocol and session. Replaced as a whole."""

    def _sessions(self) -> tuple[tuple[str, str], ...]:
        return tuple((receiver.protocol, receiver.session) for receiver in self._receivers)

    def advance(self) -> None:
        """New sessions for who asks from now on; none, if those before are not fenced yet. Blocks. Raises TransferError."""
        if not self._advanced:
            for receiver in self._receivers:
                receiver.advance()
            self.sessions, self._advanced = self._sessions(), True

    def fence(self) -> None:
        """Ends all older sessions: no write under them lands any more. Blocks. Raises InternalError or TransferError where that can't be
        said."""
        for receiver in self._receivers:
            receiver.fence()
        if fixed := [receiver.protocol for receiver in self._receivers if not receiver.revocable]:
            raise TransferError(f"writes over {', '.join(fixed)} can't be revoked from this side: their sender has to end them")
        self._advanced = False

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()


class DirectSender:
    """Counts what it sends: `values`, by name."""

    def __init__(self, region: Buffer, config: PushConfig) -> None:
        """Raises ConfigError if a protocol is not to be had, TransferError."""
        self._offer = Offer(this_machine(), config.protocols)
        self._senders = {
            protocol: MooncakeSender(region, host=config.host, protocol=protocol, limit_s=config.limit_s, devices=config.devices)
            for protocol in config.protocols
        }
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # of the values: each session has a thread
        self.values = {"push_bytes": 0.0, "push_seconds": 0.0, "push_failures": 0.0}

    def path(self, target: PushTarget) -> Choice:
        """The protocol for this target, and why."""
        choice = choose(self._offer, Offer(target.machine, tuple(protocol for protocol, _ in target.sessions)))
        if (target.machine, choice.protocol) not in self._told:
            self._told.add((target.machine, choice.protocol))
            logger.info("push to %s: %s (%s)", target.machine, choice.protocol or "not possible", choice.reason)
        return choice

    def push(self, target: PushTarget, copies: Sequence[Copy], done: Callable[[PushResult], None], settled: Callable[[], None]) -> None:
        choice = self.path(target)

        def counted(result: PushResult) -> None:
            good = result.status is PushStatus.GOOD
            with self._lock:
                self.values["push_bytes"] += result.nbytes * good
                self.values["push_seconds"] += result.seconds * good
                self.values["push_failures"] += not good
            if not good:
                logger.warning("push of %d bytes over %s: %s", result.nbytes, choice.protocol, result.reason)
            done(result)

        if not choice.protocol:
            counted(PushResult(PushStatus.FAILED, 0, 0.0, choice.reason))
            settled()
        else:
            self._senders[choice.protocol].push(dict(target.sessions)[choice.protocol], copies, counted, settled)

    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
