"""The KV pool on real processes: blocks through it, the kvstore service, and what happens when its parts die."""

import contextlib
import ctypes
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from baton.cluster.machine import free_port
from baton.errors import StoreError
from baton.kv.mooncake import MooncakeStore
from baton.kv.seals import SEAL_BYTES
from baton.kv.store import Buffer
from baton.kv.verify import VerifiedTransfer
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc

pytestmark = pytest.mark.timeout(240)
BLOCK = 64 << 10
COUNT = 8


class Memory:
    """Blocks of this process's memory."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(COUNT * BLOCK)
        self.region = Buffer(ctypes.addressof(self.bytes), COUNT * BLOCK)
        self.blocks = [Buffer(self.region.address + i * BLOCK, BLOCK) for i in range(COUNT)]

    def fill(self, seed: int) -> bytes:
        content = b"".join(bytes([(seed + i) % 251]) * BLOCK for i in range(COUNT))
        ctypes.memmove(self.region.address, content, len(content))
        return content


class Pool:
    """A master and nodes, each `python -m services.kvstore`."""

    untouched = True  # nobody has laid hands on what it is made of

    def __init__(self, folder: Path) -> None:
        self.ports = {name: free_port() for name in ("master", "metrics", "master-grpc", "master-own", "node0-grpc", "node1-grpc")}
        self.master = f"127.0.0.1:{self.ports['master']}"
        self._folder, self.near = folder, folder / "near"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def processes(self) -> dict[str, subprocess.Popen[bytes]]:
        self.untouched = False
        return self._processes

    def start(self, name: str, mode: str, memory: str = "32MiB", *more: str) -> None:
        settings = [f"mode={mode}", f"server.id={name}", f"server.grpc_port={self.ports[name + '-grpc']}"]
        settings += ["client_ttl_s=6", "drain_grace_s=30"]  # what a test does to a dead node comes before the master has forgotten it
        settings += [f"master_port={self.ports['master']}", f"master_metrics_port={self.ports['metrics']}"]
        settings += [f"pool.master={self.master}", f"memory={memory}", f"pool.near={self.near}"]
        settings += [f"server.metrics_port={self.ports['master-own']}"] if mode == "master" else []
        settings += more
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, "-m", "services.kvstore", *settings], stdout=log, stderr=log)

    def stub(self, channel: grpc.Channel) -> kvstore_pb2_grpc.KVStoreStub:
        return kvstore_pb2_grpc.KVStoreStub(channel)

    def channel(self, name: str = "master") -> grpc.Channel:
        again = [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max")]  # it may have to start first
        return grpc.insecure_channel(f"127.0.0.1:{self.ports[name + '-grpc']}", again)

    def stats(self) -> kvstore_pb2.GetStatsResponse:
        with self.channel() as channel:
            return self.stub(channel).GetStats(kvstore_pb2.GetStatsRequest(), timeout=60, wait_for_ready=True)

    def wait(self, condition: Callable[[kvstore_pb2.GetStatsResponse], bool], timeout_s: float = 60) -> kvstore_pb2.GetStatsResponse:
        deadline = time.monotonic() + timeout_s
        while not condition(seen := self.stats()):
            assert time.monotonic() < deadline, str(seen)
            time.sleep(0.1)
        return seen

    def metrics(self) -> dict[str, float]:
        """All of one moment."""
        page = httpx.get(f"http://127.0.0.1:{self.ports['master-own']}/metrics", timeout=30).text
        return {name: float(value) for name, value in re.findall(r"^baton:kvstore_(\w+){[^}]*} (\S+)$", page, re.MULTILINE)}

    def empty(self) -> None:
        with self.channel() as channel:
            self.stub(channel).Remove(kvstore_pb2.RemoveRequest(all=True), timeout=10)
        self.wait(lambda seen: not seen.num_keys and len(seen.segments) == 1)

    def signal_mooncake_master(self, number: signal.Signals) -> None:
        (child,) = psutil.Process(self.processes["master"].pid).children()
        _send(child, number)

    def signal_node(self, number: signal.Signals) -> None:
        _send(psutil.Process(self.processes["node0"].pid), number)

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(30)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    """When all its threads have stopped, if that is what they shall."""
    process.send_signal(number)
    stats = list(Path(f"/proc/{process.pid}/task").glob("*/stat"))
    while number is signal.SIGSTOP and any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in stats):
        time.sleep(0.01)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_all(call: Callable[[], list[bool]]) -> None:
    """Until it answers so, of every block; meanwhile the pool may be away."""

    def is_true() -> bool:
        try:
            return all(call())
        except StoreError:
            return False

    until(is_true)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Pool]]:
    """The same one again, emptied, until somebody has touched it: to start one takes seconds."""

    def give() -> Iterator[Pool]:
        while True:
            made = Pool(tmp_path_factory.mktemp("pool"))
            try:
                made.start("master", "master")
                made.start("node0", "node")
                made.wait(lambda seen: seen.available and len(seen.segments) == 1)
                made.untouched = True
                while made.untouched:
                    yield made
                    if made.untouched:
                        made.empty()
            finally:
                made.kill()

    with contextlib.closing(give()) as given:
        yield given


@pytest.fixture
def pool(pools: Iterator[Pool]) -> Pool:
    return next(pools)


@pytest.fixture
def client(pool: Pool) -> Iterator[tuple[MooncakeStore, Memory]]:
    store, memory = MooncakeStore(pool.master, host="127.0.0.1"), Memory()
    store.register(memory.region)
    yield store, memory
    store.close()


def keys(prefix: str) -> list[str]:
    return [f"{prefix}/0of1/{i:032x}" for i in range(COUNT)]


def test_blocks_come_back_bit_by_bit_and_what_is_missing_is_a_miss(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    content = memory.fill(1)
    assert store.put(keys("a"), memory.blocks) == [True] * COUNT
    assert store.put(keys("a")[:1], memory.blocks[:1]) == [True]  # it is there already
    memory.fill(100)
    mixed = [*keys("a")[:3], "a/0of1/none", *keys("a")[4:]]
    assert store.contains(mixed) == [True] * 3 + [False] + [True] * 4
    assert store.get(mixed, memory.blocks) == [True] * 3 + [False] + [True] * 4
    assert memory.bytes.raw[: 3 * BLOCK] == content[: 3 * BLOCK]
    assert memory.bytes.raw[4 * BLOCK :] == content[4 * BLOCK :]
    half = [Buffer(block.address, BLOCK // 2) for block in memory.blocks]
    assert store.get(keys("a"), half) == [False] * COUNT  # another size is another layout


def test_the_service_looks_up_counts_and_removes(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    memory.fill(1)
    store.put(keys("aa"), memory.blocks)
    store.put(keys("bb"), memory.blocks)
    hashes = [bytes.fromhex(key.rpartition("/")[2]) for key in keys("aa")]
    with pool.channel() as channel:
        stub = pool.stub(channel)
        found = stub.Lookup(kvstore_pb2.LookupRequest(fingerprint="aa", block_hashes=[*hashes, b"x" * 16])).found
        assert list(found) == [True] * COUNT + [False]
        stats = pool.wait(lambda seen: seen.num_keys == 2 * COUNT)
        assert stats.used_bytes == 2 * COUNT * (BLOCK + SEAL_BYTES)
        assert stats.capacity_bytes == 32 << 20
        assert [(each.used_bytes, each.capacity_bytes) for each in stats.segments] == [(stats.used_bytes, 32 << 20)]
        assert stub.Remove(kvstore_pb2.RemoveRequest(prefix="a.*/")).num_removed == 0  # a prefix is no pattern
        assert stub.Remove(kvstore_pb2.RemoveRequest(prefix="aa/")).num_removed == COUNT
        assert store.contains(keys("aa") + keys("bb")) == [False] * COUNT + [True] * COUNT
        with pytest.raises(grpc.RpcError) as caught:
            stub.Remove(kvstore_pb2.RemoveRequest())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_full_pool_evicts_and_serves_on(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    content = memory.fill(1)
    assert all(store.put(keys("hot"), memory.blocks))
    num_stored = 0
    for i in range(200):  # more than three times what fits: Mooncake refuses at once, and has room a moment later
        num_stored += sum(store.put(keys(f"k{i}"), memory.blocks))
        if i % 20 == 0:
            assert store.get(keys("hot"), memory.blocks) == [True] * COUNT
            assert memory.bytes.raw == content
    assert num_stored > 0.75 * 200 * COUNT
    assert store.contains(keys("k0")) != [True] * COUNT
    large = ctypes.create_string_buffer(40 << 20)  # more than the pool has
    store.register(Buffer(ctypes.addressof(large), len(large)))
    assert store.put(["large"], [Buffer(ctypes.addressof(large), len(large))]) == [False]
    levels, size = {"up": 1, "leader": 1, "nodes": 1, "capacity_bytes": 32 << 20}, BLOCK + SEAL_BYTES

    def add_up(now: dict[str, float]) -> bool:
        told = levels.items() <= now.items() and now["evicted_keys_total"] > 0 and now["failed_puts_total"] > 0
        return told and now["used_bytes"] == now["keys"] * size and now["evicted_bytes_total"] == now["evicted_keys_total"] * size

    deadline = time.monotonic() + 30
    while not add_up(now := pool.metrics()):  # the master is asked every two seconds, also in the middle of a put
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def test_a_killed_master_is_started_again_and_everybody_comes_back(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    memory.fill(1)
    assert all(store.put(keys("a"), memory.blocks))
    assert pool.metrics()["master_restarts_total"] == 0
    pool.signal_mooncake_master(signal.SIGKILL)
    until_all(lambda: store.put(keys("b"), memory.blocks))
    assert store.get(keys("b"), memory.blocks) == [True] * COUNT
    assert pool.metrics()["master_restarts_total"] == 1


def test_a_killed_node_is_a_miss_and_its_keys_are_forgotten(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    memory.fill(1)
    assert all(store.put(keys("a"), memory.blocks))
    pool.processes["node0"].kill()
    pool.processes["node0"].wait()
    started = time.monotonic()
    with pytest.raises(StoreError, match="nodes do not answer"):
        store.get(keys("a"), memory.blocks)
    assert time.monotonic() - started < 8
    pool.wait(lambda seen: not seen.segments)
    assert store.contains(keys("a")) == [False] * COUNT


def test_blocks_that_are_read_often_survive_a_killed_node(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    pool.start("node1", "node")
    pool.wait(lambda seen: len(seen.segments) == 2)
    content = memory.fill(1)
    assert all(store.put(keys("hot"), memory.blocks))

    def is_replicated() -> bool:
        assert store.get(keys("hot"), memory.blocks) == [True] * COUNT
        return pool.wait(lambda seen: seen.available).used_bytes >= 2 * COUNT * BLOCK

    until(is_replicated)  # a second replica of each
    until(lambda: pool.metrics()["replicated_keys_total"] >= COUNT)
    pool.processes["node0"].kill()
    pool.processes["node0"].wait()
    memory.fill(100)
    until_all(lambda: store.get(keys("hot"), memory.blocks))  # until the master has forgotten the node, its replicas are tried first
    assert memory.bytes.raw == content


def test_a_node_that_leaves_hands_its_blocks_over(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    content = memory.fill(3)
    assert all(store.put(keys("a"), memory.blocks))
    pool.start("node1", "node")
    pool.wait(lambda seen: len(seen.segments) == 2)
    pool.processes["node0"].terminate()
    assert pool.processes["node0"].wait(60) == 0
    memory.fill(50)
    assert store.get(keys("a"), memory.blocks) == [True] * COUNT
    assert memory.bytes.raw == content


def test_nodes_that_leave_together_do_not_wait_for_each_other(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    assert all(store.put(keys("a"), memory.blocks))
    pool.start("node1", "node")
    pool.wait(lambda seen: len(seen.segments) == 2)
    nodes = [pool.processes["node0"], pool.processes["node1"]]
    started = time.monotonic()
    for node in nodes:
        node.terminate()
    assert [node.wait(60) for node in nodes] == [0, 0]
    assert time.monotonic() - started < 20  # less than their grace


def test_a_node_leaves_also_when_nobody_is_there_to_say_goodbye_to(pool: Pool) -> None:
    pool.processes["master"].kill()
    pool.processes["master"].wait()
    started = time.monotonic()
    pool.processes["node0"].terminate()
    assert pool.processes["node0"].wait(60) == 0
    assert time.monotonic() - started < 12  # Mooncake would try for 17 s


def test_a_stopped_node_costs_one_timeout_and_writes_nothing_late(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    memory.fill(1)
    assert all(store.put(keys("a") + keys("b"), memory.blocks * 2))
    pool.signal_node(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreError, match="nodes do not answer"):
        store.get(keys("a") + keys("b"), memory.blocks * 2)
    assert time.monotonic() - started < 7  # it is 2 s; four of them over Mooncake's four connections
    untouched = memory.fill(100)
    pool.signal_node(signal.SIGCONT)
    until_all(lambda: store.put(keys("c"), memory.blocks))  # the node comes back by itself
    assert memory.bytes.raw == untouched
    assert store.get(keys("c"), memory.blocks) == [True] * COUNT
    assert memory.bytes.raw == untouched


def test_a_stopped_master_is_noticed(pool: Pool, client: tuple[MooncakeStore, Memory]) -> None:
    store, memory = client
    assert all(store.put(keys("a"), memory.blocks))
    stranger = MooncakeStore(pool.master, host="127.0.0.1")
    pool.signal_mooncake_master(signal.SIGSTOP)
    for call in (lambda: store.contains(keys("a")), lambda: store.get(keys("a"), memory.blocks), lambda: stranger.contains(keys("a"))):
        started = time.monotonic()
        with pytest.raises(StoreError, match="mooncake_master"):
            call()
        assert time.monotonic() - started < 8
    pool.signal_mooncake_master(signal.SIGCONT)
    # The master may have dropped the nodes, which it has not heard of for longer than their time.
    until_all(lambda: store.put(keys("b"), memory.blocks) + stranger.contains(keys("b")))
    stranger.close()


def test_failures_are_not_told_block_by_block(pool: Pool, client: tuple[MooncakeStore, Memory], capfd: pytest.CaptureFixture[str]) -> None:
    store, memory = client
    assert all(store.put(keys("a"), memory.blocks))
    pool.processes["node0"].kill()
    with pytest.raises(StoreError):
        store.get(keys("a"), memory.blocks)
    assert "TRANSFER_FAIL" not in capfd.readouterr().err


def test_lent_memory_is_there_before_it_is_used(pool: Pool) -> None:
    pool.start("node1", "node", "256MiB")
    process = psutil.Process(pool.processes["node1"].pid)
    until(lambda: process.memory_info().rss >= 256 << 20)


def test_rdma_without_a_device_is_refused(pool: Pool) -> None:
    command = "from baton.kv.mooncake import MooncakeStore as M; M({!r}, host='127.0.0.1', protocol='rdma').connect()"
    done = subprocess.run([sys.executable, "-c", command.format(pool.master)], capture_output=True, text=True, check=False, timeout=30)
    assert "StoreError" in done.stderr
    assert "over rdma" in done.stderr


def test_nobody_waits_for_a_master_that_is_not_there() -> None:
    store = MooncakeStore(f"127.0.0.1:{free_port()}", host="127.0.0.1")
    started = time.monotonic()
    with pytest.raises(StoreError, match="no mooncake_master"):
        store.contains(["x"])
    assert time.monotonic() - started < 8  # Mooncake would try for 90 s


def test_a_service_that_cannot_start_says_why() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "services.kvstore",
            "mode=node",
            f"pool.master=127.0.0.1:{free_port()}",
            f"server.grpc_port={port}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_corrupted_block_is_caught_and_not_used(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """pool.verify: the source of one block is written to between its step and its save."""
    store, memory = MooncakeStore(pool.master, host="127.0.0.1"), Memory()
    store.register(memory.region)
    transfer = VerifiedTransfer(store)
    try:
        content = memory.fill(1)
        store.take(keys("a"), memory.blocks)
        ctypes.memset(memory.blocks[2].address + 7, 255, 1)
        assert store.put(keys("a"), memory.blocks) == [True] * COUNT
        memory.fill(1)
        saved: queue.SimpleQueue[list[bool]] = queue.SimpleQueue()
        transfer.save(keys("b"), memory.blocks, saved.put)
        assert saved.get(timeout=30) == [True] * COUNT
        memory.fill(100)
        loaded: queue.SimpleQueue[list[bool]] = queue.SimpleQueue()
        transfer.load(keys("b"), memory.blocks, loaded.put)
        assert loaded.get(timeout=30) == [True] * COUNT
        assert memory.bytes.raw == content
        transfer.load(keys("a"), memory.blocks, loaded.put)
        assert loaded.get(timeout=30) == [True] * 2 + [False] + [True] * 5
        assert (transfer.stats.blocks_verified, transfer.stats.blocks_corrupt, transfer.stats.failures) == (
            2 * COUNT + 1,
            1,
            0,
        )  # what differs is read twice
        assert "with another content than it was saved with" in caplog.text
        assert store.contains(keys("a")) == [True] * 2 + [False] + [True] * 5  # so that it can be saved again
    finally:
        transfer.close()
