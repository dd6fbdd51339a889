"""KVTransfer: answers exactly once whatever the store does, and leaves a store alone that fails or hangs."""

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from baton.errors import StoreError
from baton.kv import transfer as module
from baton.kv.store import Buffer, MemoryStore
from baton.kv.transfer import DOUBT_S, FIRST_BACKOFF_S, STALLED_S, KVTransfer
from tests.unit.clock import Clock

BLOCK = 32
KEYS = ["a", "b", "c"]


class BreakableStore(MemoryStore):
    """Fails while `failing`; calls wait at `gate`; counts its calls."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.failing: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0
        self.closed = 0

    def _enter(self) -> None:
        self.calls += 1
        assert self.gate.wait(10)
        if self.failing:
            raise self.failing

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._enter()
        return super().contains(keys)

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        self._enter()
        return super().get(keys, buffers)

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        self._enter()
        return super().put(keys, buffers)

    def close(self) -> None:
        self.closed += 1
        super().close()


class Answers:
    """What `done` was called with, and on which threads."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.threads: list[str] = []
        self._arrived = threading.Condition()

    def __call__(self, value: Any) -> None:
        with self._arrived:
            self.values.append(value)
            self.threads.append(threading.current_thread().name)
            self._arrived.notify_all()

    def wait(self, count: int) -> list[Any]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.values) >= count, 10), self.values
        return self.values


@pytest.fixture
def memory() -> Iterator[list[Buffer]]:
    """Three blocks."""
    raw = ctypes.create_string_buffer(3 * BLOCK)
    yield [Buffer(ctypes.addressof(raw) + i * BLOCK, BLOCK) for i in range(3)]
    del raw


@pytest.fixture
def store() -> BreakableStore:
    return BreakableStore()


@pytest.fixture
def transfer(store: BreakableStore) -> Iterator[KVTransfer]:
    made = KVTransfer(store)
    yield made
    store.gate.set()
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the module goes by."""
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made))
    return made


def lookup(transfer: KVTransfer) -> int:
    answers = Answers()
    transfer.lookup(KEYS, answers)
    return sum(answers.wait(1)[0])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_saved_is_found_and_loaded(transfer: KVTransfer, memory: list[Buffer]) -> None:
    saved, loaded, found = Answers(), Answers(), Answers()
    transfer.save([KEYS[0], KEYS[2]], [memory[0], memory[2]], saved)
    assert saved.wait(1) == [[True, True]]
    transfer.lookup(KEYS, found)
    transfer.lookup([], found)
    transfer.load(KEYS, memory, loaded)
    assert loaded.wait(1) == [[True, False, True]]
    assert found.wait(2) == [[True, False, True], []]
    assert (saved.threads, loaded.threads) == (["kv-pool-save"], ["kv-pool-load"])
    stats = transfer.stats
    assert (stats.blocks_saved, stats.bytes_saved, stats.blocks_refused) == (2, 2 * BLOCK, 0)
    assert (stats.blocks_loaded, stats.bytes_loaded, stats.blocks_missed) == (2, 2 * BLOCK, 1)
    assert (stats.failures, stats.skipped) == (0, 0)


def test_a_store_that_fails_is_left_alone_then_probed_by_one_call(
    transfer: KVTransfer, store: BreakableStore, memory: list[Buffer], clock: Clock
) -> None:
    store.put(KEYS, memory)
    store.calls = 0
    assert transfer.available
    store.failing = StoreError("down")
    assert lookup(transfer) == 0
    assert not transfer.available
    assert [lookup(transfer) for _ in range(5)] == [0] * 5
    assert (store.calls, transfer.stats.failures, transfer.stats.skipped) == (1, 1, 5)
    clock.now += FIRST_BACKOFF_S
    assert transfer.available
    assert transfer.doubtful
    store.gate.clear()  # the probe hangs: nobody waits behind it
    probe, others = Answers(), Answers()
    transfer.lookup(KEYS, probe)
    until(lambda: store.calls == 2)
    for _ in range(3):
        transfer.lookup(KEYS, others)
    assert others.values == [[False] * 3] * 3
    assert others.threads == [threading.current_thread().name] * 3
    assert probe.values == []
    store.failing = None
    store.gate.set()
    assert probe.wait(1) == [[True] * 3]
    assert lookup(transfer) == 3  # and all is well again
    assert not transfer.doubtful


def test_a_store_that_takes_long_over_a_lookup_is_doubted(transfer: KVTransfer, store: BreakableStore, clock: Clock) -> None:
    store.gate.clear()
    answers = Answers()
    transfer.lookup(KEYS, answers)
    until(lambda: store.calls == 1)
    assert not transfer.doubtful
    clock.now += DOUBT_S + 0.1
    assert transfer.doubtful
    assert transfer.available
    store.gate.set()
    answers.wait(1)
    until(lambda: not transfer.doubtful)


def test_a_lookup_that_works_does_not_make_loads_be_tried_again(
    transfer: KVTransfer, store: BreakableStore, memory: list[Buffer], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master answers, and the node that holds the blocks is dead."""
    store.put(KEYS, memory)
    monkeypatch.setattr(store, "get", lambda keys, buffers: store.contains(keys) and _raise(StoreError("no node")))
    saved, loaded = Answers(), Answers()
    transfer.load(KEYS, memory, loaded)
    assert loaded.wait(1) == [[False] * 3]
    assert lookup(transfer) == 0
    transfer.save(["d"], memory[:1], saved)  # to another node
    assert saved.wait(1) == [[True]]
    assert not transfer.available
    clock.now += FIRST_BACKOFF_S
    assert transfer.available
    assert lookup(transfer) == 3
    transfer.load(KEYS, memory, loaded)
    assert loaded.wait(2)[1] == [False] * 3
    calls = store.calls
    assert lookup(transfer) == 0
    assert store.calls == calls


def _raise(error: Exception) -> list[bool]:
    raise error


def test_the_back_off_doubles_up_to_a_limit(transfer: KVTransfer, store: BreakableStore, clock: Clock) -> None:
    store.failing = StoreError("down")
    for number, wait_s in enumerate((0.5, 1.0, 2.0, 4.0, 5.0, 5.0), 1):
        assert lookup(transfer) == 0
        assert transfer.stats.failures == number
        clock.now += wait_s - 0.01
        assert not transfer.available
        clock.now += 0.02
        until(lambda: transfer.available)  # when the thread is through with the call


def test_nobody_queues_behind_a_call_that_hangs(transfer: KVTransfer, store: BreakableStore, memory: list[Buffer], clock: Clock) -> None:
    store.gate.clear()
    hanging, behind, saved = Answers(), Answers(), Answers()
    transfer.load(KEYS, memory, hanging)
    until(lambda: store.calls == 1)
    assert transfer.available
    clock.now += STALLED_S + 0.1
    assert not transfer.available
    transfer.lookup(KEYS, behind)
    transfer.load(KEYS, memory, behind)
    assert behind.values == [[False] * 3] * 2
    transfer.save(KEYS, memory, saved)  # the other thread is not concerned
    assert hanging.values == saved.values == []
    store.gate.set()
    assert saved.wait(1) == [[True] * 3]
    assert len(hanging.wait(1)) == 1
    assert transfer.stats.failures == 0


def test_an_unknown_failure_is_a_miss_and_is_told(transfer: KVTransfer, store: BreakableStore, caplog: pytest.LogCaptureFixture) -> None:
    store.failing = ValueError("surprise")
    with caplog.at_level(logging.WARNING):
        assert lookup(transfer) == 0
    assert "surprise" in caplog.text


def test_how_long_a_load_will_take_is_learned_from_loads(
    transfer: KVTransfer, store: BreakableStore, memory: list[Buffer], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEYS, memory)
    answers = Answers()
    transfer.load(["missing"], memory[:1], answers)
    answers.wait(1)
    assert transfer.seconds(BLOCK) == 0.0  # a miss tells nothing
    get = store.get

    def slow(*call: Any) -> list[bool]:
        clock.now += 0.3
        return get(*call)

    monkeypatch.setattr(store, "get", slow)
    transfer.load(KEYS, memory, answers)
    answers.wait(2)
    assert transfer.stats.seconds_loading == pytest.approx(0.3)
    assert transfer.seconds(BLOCK) == pytest.approx(0.1, rel=0.2)  # it ages
    assert transfer.seconds(30 * BLOCK) == pytest.approx(3.0, rel=0.2)


def test_a_listener_that_fails_stops_nobody(transfer: KVTransfer, caplog: pytest.LogCaptureFixture) -> None:
    def listener(_: int) -> None:
        raise RuntimeError("my own fault")

    transfer.lookup(KEYS, listener)
    assert lookup(transfer) == 0
    assert "my own fault" in caplog.text
    assert transfer.stats.failures == 0


def test_closing_answers_every_call_once(store: BreakableStore, memory: list[Buffer]) -> None:
    transfer, answers = KVTransfer(store), Answers()
    store.gate.clear()
    transfer.load(KEYS, memory, answers)
    until(lambda: store.calls == 1)
    for _ in range(10):
        transfer.lookup(KEYS, answers)
        transfer.save(KEYS, memory, answers)
    closing = threading.Thread(target=transfer.close)
    closing.start()
    until(lambda: transfer._closed)  # pyright: ignore[reportPrivateUsage]
    transfer.lookup(KEYS, answers)  # too late
    store.gate.set()
    closing.join(10)
    transfer.close()
    assert not closing.is_alive()
    assert len(answers.wait(22)) == 22
    assert store.closed == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


def test_every_call_is_answered_while_another_thread_closes(store: BreakableStore) -> None:
    for _ in range(20):
        transfer, answers, count = KVTransfer(store), Answers(), 200
        closing = threading.Thread(target=transfer.close)
        for i in range(count):
            if i == count // 2:
                closing.start()
            transfer.lookup(KEYS, answers)
        closing.join(10)
        assert len(answers.wait(count)) == count


def test_who_has_nothing_to_save_needs_no_time_for_it(
    transfer: KVTransfer, store: BreakableStore, memory: list[Buffer], caplog: pytest.LogCaptureFixture
) -> None:
    transfer.flush(0.0)
    assert not caplog.text
    store.gate.clear()
    transfer.save(KEYS, memory, Answers())
    transfer.flush(0.0)
    assert "what is still to be saved is lost" in caplog.text


def test_a_full_queue_is_a_miss(transfer: KVTransfer, store: BreakableStore) -> None:
    store.gate.clear()
    answers = Answers()
    for _ in range(module.MAX_QUEUED + 10):
        transfer.lookup(KEYS, answers)
    assert transfer.stats.skipped >= 8
    assert len(answers.values) == transfer.stats.skipped
    store.gate.set()
    assert len(answers.wait(module.MAX_QUEUED + 10)) == module.MAX_QUEUED + 10


def test_the_end_of_a_lane_that_is_full_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 1)
    lane, gate = module._Lane("full"), threading.Event()
    assert lane.submit(lambda: assert_true(gate.wait(10)))
    while lane.busy_s == 0:
        time.sleep(0.001)
    assert lane.submit(int)
    joined: list[float] = []
    monkeypatch.setattr(lane._thread, "join", joined.append)
    assert not lane.end(0.05)
    assert joined == []
    monkeypatch.undo()
    gate.set()
    assert lane.end(10)


def assert_true(value: bool) -> None:
    assert value
