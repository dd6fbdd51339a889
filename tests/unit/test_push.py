"""Direct push without Mooncake: what is merged, which protocol is chosen, what a sender does when its receiver changes behind its back."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from baton.kv import mooncake_push
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Copy, Offer, PushResult, PushStatus, choose, merge
from baton.kv.store import Buffer

REGION = Buffer(4096, 1 << 20)


def test_neighbours_on_both_sides_become_one() -> None:
    assert merge([Copy(0, 100, 10), Copy(10, 110, 10), Copy(20, 130, 10)]) == [Copy(0, 100, 20), Copy(20, 130, 10)]
    assert merge([Copy(10, 110, 10), Copy(0, 100, 10)]) == [Copy(0, 100, 20)]
    assert merge([Copy(0, 100, 10), Copy(20, 110, 10)]) == [Copy(0, 100, 10), Copy(20, 110, 10)]
    assert merge([]) == []
    assert merge([Copy(0, 100, 10), Copy(10, 110, 15)], 10) == [Copy(0, 100, 10), Copy(10, 110, 10), Copy(20, 120, 5)]


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(0, 12), st.integers(1, 20))
def test_merging_moves_the_same_bytes(sources: list[int], targets: list[int], count: int, most: int) -> None:
    def moved(copies: list[Copy]) -> dict[int, int]:
        return {copy.target + i: copy.source + i for copy in copies for i in range(copy.nbytes)}

    copies = [Copy(source * 4, 1000 + target * 4, 4) for source, target in zip(sources[:count], targets, strict=False)]
    merged = merge(copies)
    assert moved(merged) == moved(copies)
    cut = merge(copies, most)
    assert moved(cut) == moved(copies)
    assert all(0 < copy.nbytes <= most for copy in cut)
    ends = {(copy.source + copy.nbytes, copy.target + copy.nbytes) for copy in merged}
    assert not ends & {(copy.source, copy.target) for copy in merged}


ALL = ("tcp", "rdma", "nvlink_intra")


@pytest.mark.parametrize(
    ("sender", "receiver", "protocol", "reason"),
    [
        (Offer("a", ALL), Offer("a", ALL), "nvlink_intra", "the best that either offers"),
        (Offer("a", ALL), Offer("b", ALL), "rdma", "nvlink_intra: two machines"),
        (Offer("a", ("tcp",)), Offer("b", ("tcp", "rdma")), "tcp", "rdma: not offered by the sender"),
        (Offer("a", ("tcp", "rdma")), Offer("b", ("tcp",)), "tcp", "rdma: not offered by the receiver"),
        (Offer("a", ("tcp",)), Offer("b", ("tcp",)), "tcp", "the best that either offers"),
        (Offer("a", ("rdma",)), Offer("b", ("tcp",)), "", "rdma: not offered by the receiver; tcp: not offered by the sender"),
        (Offer("a", ()), Offer("b", ("carrier pigeon",)), "", "neither side offers a known protocol"),
    ],
)
def test_the_best_common_protocol(sender: Offer, receiver: Offer, protocol: str, reason: str) -> None:
    choice = choose(sender, receiver)
    assert (choice.protocol, choice.reason) == (protocol, reason)


def test_a_protocol_that_failed_is_passed_over_with_its_reason() -> None:
    choice = choose(Offer("a", ALL), Offer("b", ALL), {"rdma": "no route at 12:04"})
    assert (choice.protocol, choice.reason) == ("tcp", "nvlink_intra: two machines; rdma: no route at 12:04")


class FakeEngine:
    """Writes end when `ending` says how."""

    made: list["FakeEngine"]
    ending: dict[str, int]  # by session; 0: never

    def __init__(self, host: str, protocol: str, regions: list[Buffer], devices: str) -> None:
        self.session, self.closed = f"{host}:{len(self.made)}", False
        self.writes: list[str] = []
        self.made.append(self)

    def open(self, session: str, timeout_s: float) -> None:
        pass

    def submit(self, session: str, source: int, target: int, nbytes: int) -> int:
        self.writes.append(session)
        return len(self.writes)

    def poll(self, number: int) -> int:
        return self.ending.get(self.writes[number - 1], 1)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What receivers say of themselves, by session."""
    FakeEngine.made, FakeEngine.ending = [], {}
    answers: dict[str, dict[str, Any]] = {}

    def describe(session: str, timeout_s: float) -> dict[str, Any]:
        if session not in answers:
            raise TransferError("nobody there")
        return answers[session]

    monkeypatch.setattr(mooncake_push, "Engine", FakeEngine)
    monkeypatch.setattr(mooncake_push, "describe", describe)
    return answers


@pytest.fixture
def sender(described: dict[str, dict[str, Any]]) -> Iterator[MooncakeSender]:
    made = MooncakeSender(REGION, host="h", protocol="tcp", limit_s=0.3)
    yield made
    made.close()


class Push:
    def __init__(self, sender: MooncakeSender, session: str) -> None:
        self.results: queue.Queue[PushResult] = queue.Queue()
        self.settled = threading.Event()
        sender.push(session, [Copy(4096, 0, 10)], self.results.put, self.settled.set)

    def result(self) -> PushResult:
        return self.results.get(timeout=5)


def test_a_receiver_of_another_protocol_is_not_written_to(sender, described) -> None:
    described["d:1"] = {"protocol": "rdma"}
    result = Push(sender, "d:1").result()
    assert (result.status, result.reason) == (PushStatus.FAILED, "the receiver at d:1 speaks rdma, not tcp")
    assert not FakeEngine.made[0].writes


def test_a_new_process_behind_an_old_session_is_noticed(sender, described) -> None:
    """Mooncake would write to where the old one was for ever."""
    described["d:1"] = {"protocol": "tcp", "tcp_data_port": 5}
    assert Push(sender, "d:1").result().status is PushStatus.GOOD
    described["d:1"] = {"protocol": "tcp", "tcp_data_port": 6}
    FakeEngine.ending["d:1"] = -1
    assert Push(sender, "d:1").result().status is PushStatus.FAILED
    FakeEngine.ending["d:1"] = 1
    assert Push(sender, "d:1").result().status is PushStatus.GOOD
    assert [engine.closed for engine in FakeEngine.made] == [True, False]
    assert FakeEngine.made[1].writes == ["d:1"]


def test_sources_stay_fenced_until_the_engine_has_ended(sender, described) -> None:
    """Which waits for the pushes to others that go through the same engine; new ones use the next."""
    described["stuck:1"] = described["slow:1"] = described["d:1"] = {"protocol": "tcp"}
    FakeEngine.ending = {"stuck:1": 0, "slow:1": 0}
    stuck = Push(sender, "stuck:1")
    threading.Event().wait(0.2)
    slow = Push(sender, "slow:1")
    result = stuck.result()
    assert (result.status, result.reason) == (PushStatus.UNKNOWN, "not ended after 0.3 s")
    assert not stuck.settled.is_set()
    assert Push(sender, "d:1").result().status is PushStatus.GOOD
    assert FakeEngine.made[1].writes == ["d:1"]
    FakeEngine.ending["slow:1"] = 1
    assert slow.result().status is PushStatus.GOOD
    assert stuck.settled.wait(5)
    assert [engine.closed for engine in FakeEngine.made] == [True, False]


def test_a_push_that_waited_too_long_is_not_begun(sender, described) -> None:
    described["stuck:1"] = {"protocol": "tcp"}
    FakeEngine.ending["stuck:1"] = 0
    first = Push(sender, "stuck:1")
    while not any(engine.writes for engine in FakeEngine.made):
        time.sleep(0.001)
    sender._limit_s = 0.01  # it is over long before the first one's
    second = Push(sender, "stuck:1")
    assert first.result().status is PushStatus.UNKNOWN
    result = second.result()
    assert (result.status, result.seconds < 5) == (PushStatus.FAILED, True)
    assert sum(len(engine.writes) for engine in FakeEngine.made) == 1


def test_generations_of_a_receiver(described) -> None:
    receiver = MooncakeReceiver(REGION, host="h", protocol="tcp")
    first = receiver.session
    assert receiver.advance() == receiver.session != first
    assert [engine.closed for engine in FakeEngine.made] == [False, False]
    receiver.fence()
    assert [engine.closed for engine in FakeEngine.made] == [True, False]
    receiver.advance()
    receiver.fence()
    assert [engine.closed for engine in FakeEngine.made] == [True, True, False]
    receiver.close()
    assert all(engine.closed for engine in FakeEngine.made)
