"""Direct push: finished KV blocks are written by the worker that computed them straight into blocks that another worker reserved.

    sender                                       receiver
    push(session, copies) ──one-sided writes──▶  registered memory, open to whoever knows `session`
      done(GOOD | FAILED | UNKNOWN)              fence(): writes under older sessions land no more
      settled(): the sources may be reused

Each side has a question of its own after a push that did not go well. May the *sources* be reused? Once `settled` was called. May the
*targets*? After GOOD, or once the receiver has fenced the session: what the sender knows never tells, for bytes that it gave away may
still be on their way. Plain data and Protocols, torch-free. `kv.mooncake_push` implements them; docs/transfer.md says why it is so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from baton.types import PushShard

ONE_MACHINE = "nvlink_intra"
BEST_FIRST = (ONE_MACHINE, "rdma", "tcp")


class Copy(NamedTuple):
    source: int  # address in the sender's registered memory
    target: int  # address in the receiver's
    nbytes: int


class PushStatus(Enum):
    GOOD = "good"  # all bytes are in the receiver's memory
    FAILED = "failed"  # ended: some bytes may have landed, and some may be on their way; the sources are read no more
    UNKNOWN = "unknown"  # timed out: goes on, and still reads the sources


@dataclass(frozen=True, slots=True)
class PushResult:
    status: PushStatus
    nbytes: int
    seconds: float
    reason: str = ""  # of what is not GOOD
    lands_late: bool = False  # bytes that the sender gave away may still arrive, even when it has settled


class Receiver(Protocol):
    """Memory of this process that peers write into. A session is what they need to know; each generation has its own."""

    @property
    def session(self) -> str:
        """The present generation's, host:port."""
        ...

    def advance(self) -> str:
        """Starts a new generation and returns its session; writes under older sessions go on. Raises TransferError."""
        ...

    def fence(self) -> None:
        """Ends all generations but the present one: when this returns, no write under an older session lands any more. Raises InternalError
        if that is not certain; then nothing was freed."""
        ...

    def close(self) -> None: ...


class Sender(Protocol):
    def push(
        self, session: str, copies: Callable[[], Iterable[Copy]], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        """Writes `copies` into the peer's memory; returns at once. On a thread of the sender's: first they are asked for; then `done`
        exactly once, within the time limit; then `settled` exactly once, when the sources are not read any more (right after `done`, but
        for UNKNOWN)."""
        ...

    def close(self) -> None:
        """Ends all pushes: what waits is FAILED, what is under way UNKNOWN. When this returns, every `done` and `settled` was called; but
        for what can't be ended, which is logged as critical."""
        ...


def merge(copies: Iterable[Copy], most: int | None = None) -> list[Copy]:
    """The same bytes in as few copies as possible, of `most` bytes each at most: neighbours on both sides become one. Sorted by target."""
    runs: list[Copy] = []
    for copy in sorted(copies, key=lambda copy: copy.target):
        last = runs[-1] if runs else None
        if last is not None and last.source + last.nbytes == copy.source and last.target + last.nbytes == copy.target:
            runs[-1] = Copy(last.source, last.target, last.nbytes + copy.nbytes)
        else:
            runs.append(copy)
    if most is None:
        return runs
    return [Copy(s + at, t + at, min(most, nbytes - at)) for s, t, nbytes in runs for at in range(0, nbytes, most)]


@dataclass(frozen=True, slots=True)
class Door:
    """How others write into one rank's blocks: block i lies at base + i · block_bytes of its process."""

    machine: str
    sessions: tuple[tuple[str, str], ...]  # of the present generation: protocol and session
    base: int
    block_bytes: int

    def shard(self, block_ids: Sequence[int]) -> PushShard:
        return PushShard(self.machine, self.sessions, tuple(self.base + block_id * self.block_bytes for block_id in block_ids))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker announces: over which protocols it pushes or is pushed to, and which machine it runs on."""

    machine: str
    protocols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    protocol: str  # empty: there is no common one
    reason: str


def choose(sender: Offer, receiver: Offer, failed: Mapping[str, str] | None = None) -> Choice:
    """The best protocol for a pair, and why it is no better one. `failed`: protocols not to use for this pair, with the reasons."""
    passed: list[str] = []
    for protocol in BEST_FIRST:
        lacking = [name for name, offer in (("sender", sender), ("receiver", receiver)) if protocol not in offer.protocols]
        if len(lacking) == 2:
            continue
        if lacking:
            passed.append(f"{protocol}: not offered by the {lacking[0]}")
        elif protocol == ONE_MACHINE and sender.machine != receiver.machine:
            passed.append(f"{protocol}: two machines")
        elif failed and protocol in failed:
            passed.append(f"{protocol}: {failed[protocol]}")
        else:
            return Choice(protocol, "; ".join(passed) or "the best that either offers")
    return Choice("", "; ".join(passed) or "neither side offers a known protocol")
