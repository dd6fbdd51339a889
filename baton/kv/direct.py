"""Direct push over whatever a pair of workers has in common: one receiver or sender for each protocol that this worker announces."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from baton.cluster.machine import this_machine
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Choice, Copy, Offer, PushResult, PushStatus, choose
from baton.types import PushShard

logger = logging.getLogger(__name__)
LEFT_ALONE_S = 30.0  # a path that has failed, where there is another
_REMEMBERED = 1024  # failed paths, and paths that were told of


class DirectReceiver:
    def __init__(self, receivers: Mapping[str, MooncakeReceiver]) -> None:
        """`receivers`: by protocol."""
        self.machine = this_machine()
        self._receivers = dict(receivers)
        self._revocable = [receiver for receiver in receivers.values() if receiver.revocable]
        self._advanced = False
        self.sessions = self._sessions()
        """Of the present generation: protocol and session. Replaced as a whole."""

    @property
    def revocable(self) -> bool:
        """Whether `fence` ends all writes. Those of other protocols their sender has to end."""
        return len(self._revocable) == len(self._receivers)

    def _sessions(self) -> tuple[tuple[str, str], ...]:
        return tuple((protocol, receiver.session) for protocol, receiver in self._receivers.items())

    def advance(self) -> None:
        """New sessions for who asks from now on; none, if those before are not fenced yet. Blocks. Raises TransferError."""
        if not self._advanced:
            for receiver in self._revocable:
                receiver.advance()
            self.sessions, self._advanced = self._sessions(), True

    def fence(self) -> None:
        """Ends all older sessions: where that can be said (`revocable`), no write under them lands any more. Blocks. Raises
        InternalError."""
        for receiver in self._revocable:
            receiver.fence()
        self._advanced = False

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()


class DirectSender:
    """Counts what it sends: `values`, by name. A path that has failed is left alone for a while, if there is another."""

    def __init__(self, senders: Mapping[str, MooncakeSender]) -> None:
        """`senders`: by protocol."""
        self._offer = Offer(this_machine(), tuple(senders))
        self._senders = dict(senders)
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()  # machines and protocols
        self._failed: OrderedDict[str, tuple[float, str]] = OrderedDict()  # sessions, until when they are left alone, and why
        self._lock = threading.Lock()  # of what is above and below: each session has a thread
        self.values = {"push_bytes": 0.0, "push_seconds": 0.0, "push_failures": 0.0, "push_fallbacks": 0.0}

    def path(self, target: PushShard) -> Choice:
        """The protocol for this target, and why."""
        choice, _ = self._path(target)
        return choice

    def _path(self, target: PushShard) -> tuple[Choice, bool]:
        """And whether it stands in for one that has failed."""
        peer, now = Offer(target.machine, tuple(protocol for protocol, _ in target.sessions)), time.monotonic()
        with self._lock:
            left_alone = {protocol: self._failed[name] for protocol, name in target.sessions if name in self._failed}
        failed = {protocol: reason for protocol, (until, reason) in left_alone.items() if until > now}
        best = choose(self._offer, peer)
        choice = choose(self._offer, peer, failed) if failed else best
        if not choice.protocol:
            choice = best
        return choice, choice.protocol != best.protocol

    def _tell(self, machine: str, choice: Choice) -> None:
        """Once for each machine and protocol."""
        with self._lock:
            new = (machine, choice.protocol) not in self._told
            self._told[machine, choice.protocol] = None
            if len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
        if new:
            logger.info("push to %s: %s (%s)", machine, choice.protocol or "not possible", choice.reason)

    def push(
        self, target: PushShard, copies: Callable[[], Iterable[Copy]], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        """See `kv.push.Sender`."""
        choice, stands_in = self._path(target)
        self._tell(target.machine, choice)
        session = dict(target.sessions).get(choice.protocol, "")

        def counted(result: PushResult) -> None:
            good = result.status is PushStatus.GOOD
            with self._lock:
                self.values["push_bytes"] += result.nbytes * good
                self.values["push_seconds"] += result.seconds * good
                self.values["push_failures"] += not good
                self.values["push_fallbacks"] += good and stands_in
                if not good and session:
                    self._failed[session] = time.monotonic() + LEFT_ALONE_S, result.reason
                    self._failed.move_to_end(session)
                    while len(self._failed) > _REMEMBERED:
                        self._failed.popitem(last=False)
            if not good:
                logger.warning("push of %d bytes over %s: %s", result.nbytes, choice.protocol, result.reason)
            done(result)

        if not choice.protocol:
            counted(PushResult(PushStatus.FAILED, 0, 0.0, choice.reason))
            settled()
        else:
            self._senders[choice.protocol].push(session, copies, counted, settled)

    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
