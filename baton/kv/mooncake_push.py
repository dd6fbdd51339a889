"""MooncakeReceiver and MooncakeSender: direct push (`kv.push`) over Mooncake's Transfer Engine.

Mooncake cannot call a write off. What ends one for certain is the end of an engine, on either side, so both sides live in generations of
one `Engine` each. A receiver that must have its memory back starts a new generation and ends the older ones. A sender whose write timed out
lets new pushes use a new generation, and ends the old one when the pushes of other peers that are still under way there have ended too.
Over NVLink the end of an engine ends nothing (`kv.in_order`): there the copies themselves are waited for.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.errors import BatonError, TransferError
from baton.kv.in_order import InOrder
from baton.kv.push import ONE_MACHINE, Copy, PushResult, PushStatus, merge
from baton.kv.store import Buffer
from baton.kv.transfer_engine import Engine, check_held, describe

logger = logging.getLogger(__name__)

TCP_PIECE = 1 << 20  # a connection carries one write at a time: whole runs of blocks would leave most connections idle
WINDOW = 256  # writes handed to Mooncake at a time; it queues 1024 per peer
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 50e-6, 1e-3
NVLINK_BYTES_S = 900e9  # no link is faster
SPIN_S = 5e-3  # a prompt of 8,192 tokens takes 3 ms over NVLink, a sleep in a virtual machine 0.1
ANSWER_S = 1.0  # a receiver that does not describe itself within this is away
IDLE_S = 60.0  # a peer that gets nothing for so long loses its thread
LATE_PAUSE_S = 5e-3  # between questions after a push over NVLink whose time is up
HANGS_S = 10.0  # for longer, somebody should know
CLOSE_S = 5.0  # that the end of a sender waits for such pushes


class MooncakeReceiver:
    """Thread-safe."""

    def __init__(self, region: Buffer, *, host: str, protocol: str, devices: str = "") -> None:
        """`host` is where senders reach this process. Raises ConfigError if the protocol is not to be had, TransferError."""
        self._make: Callable[[], Engine] = lambda: Engine(host, protocol, [region], devices)
        self.protocol = protocol
        self.revocable = protocol != ONE_MACHINE
        """Whether `fence` keeps its promise by itself. Over NVLink the sender has mapped our memory and its device writes there; nothing
        on our side ends that: the sender has to say that the push is settled, or to be dead."""
        self._lock = threading.Lock()
        self._generations = [self._make()]

    @property
    def session(self) -> str:
        return self._generations[-1].session

    def advance(self) -> str:
        with self._lock:
            check_held()
            self._generations.append(self._make())
            return self.session

    def fence(self) -> None:
        with self._lock:
            while len(self._generations) > 1:
                self._generations[0].close()
                del self._generations[0]

    def close(self) -> None:
        with self._lock:
            for engine in self._generations:
                engine.close()


@dataclass(slots=True, eq=False)
class _Generation:
    engine: Engine
    users: int = 0  # pushes under way
    retired: bool = False
    peers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # what each session said of itself at first
    checked: set[str] = field(default_factory=set[str])  # sessions that have said it lately
    unsettled: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])


@dataclass(frozen=True, slots=True)
class _Push:
    copies: Callable[[], Iterable[Copy]]
    done: Callable[[PushResult], None]
    settled: Callable[[], None]
    start: float


@dataclass(slots=True, eq=False)
class _Late:
    """Over NVLink: an UNKNOWN push, whose copies may be under way."""

    flight: InOrder
    settled: Callable[[], None]
    generation: _Generation  # is in use until then
    complain_at: float


class MooncakeSender:
    """One thread for each session, so that a receiver that is away keeps nobody else waiting. Thread-safe."""

    def __init__(self, region: Buffer, *, host: str, protocol: str, limit_s: float = 5.0, devices: str = "") -> None:
        """A push is told about within `limit_s` of its call. Raises ConfigError if the protocol is not to be had, TransferError."""
        self._make: Callable[[], Engine] = lambda: Engine(host, protocol, [region], devices, announced=False)
        self.protocol, self._limit_s = protocol, limit_s
        self._lock = threading.Lock()  # of all below, and of making an engine
        self._present: _Generation | None = _Generation(self._make())
        self._lanes: dict[str, queue.SimpleQueue[_Push | None]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._closed, self._closed_at = False, 0.0

    def push(
        self, session: str, copies: Callable[[], Iterable[Copy]], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        push = _Push(copies, done, settled, time.monotonic())
        with self._lock:
            if not self._closed:
                if session not in self._lanes:
                    self._lanes[session] = queue.SimpleQueue()
                    self._threads[session] = threading.Thread(target=self._serve, args=(session,), name=f"push-{session}", daemon=True)
                    self._threads[session].start()
                self._lanes[session].put(push)
                return
        self._tell(push, 0, PushStatus.FAILED, "the sender was closed", begun=False)
        _call(settled)

    def close(self) -> None:
        with self._lock:
            self._closed, self._closed_at = True, time.monotonic()
            threads = list(self._threads.values())
            for lane in self._lanes.values():
                lane.put(None)
            present = self._present
            if present is not None:
                present.users += 1
        for thread in threads:
            thread.join(max(self._closed_at + 2 * CLOSE_S - time.monotonic(), 0))
            if thread.is_alive():
                logger.critical("%s: a call of Mooncake's hangs; its thread is left behind, and sources stay fenced", thread.name)
        if present is not None:
            self._retire(present)
            self._leave(present)

    # -- one session's thread

    def _serve(self, session: str) -> None:
        lane, late = self._lanes[session], list[_Late]()
        while True:
            try:
                push = lane.get(timeout=LATE_PAUSE_S if late else IDLE_S)
            except queue.Empty:
                push = None
            try:
                late = [each for each in late if not self._is_over(each)]
                if push is not None:
                    late += self._run(session, push)
            except Exception:  # nobody may wait for this lane in vain
                logger.exception("push to %s", session)
            if push is not None or late:
                continue
            with self._lock:
                if lane.empty():
                    del self._lanes[session], self._threads[session]
                    return

    def _run(self, session: str, push: _Push) -> list[_Late]:
        """What is left to be waited for."""
        deadline, nbytes = push.start + self._limit_s, 0
        try:
            copies = merge(push.copies(), TCP_PIECE if self.protocol == "tcp" else None)
            nbytes = sum(copy.nbytes for copy in copies)
            generation = self._enter(session, deadline)
        except Exception as error:
            if not isinstance(error, BatonError):
                logger.exception("push to %s", session)
            self._tell(push, nbytes, PushStatus.FAILED, str(error), begun=False)
            _call(push.settled)
            return []
        flight = InOrder(generation.engine, session) if self.protocol == ONE_MACHINE else None
        try:
            if flight is not None:
                status, reason = self._write_in_order(flight, copies, deadline)
            else:
                status, reason = self._write(generation.engine, session, copies, deadline)
        except Exception as error:
            logger.exception("push to %s", session)
            status, reason = PushStatus.UNKNOWN, str(error)  # what was begun goes on
        if status is not PushStatus.GOOD:
            generation.checked.discard(session)
        self._tell(push, nbytes, status, reason)
        if status is PushStatus.UNKNOWN and flight is not None:
            return [_Late(flight, push.settled, generation, time.monotonic() + HANGS_S)]
        if status is PushStatus.UNKNOWN:
            generation.unsettled.append(push.settled)
            self._retire(generation)
        else:
            _call(push.settled)
        self._leave(generation)
        return []

    def _write(self, engine: Engine, session: str, copies: Sequence[Copy], deadline: float) -> tuple[PushStatus, str]:
        """Mooncake's own waiting calls spin, so writes are handed over one by one and asked about between sleeps."""
        todo, under_way = deque(copies), deque[int]()
        start, reason = time.monotonic(), ""
        while todo or under_way:
            while todo and len(under_way) < WINDOW:
                number = engine.submit(session, *todo.popleft())
                if not number:
                    reason = "Mooncake did not take a write"
                    break
                under_way.append(number)
            while under_way and (code := engine.poll(under_way[0])):
                if code not in (1, -1):
                    return PushStatus.UNKNOWN, f"Mooncake does not know how a write ended (code {code})"
                under_way.popleft()
                if code == -1:
                    reason = "the receiver refused a write, or the connection broke"
            if reason:
                todo.clear()  # what is under way still reads its sources: wait for it
            now = time.monotonic()
            if under_way and (now >= deadline or self._closed):
                return PushStatus.UNKNOWN, self._why_unknown()
            if under_way:
                time.sleep(min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, (now - start) / 16)))
        return (PushStatus.FAILED, reason) if reason else (PushStatus.GOOD, "")

    def _write_in_order(self, flight: InOrder, copies: Sequence[Copy], deadline: float) -> tuple[PushStatus, str]:
        """Over NVLink."""
        start = time.monotonic()
        flight.hand_over(copies)
        time.sleep(sum(copy.nbytes for copy in copies) / NVLINK_BYTES_S)
        while not flight.ended():
            now = time.monotonic()
            if now >= deadline or self._closed:
                return PushStatus.UNKNOWN, self._why_unknown()
            time.sleep(0 if now - start < SPIN_S else min(LONGEST_PAUSE_S, (now - start) / 128))
        return (PushStatus.FAILED, flight.reason) if flight.reason else (PushStatus.GOOD, "")

    def _why_unknown(self) -> str:
        return "the sender was closed" if self._closed else f"not ended after {self._limit_s:g} s"

    def _is_over(self, late: _Late) -> bool:
        """Whether its copies have ended; or nobody can say so any more: then its sources stay fenced."""
        now = time.monotonic()
        try:
            ended = late.flight.ended()
        except Exception:
            logger.exception("a push over NVLink cannot be asked about; its sources stay fenced")
            return True
        if ended:
            _call(late.settled)
            self._leave(late.generation)
        elif self._closed and now > self._closed_at + CLOSE_S:
            logger.critical("a push over NVLink has not ended: does the device hang? Its sources stay fenced")
            return True
        elif now > late.complain_at:
            late.complain_at = float("inf")
            logger.critical("a push over NVLink has not ended %g s after its time: does the device hang? Its blocks wait on", HANGS_S)
        return ended

    # -- generations

    def _enter(self, session: str, deadline: float) -> _Generation:
        """The present generation, which will not end before `_leave`, with the receiver's existence and protocol verified. Raises
        BatonError."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransferError("no time left: earlier pushes to this receiver have taken it")
            with self._lock:
                if self._closed:
                    raise TransferError("the sender was closed")
                if self._present is None:
                    self._present = _Generation(self._make())
                generation = self._present
                generation.users += 1
            try:
                if session in generation.checked or self._check(generation, session, min(left, ANSWER_S)):
                    return generation
            except BaseException:
                self._leave(generation)
                raise
            self._retire(generation)
            self._leave(generation)

    def _check(self, generation: _Generation, session: str, timeout_s: float) -> bool:
        """Whether this generation can write there; not where it has met another process behind the same port: Mooncake keeps for good what
        it was told at first. Raises TransferError."""
        found = describe(session, timeout_s)
        if found["protocol"] != self.protocol:
            raise TransferError(f"the receiver at {session} speaks {found['protocol']}, not {self.protocol}")
        if generation.peers.setdefault(session, found) != found:
            return False
        generation.engine.open(session, timeout_s)
        generation.checked.add(session)
        return True

    def _retire(self, generation: _Generation) -> None:
        with self._lock:
            generation.retired = True
            if self._present is generation:
                self._present = None

    def _leave(self, generation: _Generation) -> None:
        with self._lock:
            generation.users -= 1
            if not generation.retired or generation.users:
                return
        try:
            generation.engine.close()
        except Exception:
            logger.exception("the sources of %d pushes stay fenced", len(generation.unsettled))
            return
        for settled in generation.unsettled:
            _call(settled)

    def _tell(self, push: _Push, nbytes: int, status: PushStatus, reason: str, *, begun: bool = True) -> None:
        """Over NVLink it is this side's device that writes: when the push has settled, so have its writes."""
        seconds = time.monotonic() - push.start
        lands_late = begun and status is not PushStatus.GOOD and self.protocol != ONE_MACHINE
        _call(lambda: push.done(PushResult(status, nbytes, seconds, reason, lands_late)))


def _call(what: Callable[[], None]) -> None:
    try:
        what()
    except Exception:
        logger.exception("what a push should tell could not be told")
