"""Direct push between real processes over Mooncake's Transfer Engine (TCP): what lands, and what never does after a fence."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from baton.cluster.machine import this_machine
from baton.config import PushConfig
from baton.errors import ConfigError, TransferError
from baton.kv.connect import connect_push
from baton.kv.direct import DirectSender
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Copy, PushResult, PushStatus
from baton.kv.transfer_engine import Engine, describe
from baton.types import PushShard, Role
from tests.e2e.push_peer import Memory

pytestmark = pytest.mark.alone
MIB = 1 << 20
BIG = 128 * MIB  # long enough on loopback to be stopped half-way
NEW, OLD, STRANGER = 7, 1, 99  # bytes: what is pushed, what was there, what the next owner writes
LANDS_LATE_S = 3.0


def renew(receiver: MooncakeReceiver) -> str:
    """A new session; no write under an older one lands any more."""
    receiver.advance()
    receiver.fence()
    return receiver.session


class Peer:
    """Another process. `memory` is its memory, `address` where it sees it."""

    def __init__(self, role: str, nbytes: int, limit_s: float) -> None:
        fd = os.memfd_create("push")
        os.ftruncate(fd, nbytes)
        self.memory = Memory(nbytes, NEW if role == "sender" else OLD, fd)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.push_peer", role, str(fd), str(nbytes), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
        )
        os.close(fd)
        self.address, self.session = self._answer()

    def push(self, session: str, target: int, nbytes: int) -> None:
        self._tell(json.dumps([session, self.address, target, nbytes]))

    def result(self) -> list[str]:
        """Status, reason, "settled"."""
        self._tell("result")
        return self._answer()

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self) -> list[Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has died"
        return json.loads(line)


@contextlib.contextmanager
def peer(role: str, nbytes: int, limit_s: float = 5.0) -> Iterator[Peer]:
    running = Peer(role, nbytes, limit_s)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


class Pushes:
    """What a sender in this process tells."""

    def __init__(self, sender: MooncakeSender) -> None:
        self._sender = sender
        self.results: queue.Queue[PushResult] = queue.Queue()
        self.settled = threading.Event()

    def start(self, session: str, copies: Sequence[Copy]) -> None:
        self.settled.clear()
        self._sender.push(session, lambda: copies, self.results.put, self.settled.set)

    def run(self, session: str, copies: Sequence[Copy]) -> PushResult:
        self.start(session, copies)
        result = self.results.get(timeout=10)
        assert self.settled.wait(10)
        return result


@pytest.fixture
def receiver() -> Iterator[Callable[[Memory], MooncakeReceiver]]:
    made: list[MooncakeReceiver] = []

    def make(memory: Memory) -> MooncakeReceiver:
        made.append(MooncakeReceiver(memory.region, host="127.0.0.1", protocol="tcp"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def sender() -> Iterator[Callable[..., MooncakeSender]]:
    made: list[MooncakeSender] = []

    def make(memory: Memory, limit_s: float = 5.0) -> MooncakeSender:
        made.append(MooncakeSender(memory.region, host="127.0.0.1", protocol="tcp", limit_s=limit_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def stop_half_way(running: Peer, memory: Memory) -> None:
    """Stops a sender or a receiver when a part of the push has landed in `memory`."""
    wait(lambda: memory.map[8 * MIB] == NEW)
    running.stop()
    time.sleep(0.3)  # what was given to the kernel arrives, if the receiver runs
    assert memory.map[BIG - 1] == OLD


def test_a_renewed_receiver_is_written_to_no_more(receiver) -> None:
    memory = Memory(BIG, OLD)
    mine = receiver(memory)
    with peer("sender", BIG) as stopped:
        stopped.push(mine.session, memory.region.address, BIG)
        stop_half_way(stopped, memory)
        old, start = mine.session, time.monotonic()
        new = renew(mine)
        assert new != old
        assert time.monotonic() - start < 0.5
        memory.fill(STRANGER)  # somebody else's now
        stopped.go_on()
        status, _, settled = stopped.result()
        assert (status, settled) == ("failed", "settled")
        stopped.push(old, memory.region.address, BIG)  # it has not heard yet
        assert stopped.result()[0] == "failed"
        time.sleep(LANDS_LATE_S)
        assert memory.bytes_found() == {STRANGER}
        stopped.push(new, memory.region.address, BIG)  # works at once
        assert stopped.result() == ["good", "", "settled"]
        assert memory.bytes_found() == {NEW}


def test_a_fence_in_full_flow(receiver) -> None:
    memory = Memory(BIG, OLD)
    mine = receiver(memory)
    with peer("sender", BIG) as other:
        for _ in range(5):
            memory.fill(OLD)
            other.push(mine.session, memory.region.address, BIG)
            wait(lambda: memory.map[8 * MIB] == NEW)
            renew(mine)
            memory.fill(STRANGER)
            assert other.result()[0] == "failed"
            time.sleep(0.2)
            assert memory.bytes_found() == {STRANGER}


def test_without_the_fence_it_would_be(receiver) -> None:
    """That the test above can fail: with a new generation, but without the end of the old one."""
    memory = Memory(BIG, OLD)
    mine = receiver(memory)
    with peer("sender", BIG) as stopped:
        stopped.push(mine.session, memory.region.address, BIG)
        stop_half_way(stopped, memory)
        mine.advance()
        memory.fill(STRANGER)
        stopped.go_on()
        assert stopped.result()[0] == "good"
        assert NEW in memory.bytes_found()


def test_a_dead_sender_may_have_bytes_on_their_way() -> None:
    """Why nothing that a sender says, not even its death, frees the targets: the kernels hold bytes that the receiver has not read yet."""
    with peer("receiver", BIG) as stopped, peer("sender", BIG) as killed:
        killed.push(stopped.session, stopped.address, BIG)
        stop_half_way(stopped, stopped.memory)
        killed.process.kill()
        killed.process.wait()
        stopped.memory.fill(STRANGER)
        stopped.go_on()
        wait(lambda: NEW in stopped.memory.bytes_found(), 3)


def test_a_stopped_receiver_gets_no_overwritten_bytes(sender) -> None:
    memory = Memory(BIG, NEW)
    with peer("receiver", BIG) as stopped:
        pushes = Pushes(sender(memory, limit_s=1.0))
        whole = [Copy(memory.region.address, stopped.address, BIG)]
        pushes.start(stopped.session, whole)
        stop_half_way(stopped, stopped.memory)
        assert not pushes.settled.is_set()
        result = pushes.results.get(timeout=5)
        assert result.status is PushStatus.UNKNOWN
        assert 0.9 < result.seconds < 1.5
        assert pushes.settled.wait(1.0)  # its engine was ended
        memory.fill(STRANGER)
        stopped.go_on()
        time.sleep(LANDS_LATE_S)
        assert stopped.memory.bytes_found() == {NEW, OLD}
        assert pushes.run(stopped.session, whole).status is PushStatus.GOOD
        assert stopped.memory.bytes_found() == {STRANGER}


def test_before_a_push_has_settled_it_would() -> None:
    """That the test above can fail: Mooncake's write alone, its source overwritten while it is under way."""
    memory = Memory(BIG, NEW)
    with peer("receiver", BIG) as stopped:
        engine = Engine("127.0.0.1", "tcp", [memory.region])
        number = engine.submit(stopped.session, memory.region.address, stopped.address, BIG)
        stop_half_way(stopped, stopped.memory)
        memory.fill(STRANGER)
        stopped.go_on()
        wait(lambda: engine.poll(number) == 1)
        assert STRANGER in stopped.memory.bytes_found()
        engine.close()


def test_a_stopped_receiver_keeps_no_other_push_waiting(sender) -> None:
    memory = Memory(BIG, NEW)
    with peer("receiver", BIG) as stopped, peer("receiver", MIB) as healthy:
        mine = sender(memory, limit_s=1.0)
        sick, good = Pushes(mine), Pushes(mine)
        block = [Copy(memory.region.address, healthy.address, MIB)]
        assert good.run(healthy.session, block).status is PushStatus.GOOD
        sick.start(stopped.session, [Copy(memory.region.address, stopped.address, BIG)])
        stop_half_way(stopped, stopped.memory)
        end = time.monotonic() + 1.2
        while time.monotonic() < end:  # before, while and after the sick one's generation ends
            result = good.run(healthy.session, block)
            assert (result.status, result.seconds < 0.5) == (PushStatus.GOOD, True)
            time.sleep(0.01)
        assert sick.results.get(timeout=1).status is PushStatus.UNKNOWN
        assert sick.settled.wait(1.0)
        again = sick.run(stopped.session, block)  # still stopped: nothing is begun
        assert again.status is PushStatus.FAILED
        assert "no Transfer Engine answers" in again.reason


def test_a_receiver_that_stops_before_the_first_contact() -> None:
    """Mooncake would wait for 60 s."""
    memory = Memory(MIB, NEW)
    with peer("receiver", MIB) as stopped:
        engine = Engine("127.0.0.1", "tcp", [memory.region])
        stopped.stop()
        start = time.monotonic()
        with pytest.raises(TransferError, match="does not answer"):
            engine.open(stopped.session, 0.5)
        assert time.monotonic() - start < 1.0
        stopped.go_on()
        engine.open(stopped.session, 0.5)
        engine.close()


def test_a_killed_receiver_costs_one_failure(sender) -> None:
    memory = Memory(BIG, NEW)
    with peer("receiver", BIG) as killed:
        pushes = Pushes(sender(memory))
        copies = [Copy(memory.region.address, killed.address, BIG)]
        pushes.start(killed.session, copies)
        wait(lambda: killed.memory.map[8 * MIB] == NEW)
        killed.process.kill()
        assert pushes.results.get(timeout=1.5).status is PushStatus.FAILED
        assert pushes.settled.wait(1.0)
        result = pushes.run(killed.session, copies)
        assert (result.status, result.seconds < 0.5) == (PushStatus.FAILED, True)
        assert "no Transfer Engine answers" in result.reason


def test_scattered_blocks_arrive_where_they_should(receiver, sender) -> None:
    size, count = 128 << 10, 300  # more than a window
    source, target = Memory(size * count), Memory(size * count)
    for block in range(count):
        source.fill(block % 251, block * size, (block + 1) * size)
    places = [(block * 7) % count for block in range(count)]
    copies = [Copy(source.region.address + b * size, target.region.address + places[b] * size, size) for b in range(count)]
    assert Pushes(sender(source)).run(receiver(target).session, copies).status is PushStatus.GOOD
    assert all(target.map[places[b] * size] == target.map[(places[b] + 1) * size - 1] == b % 251 for b in range(count))


def test_outside_of_the_registered_memory_nothing_is_written(receiver, sender) -> None:
    memory = Memory(4 * MIB, OLD)
    mine = receiver(memory)
    region = memory.region
    pushes = Pushes(sender(Memory(4 * MIB, NEW)))
    result = pushes.run(mine.session, [Copy(region.address, region.address + 3 * MIB, 2 * MIB)])
    assert result.status is PushStatus.FAILED
    assert memory.bytes_found() == {OLD}


def test_one_process_sends_and_receives_and_ends_clean(receiver, sender) -> None:
    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    source, target = Memory(MIB, NEW), Memory(MIB, OLD)
    mine, own = receiver(target), sender(source)
    pushes, sessions = Pushes(own), []
    for _ in range(5):
        sessions.append(mine.session)
        assert pushes.run(mine.session, [Copy(source.region.address, target.region.address, MIB)]).status is PushStatus.GOOD
        renew(mine)
    sessions.append(mine.session)
    assert len(set(sessions)) == 6
    own.close()
    mine.close()
    wait(lambda: (threading.active_count(), len(os.listdir("/proc/self/task"))) == threads)
    for session in sessions:  # nobody is there, and nobody else can be
        with pytest.raises(TransferError, match="refused"):
            describe(session, timeout_s=1)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", int(session.rpartition(":")[2])))


def test_a_closed_sender_tells_everything(sender) -> None:
    memory = Memory(BIG, NEW)
    with peer("receiver", BIG) as stopped:
        mine = sender(memory)
        pushes = Pushes(mine)
        pushes.start(stopped.session, [Copy(memory.region.address, stopped.address, BIG)])
        stop_half_way(stopped, stopped.memory)
        start = time.monotonic()
        mine.close()
        assert time.monotonic() - start < 0.5
        assert pushes.results.get_nowait().status is PushStatus.UNKNOWN
        assert pushes.settled.is_set()
        assert pushes.run(stopped.session, [Copy(memory.region.address, stopped.address, MIB)]).status is PushStatus.FAILED


def test_the_end_of_an_engine_stops_nobody_else() -> None:
    """Mooncake's destructor holds the GIL; it must not wait for its threads, nor for a peer that hangs in a handshake."""
    engine = Engine("127.0.0.1", "tcp", [Memory(MIB).region])
    host, _, port = engine.session.rpartition(":")
    with socket.create_connection((host, int(port))):
        time.sleep(0.05)
        start = time.monotonic()
        engine.close()
        assert time.monotonic() - start < 0.2


@pytest.mark.parametrize("protocol", ["rdma", "nvlink_intra", "bogus"])
def test_a_protocol_that_is_not_to_be_had_is_an_error(protocol: str) -> None:
    with pytest.raises(ConfigError, match=protocol):
        MooncakeReceiver(Memory(MIB).region, host="127.0.0.1", protocol=protocol)
    Engine("127.0.0.1", "tcp", [Memory(MIB).region]).close()  # and it leaves nothing set


def test_memory_is_registered_once() -> None:
    region = Memory(MIB).region
    with pytest.raises(TransferError, match="registered"):
        Engine("127.0.0.1", "tcp", [region, region])


def test_where_a_path_fails_the_next_best_is_taken() -> None:
    """The better one's peer is not there (two TCP senders: other protocols need devices)."""
    source, target = Memory(MIB, NEW), Memory(MIB, OLD)
    receiver = MooncakeReceiver(target.region, host="127.0.0.1", protocol="tcp")
    senders = {name: MooncakeSender(source.region, host="127.0.0.1", protocol="tcp", limit_s=5.0) for name in ("rdma", "tcp")}
    direct = DirectSender(senders)
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # nobody listens
        sessions = (("rdma", f"127.0.0.1:{dead.getsockname()[1]}"), ("tcp", receiver.session))
        there = PushShard(this_machine(), sessions, (target.region.address,))
        statuses: list[PushStatus] = []
        copies = [Copy(source.region.address, target.region.address, MIB)]
        for _ in range(3):
            settled = threading.Event()
            direct.push(there, lambda: copies, lambda result: statuses.append(result.status), settled.set)
            assert settled.wait(5)
    assert statuses == [PushStatus.FAILED, PushStatus.GOOD, PushStatus.GOOD]
    assert target.bytes_found() == {NEW}
    assert direct.path(there).protocol == "tcp"
    assert direct.path(there).reason.startswith("rdma: ")
    assert (direct.values["push_failures"], direct.values["push_fallbacks"]) == (1, 2)
    only = dataclasses.replace(there, sessions=sessions[:1])
    assert direct.path(only).protocol == "rdma"  # nothing else is there
    direct.close()
    receiver.close()


def test_without_devices_tcp_is_what_is_found() -> None:
    region = Memory(MIB).region
    for config, sends in ((PushConfig(host="127.0.0.1"), True), (PushConfig(protocols=()), False)):
        sender, _ = connect_push(config, Role.PREFILL, region, cuda=False)
        _, receiver = connect_push(config, Role.DECODE, region, cuda=False)
        assert (sender is not None, receiver is not None) == (sends, sends)
        if sender is not None and receiver is not None:
            assert [protocol for protocol, _ in receiver.sessions] == ["tcp"]
            sender.close()
            receiver.close()
    with pytest.raises(ConfigError, match="nvlink_intra"):
        connect_push(PushConfig(host="127.0.0.1", protocols=("nvlink_intra",)), Role.DECODE, region, cuda=False)
