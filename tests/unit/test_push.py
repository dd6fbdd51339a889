"""Direct push without Mooncake: what is merged, which protocol is chosen, what a sender does when its receiver changes behind its back."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from baton.kv import in_order, mooncake_push
from baton.kv.direct import DirectSender
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Copy, Offer, PushResult, PushStatus, choose, merge
from baton.kv.store import Buffer
from baton.types import PushShard
from tests.unit.clock import Clock

REGION = Buffer(4096, 1 << 20)
LIMIT_S = 5.0


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

    def __init__(self, host: str, protocol: str, regions: list[Buffer], devices: str, *, announced: bool = True) -> None:
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
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What senders go by."""
    made = Clock()
    monkeypatch.setattr(mooncake_push, "time", SimpleNamespace(monotonic=made, sleep=time.sleep))
    return made


@pytest.fixture
def sender(described: dict[str, dict[str, Any]], clock: Clock) -> Iterator[MooncakeSender]:
    made = MooncakeSender(REGION, host="h", protocol="tcp", limit_s=LIMIT_S)
    yield made
    made.close()


class Push:
    def __init__(self, sender: MooncakeSender, session: str, copies: Sequence[Copy] = (Copy(4096, 0, 10),)) -> None:
        self.results: queue.Queue[PushResult] = queue.Queue()
        self.settled = threading.Event()
        sender.push(session, lambda: copies, self.results.put, self.settled.set)

    def result(self) -> PushResult:
        return self.results.get(timeout=30)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


def test_sources_stay_fenced_until_the_engine_has_ended(sender, described, clock) -> None:
    """Which waits for the pushes to others that go through the same engine; new ones use the next."""
    described["stuck:1"] = described["slow:1"] = described["d:1"] = {"protocol": "tcp"}
    FakeEngine.ending = {"stuck:1": 0, "slow:1": 0}
    stuck = Push(sender, "stuck:1")
    clock.now += LIMIT_S / 2
    slow = Push(sender, "slow:1")
    until(lambda: sorted(FakeEngine.made[0].writes) == ["slow:1", "stuck:1"])
    clock.now += LIMIT_S / 2
    result = stuck.result()
    assert (result.status, result.reason) == (PushStatus.UNKNOWN, "not ended after 5 s")
    assert not stuck.settled.is_set()
    assert Push(sender, "d:1").result().status is PushStatus.GOOD
    assert FakeEngine.made[1].writes == ["d:1"]
    FakeEngine.ending["slow:1"] = 1
    assert slow.result().status is PushStatus.GOOD
    assert stuck.settled.wait(30)
    assert [engine.closed for engine in FakeEngine.made] == [True, False]


def test_a_push_that_waited_too_long_is_not_begun(sender, described, clock) -> None:
    described["stuck:1"] = {"protocol": "tcp"}
    FakeEngine.ending["stuck:1"] = 0
    first, second = Push(sender, "stuck:1"), Push(sender, "stuck:1")
    until(lambda: FakeEngine.made[0].writes)
    clock.now += LIMIT_S
    assert first.result().status is PushStatus.UNKNOWN
    result = second.result()
    assert (result.status, result.reason.startswith("no time left"), result.seconds) == (PushStatus.FAILED, True, LIMIT_S)
    assert sum(len(engine.writes) for engine in FakeEngine.made) == 1


def test_which_way_it_goes_is_told_once_and_by_a_push_alone(
    sender: MooncakeSender, described: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    described["d:1"] = {"protocol": "tcp"}
    direct = DirectSender({"tcp": sender})
    there = PushShard("m", (("tcp", "d:1"),), ())
    with caplog.at_level("INFO"):
        assert direct.path(there).protocol == "tcp"
        assert not caplog.records
        for _ in range(2):
            settled = threading.Event()
            direct.push(there, lambda: [Copy(4096, 0, 10)], lambda result: None, settled.set)
            assert settled.wait(30)
    assert [record.message for record in caplog.records] == ["push to m: tcp (the best that either offers)"]


class FakeStream(FakeEngine):
    """Over NVLink: writes end in order, `copied` of them so far; of the sources `refused` are not taken, `failing` are, and fail. The end
    of the engine ends none of them."""

    copied: float
    refused: frozenset[int]
    failing: frozenset[int]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.numbers: dict[int, tuple[int, ...]] = {}  # valid ones, with their sources
        self.handed_over: list[int] = []  # sources

    def submit(self, session: str, source: int, target: int, nbytes: int) -> int:
        return self.submit_batch(session, [source], [target], [nbytes])

    def submit_batch(self, session: str, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]) -> int:
        if self.refused & set(sources):
            return 0
        self.writes.append(session)
        self.handed_over += [source for source in sources if source not in self.failing]
        self.numbers[len(self.writes)] = tuple(sources)
        return len(self.writes)

    def poll(self, number: int) -> int:
        failed = self.numbers[number][0] in self.failing
        if len(self.handed_over) > self.copied and not failed:
            return 0
        del self.numbers[number]
        return -1 if failed else 1

    def ended_well(self, batches: Sequence[int]) -> bool:
        good = True
        for number in batches:
            good = good and not self.failing & set(self.numbers[number])
            assert len(self.numbers.pop(number)) > 1
            assert len(self.handed_over) <= self.copied, "it would spin"
        return good


@pytest.fixture
def stream(described: dict[str, dict[str, Any]], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[MooncakeSender]:
    FakeStream.copied, FakeStream.refused, FakeStream.failing = math.inf, frozenset(), frozenset()
    monkeypatch.setattr(mooncake_push, "Engine", FakeStream)
    described["d:1"] = {"protocol": "nvlink_intra"}
    made = MooncakeSender(REGION, host="h", protocol="nvlink_intra", limit_s=LIMIT_S)
    yield made
    made.close()


def scattered(count: int) -> list[Copy]:
    return [Copy(i * 20, i * 30, 10) for i in range(count)]


def engine() -> FakeStream:
    (made,) = FakeEngine.made
    assert isinstance(made, FakeStream)
    return made


def late(stream: MooncakeSender, clock: Clock, count: int) -> tuple[Push, PushResult]:
    """A push whose time has run out when some of it was handed over."""
    before, push = len(engine().writes), Push(stream, "d:1", scattered(count))
    until(lambda: len(engine().writes) > before)
    clock.now += LIMIT_S
    return push, push.result()


@pytest.mark.parametrize("count", [0, 1, 2, 3, in_order.BATCH, in_order.BATCH + 1, in_order.BATCH + 2, 5 * in_order.BATCH])
def test_over_nvlink_every_copy_is_handed_over_once(count: int, stream: MooncakeSender) -> None:
    push = Push(stream, "d:1", scattered(count))
    assert push.result() == PushResult(PushStatus.GOOD, 10 * count, ANY)
    assert push.settled.wait(30)
    assert engine().handed_over == [copy.source for copy in scattered(count)]
    assert not engine().numbers


def test_over_nvlink_a_push_has_settled_when_its_copies_have_ended(stream: MooncakeSender, clock: Clock) -> None:
    """Not when its engine has: whose end would not end them."""
    FakeStream.copied = 10
    first, result = late(stream, clock, 40)
    assert result == PushResult(PushStatus.UNKNOWN, 400, LIMIT_S, "not ended after 5 s")  # and nothing lands when it has settled
    behind, result = late(stream, clock, 3)
    assert result == PushResult(PushStatus.UNKNOWN, 30, LIMIT_S, "not ended after 5 s")  # in time, and not before what it waits for
    assert not first.settled.is_set()
    assert not behind.settled.is_set()
    assert not engine().closed
    FakeStream.copied = math.inf
    assert first.settled.wait(30)
    assert behind.settled.wait(30)
    assert not engine().numbers
    assert Push(stream, "d:1").result().status is PushStatus.GOOD
    stream.close()
    assert engine().closed


@pytest.mark.parametrize("which", [16, 39])  # the first of a batch; the last of all
@pytest.mark.parametrize(("kind", "reason"), [("refused", "Mooncake did not take a write"), ("failing", "the device refused a copy")])
def test_over_nvlink_what_was_taken_beside_a_failure_is_waited_for(
    which: int, kind: str, reason: str, stream: MooncakeSender, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeStream.copied = 0
    monkeypatch.setattr(FakeStream, kind, frozenset({which * 20}))
    push = Push(stream, "d:1", scattered(40))
    until(lambda: engine().writes)
    time.sleep(0.05)
    assert push.results.empty()
    FakeStream.copied = math.inf
    assert push.result() == PushResult(PushStatus.FAILED, 400, ANY, reason)
    assert push.settled.wait(30)
    FakeStream.copied = 0
    push, result = late(stream, clock, 40)
    assert result.status is PushStatus.UNKNOWN
    assert not push.settled.is_set()
    FakeStream.copied = math.inf
    assert push.settled.wait(30)
    assert not engine().numbers


def test_over_nvlink_a_device_that_hangs_is_told_of_and_keeps_the_sources(
    stream: MooncakeSender, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    FakeStream.copied = 0
    push, result = late(stream, clock, 40)
    assert result.status is PushStatus.UNKNOWN

    def is_told() -> bool:
        clock.now += 1
        return "its blocks wait on" in caplog.text.lower()

    until(is_told)
    closing = threading.Thread(target=stream.close)
    closing.start()
    until(lambda: stream._closed)
    closing.join(0.05)
    assert closing.is_alive()
    clock.now += mooncake_push.CLOSE_S + 1
    closing.join(30)
    assert not push.settled.is_set()
    assert not engine().closed
    assert [record.levelname for record in caplog.records] == ["CRITICAL", "CRITICAL"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("push-")]


def test_a_call_that_hangs_does_not_hold_up_the_end(
    stream: MooncakeSender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, over = threading.Event(), threading.Event()

    def hang(*_: object) -> int:
        begun.set()
        over.wait(60)
        return 0

    monkeypatch.setattr(mooncake_push, "CLOSE_S", 0.2)
    monkeypatch.setattr(FakeStream, "submit", hang)
    push = Push(stream, "d:1")
    assert begun.wait(30)
    stream.close()
    assert "a call of Mooncake's hangs" in caplog.text
    assert not push.settled.is_set()
    assert not engine().closed
    over.set()
    assert push.settled.wait(30)
    until(lambda: engine().closed)


def test_copies_are_spelled_out_on_the_senders_thread(sender: MooncakeSender, described: dict[str, dict[str, Any]]) -> None:
    described["d:1"] = {"protocol": "tcp"}
    asked = queue.Queue[str]()
    statuses = queue.Queue[PushResult]()

    def copies() -> list[Copy]:
        asked.put(threading.current_thread().name)
        if asked.qsize() > 1:
            raise ValueError("no such block")
        return [Copy(4096, 0, 10)]

    for status in (PushStatus.GOOD, PushStatus.FAILED):
        settled = threading.Event()
        sender.push("d:1", copies, statuses.put, settled.set)
        assert statuses.get(timeout=30).status is status
        assert settled.wait(30)
    assert asked.get() == asked.get() == "push-d:1"


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
