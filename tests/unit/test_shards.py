"""A block's way from the ranks of one worker to those of another: the same bytes, whatever the numbers of ranks."""

import ctypes
import socket
import threading
from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from baton.config import WorkerConfig
from baton.errors import EXIT_SOFTWARE, ConfigError, InternalError, exit_code
from baton.kv.layout import KVLayout
from baton.kv.push import Copy, PushResult, PushStatus
from baton.kv.shards import Joint, Share, share_checksum, share_copies
from baton.kv.store import Buffer
from baton.models.config import ModelConfig
from baton.models.registry import read_config
from baton.parallel.link import Link, Listener, connect, pack_step, unpack_step
from baton.runtime.crew import Crew
from baton.runtime.launch import _devices
from baton.runtime.loaded import check_degree

HEADS = 12
DEGREES = [1, 2, 3, 4, 6, 12]
LAYOUT = KVLayout(num_layers=2, num_kv_heads=HEADS, head_dim=2, block_size=3, dtype="float32")


class Worker:
    """Blocks of one worker, in the memory of its ranks."""

    def __init__(self, degree: int, num_blocks: int) -> None:
        self.shares = [Share(rank, degree) for rank in range(degree)]
        self.block_bytes = LAYOUT.share(degree).block_bytes
        self.memory = [ctypes.create_string_buffer(num_blocks * self.block_bytes) for _ in self.shares]

    def address(self, rank: int, block: int) -> int:
        return ctypes.addressof(self.memory[rank]) + block * self.block_bytes

    def heads(self, block: int) -> list[list[bytes]]:
        """By layer and half, each head's content, in the whole block's order."""
        count, size = HEADS // len(self.shares), LAYOUT.head_bytes
        return [
            [
                ctypes.string_at(self.address(rank, block) + (half * count + head) * size, size)
                for rank in range(len(self.shares))
                for head in range(count)
            ]
            for half in range(2 * LAYOUT.num_layers)
        ]

    def checksum(self, block: int) -> int:
        buffers = [Buffer(self.address(rank, block), self.block_bytes) for rank in range(len(self.shares))]
        return sum(share_checksum(LAYOUT, share, buffer) for share, buffer in zip(self.shares, buffers, strict=True)) % 2**32


def push(sender: Worker, receiver: Worker, blocks: list[tuple[int, int]]) -> list[list[Copy]]:
    pushes = [
        share_copies(LAYOUT, source, target, [(sender.address(source.rank, a), receiver.address(target.rank, b)) for a, b in blocks])
        for source in sender.shares
        for target in receiver.shares
    ]
    for copy in (copy for copies in pushes for copy in copies):
        ctypes.memmove(copy.target, copy.source, copy.nbytes)
    return [copies for copies in pushes if copies]


@pytest.mark.parametrize("there", DEGREES)
@pytest.mark.parametrize("here", DEGREES)
def test_every_byte_arrives_in_its_place(there: int, here: int) -> None:
    random = Random(there * 100 + here)
    sender, receiver = Worker(there, 5), Worker(here, 7)
    for memory in sender.memory:
        memory.raw = random.randbytes(len(memory))
    blocks = list(zip(random.sample(range(5), 3), random.sample(range(7), 3), strict=True))
    pushes = push(sender, receiver, blocks)
    for source, target in blocks:
        assert receiver.heads(target) == sender.heads(source)
        assert receiver.checksum(target) == sender.checksum(source)
    untouched = set(range(7)) - {target for _, target in blocks}
    assert all(set(b"".join(head for half in receiver.heads(block) for head in half)) == {0} for block in untouched)
    assert sum(copy.nbytes for copies in pushes for copy in copies) == 3 * LAYOUT.block_bytes
    if here == there:
        assert [len(copies) for copies in pushes] == [3] * here  # one for each block and rank


def test_a_checksum_tells_heads_and_layers_apart() -> None:
    worker = Worker(2, 3)
    size = LAYOUT.head_bytes
    ctypes.memset(worker.address(0, 1), 7, size)  # the same bytes, a head further
    ctypes.memset(worker.address(0, 2) + size, 7, size)
    assert len({worker.checksum(block) for block in range(3)}) == 3


GOOD = PushResult(PushStatus.GOOD, 10, 1.0)
FAILED = PushResult(PushStatus.FAILED, 20, 3.0, "gone")
UNKNOWN = PushResult(PushStatus.UNKNOWN, 30, 2.0, "late", lands_late=True)


@pytest.mark.parametrize(
    ("results", "merged"),
    [
        ([GOOD, GOOD], PushResult(PushStatus.GOOD, 20, 1.0)),
        ([GOOD, FAILED], PushResult(PushStatus.FAILED, 30, 3.0, "gone")),
        ([FAILED, UNKNOWN, FAILED], PushResult(PushStatus.UNKNOWN, 70, 3.0, "gone; late", lands_late=True)),
    ],
)
def test_a_push_of_several_ranks_is_as_good_as_its_worst(results: list[PushResult], merged: PushResult) -> None:
    told: list[object] = []
    joint = Joint(len(results), told.append, lambda: told.append("settled"))
    for result in results:
        assert told == []
        joint.done(result)
    assert told == [merged]
    for _ in results:
        assert told == [merged]
        joint.settled()
    assert told == [merged, "settled"]


def test_a_degree_that_does_not_divide_the_model(tiny_model: object) -> None:
    config: ModelConfig = read_config(tiny_model)  # type: ignore[arg-type]
    check_degree(config, 2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4 does not divide .* 2 KV heads .*; possible: 1, 2$"):
        check_degree(config, 4)


def test_a_rank_has_its_own_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, rank, own in (
        ("4,6,7", 0, "4,6,7"),
        ("4,6,7", 2, "7,4,6"),
        ("GPU-a,GPU-b", 1, "GPU-b,GPU-a"),
        ("", 1, None),
        ("5", 1, None),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert _devices(rank).get("CUDA_VISIBLE_DEVICES") == own


# -- between ranks


def test_a_step_travels_as_it_is() -> None:
    arrays = {
        "token_ids": np.array([5, -1, 7]),
        "positions": np.array([0, 1, 9]),
        "slots": np.array([3, 4, -1]),
        "query_start": np.array([0, 2, 3], np.int32),
        "context_lens": np.array([2, 10], np.int32),
        "block_tables": np.array([[1, 0, 0], [4, 5, 6]], np.int32)[:, :2],
        "logits_rows": np.array([], np.int64),
        "scored_rows": np.array([0, 2]),
    }
    for graphed in (False, True):
        found, flag = unpack_step(pack_step(arrays, graphed))
        assert flag is graphed
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].tolist() == array.tolist()
            assert found[name].flags.writeable


def listening(listener: Listener, check: Callable[[], None] = lambda: None) -> tuple[threading.Thread, dict[tuple[int, str], Link]]:
    found: dict[tuple[int, str], Link] = {}
    thread = threading.Thread(target=lambda: found.update(listener.accept({(1, "calls"), (1, "steps")}, check, 10.0)))
    thread.start()
    return thread, found


def test_who_does_not_know_the_token_is_turned_away() -> None:
    listener = Listener("127.0.0.1")
    thread, found = listening(listener)
    stranger, wrong = connect(listener.address, "guess", 1, "calls"), connect(listener.address, listener.token, 2, "calls")
    assert (stranger.receive(), wrong.receive()) == (None, None)
    calls, steps = connect(listener.address, listener.token, 1, "calls"), connect(listener.address, listener.token, 1, "steps")
    thread.join(10)
    found[1, "calls"].send_json({"a": [1, 2]})
    assert calls.receive_json() == {"a": [1, 2]}
    steps.close()
    assert found[1, "steps"].receive() is None
    for link in (stranger, wrong, calls, *found.values()):
        link.close()
    listener.close()


@pytest.mark.parametrize("hello", ["[]", "{}", "7", "nothing", "[" * 4000, '{"token": "é"}', '{"token": ["a"]}', '{"token": "\\ud800"}'])
def test_a_stranger_does_not_end_the_start(hello: str) -> None:
    listener = Listener("127.0.0.1")
    thread, found = listening(listener)
    host, _, port = listener.address.rpartition(":")
    stranger = Link(socket.create_connection((host, int(port))))
    stranger.send(hello.encode())
    assert stranger.receive() is None
    links = [connect(listener.address, listener.token, 1, channel) for channel in ("calls", "steps")]
    thread.join(10)
    assert len(found) == 2
    for link in (stranger, *links, *found.values()):
        link.close()
    listener.close()


def test_ranks_that_do_not_connect_are_not_waited_for_without_end() -> None:
    listener = Listener("127.0.0.1")
    with pytest.raises(InternalError, match=r"ranks 1, 2 have not connected within 0\.2 s"):
        listener.accept({(1, "calls"), (2, "calls"), (2, "steps")}, lambda: None, 0.2)
    listener.close()


class Died:
    def exit_code(self) -> int | None:
        return -9

    def end(self) -> None:
        pass


class Launcher:
    host = "127.0.0.1"

    def start(self, rank: int, address: str, token: str) -> Died:
        return Died()


def test_a_rank_that_dies_before_it_connects_is_no_wrong_configuration() -> None:
    """So the worker is started again."""
    config = WorkerConfig.model_validate({"model": "m", "engine": {"tensor_parallel_size": 2}})
    with pytest.raises(InternalError, match=r"rank 1 of 2 has ended before it connected \(exit code -9\)") as caught:
        Crew(config, Launcher())
    assert exit_code(caught.value) == EXIT_SOFTWARE
