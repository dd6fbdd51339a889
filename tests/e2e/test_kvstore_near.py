"""Blocks of the KV pool that are copied from the memory of a node on this machine, with real processes that are killed."""

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from baton.errors import StoreError
from baton.kv import mooncake
from baton.kv.memory import CpuMemory
from baton.kv.mooncake import MooncakeStore
from baton.kv.neighbours import Neighbours, pool_name
from baton.kv.store import Buffer
from tests.e2e.test_kvstore import BLOCK, COUNT, Memory, Pool, keys, pool, pools, until, until_all

__all__ = ["pool", "pools"]
pytestmark = pytest.mark.timeout(240)


class Interrupted(CpuMemory):
    """Something happens when a copy has been made."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], object] = int

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        super().copy(targets, sources)
        self.then()


class Worker:
    def __init__(self, pool: Pool, *, near: bool = True) -> None:
        self.copies, self.memory = Interrupted(), Memory()
        self.near = Neighbours(pool.near, self.copies, pool_name(pool.master, ""))
        self.store = MooncakeStore(pool.master, host="127.0.0.1", near=self.near if near else None)
        self.store.register(self.memory.region)

    def get(self, name: str) -> list[bool]:
        ctypes.memset(self.memory.region.address, 255, self.memory.region.nbytes)
        return self.store.get(keys(name), self.memory.blocks)

    def meet(self, name: str) -> None:
        """Reads until it is read from the node's memory."""
        before = self.store.stats.blocks_near

        def is_met() -> bool:
            assert self.get(name) == [True] * COUNT
            return self.store.stats.blocks_near > before

        until(is_met)


OVERWRITE = f"""
import ctypes, os, sys
os.environ["MC_FORCE_TCP"] = "1"
from mooncake.engine import TransferEngine
from mooncake.store import MooncakeDistributedStore
store, engine = MooncakeDistributedStore(), TransferEngine()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 24, "tcp", "", sys.argv[1]) == 0
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
size = {BLOCK} + 8
memory = ctypes.create_string_buffer(size)
assert engine.register_memory(ctypes.addressof(memory), size) == 0
described = store.batch_get_replica_desc(sys.argv[2:])
places = [described[name][0].get_memory_descriptor().buffer_descriptor for name in sys.argv[2:]]
assert all(place.size == size for place in places)
for source, target, kept in ((0, 1, 0), (2, 3, size // 2)):
    assert engine.transfer_sync_read(places[source].transport_endpoint, ctypes.addressof(memory), places[source].buffer_address, size) == 0
    start = places[target].buffer_address + kept
    assert engine.transfer_sync_write(places[target].transport_endpoint, ctypes.addressof(memory) + kept, start, size - kept) == 0
os._exit(0)
"""


def run_peer(code: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:baton-kv")


@pytest.fixture
def worker(pool: Pool) -> Iterator[Worker]:
    until(lambda: pool.near.is_dir() and any(not path.name.startswith(".") for path in pool.near.iterdir()))
    made = Worker(pool)
    yield made
    made.store.close()
    assert mapped() == 0


def test_blocks_are_those_that_were_saved_and_what_is_missing_is_a_miss(pool: Pool, worker: Worker) -> None:
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    before = worker.store.stats.blocks_near
    worker.memory.fill(100)
    mixed = [*keys("a")[:3], "a/0of1/none", *keys("a")[4:]]
    assert worker.store.get(mixed, worker.memory.blocks) == [True] * 3 + [False] + [True] * 4
    assert worker.store.stats.blocks_near == before + COUNT - 1
    assert worker.memory.bytes.raw[: 3 * BLOCK] == content[: 3 * BLOCK]
    assert worker.memory.bytes.raw[4 * BLOCK :] == content[4 * BLOCK :]
    half = [Buffer(block.address, BLOCK // 2) for block in worker.memory.blocks]
    assert worker.store.get(keys("a"), half) == [False] * COUNT  # another size is another layout
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:baton-kv" in line)
    assert line.split()[1] == "r--s"
    (socket,) = pool.near.iterdir()
    assert socket.stat().st_mode & 0o777 == 0o600
    assert pool.near.stat().st_mode & 0o777 == 0o700


def test_without_a_socket_blocks_come_over_the_network(pool: Pool, worker: Worker) -> None:
    pool.untouched = False
    for path in pool.near.iterdir():
        path.unlink()
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    for _ in range(3):
        assert worker.get("a") == [True] * COUNT
        assert worker.memory.bytes.raw == content
        (pool.near / f"{pool_name(pool.master, '')}-127.0.0.1:1").touch()  # of a dead node
    assert (worker.store.stats.blocks_near, mapped()) == (0, 0)


def test_memory_that_the_device_does_not_take_is_not_used(
    pool: Pool, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []

    def refuse(region: Buffer, *, read_only: bool) -> None:
        asked.append(read_only)
        raise RuntimeError("cudaHostRegister failed")

    monkeypatch.setattr(worker.copies, "adopt", refuse)
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    assert worker.get("a") == [True] * COUNT
    until(lambda: "cudaHostRegister failed" in caplog.text)
    assert worker.get("a") == [True] * COUNT
    assert worker.memory.bytes.raw == content
    assert (asked, worker.store.stats.blocks_near, mapped()) == ([True, False], 0, 0)


@pytest.mark.parametrize("saved_again", [False, True])
def test_what_was_removed_during_the_copy_is_no_hit(saved_again: bool, pool: Pool, worker: Worker) -> None:
    """By force, whatever is leased; and its place has another block by then, even if it is saved again elsewhere."""
    worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    other, source = MooncakeStore(pool.master, host="127.0.0.1"), Memory()
    other.register(source.region)
    source.fill(100)
    before = worker.store.stats.blocks_near

    def replace() -> None:
        other.remove("a/")
        assert all(other.put(keys("b"), source.blocks))
        if saved_again:
            assert all(other.put(keys("a"), source.blocks))

    worker.copies.then = replace
    assert worker.get("a") == [saved_again] * COUNT
    assert worker.store.stats.blocks_near == before
    if saved_again:  # Mooncake has read it
        assert worker.memory.bytes.raw == source.bytes.raw
    worker.copies.then = int
    assert worker.get("b") == [True] * COUNT
    assert worker.memory.bytes.raw == source.bytes.raw
    other.close()


def test_a_copy_that_outlasts_its_lease_is_made_again_over_the_network(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    before = worker.store.stats.blocks_near
    monkeypatch.setattr(mooncake, "LEASE_S", 0.05)
    worker.copies.then = lambda: time.sleep(0.1)
    assert worker.get("a") == [True] * COUNT
    assert worker.memory.bytes.raw == content
    assert worker.store.stats.blocks_near == before


@pytest.mark.parametrize("near", [False, True])
def test_a_block_that_was_written_over_is_no_hit_and_can_be_saved_again(
    near: bool, pool: Pool, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """As a write that was given up may when a stopped node goes on: another block with its seal, or the end of one."""
    pool.untouched = False
    if not near:
        (socket,) = pool.near.iterdir()
        socket.unlink()
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    if near:
        worker.meet("a")
    run_peer(OVERWRITE, pool.master, *(f"{key}+xxh3" for key in keys("a")[:4]))
    before = worker.store.stats.blocks_near
    assert worker.get("a") == [True, False, True, False] + [True] * 4
    assert (worker.store.stats.blocks_near > before) is near
    assert worker.store.stats.blocks_corrupt == 2
    assert caplog.text.count("it is not used and was removed") == 2
    assert worker.store.contains(keys("a")) == [True, False, True, False] + [True] * 4
    worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    assert worker.get("a") == [True] * COUNT
    assert worker.memory.bytes.raw == content


def test_a_killed_node_is_unmapped_and_its_successor_is_met(pool: Pool, worker: Worker) -> None:
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    assert mapped() == 1
    pool.processes["node0"].kill()
    pool.processes["node0"].wait()
    until(lambda: mapped() == 0)  # though nobody reads: the kernel has the memory back
    with pytest.raises(StoreError, match="nodes do not answer"):
        worker.get("a")
    (dead,) = pool.near.iterdir()
    pool.start("node0", "node")
    until(lambda: [path for path in pool.near.iterdir() if not path.name.startswith(".")] not in ([dead], []))
    assert not dead.exists()
    pool.wait(lambda seen: len(seen.segments) == 1)
    worker.memory.fill(1)
    until_all(lambda: worker.store.put(keys("b"), worker.memory.blocks))
    worker.meet("b")
    assert worker.memory.bytes.raw == content


def test_a_node_may_be_killed_during_the_copy(pool: Pool, worker: Worker) -> None:
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")

    def kill() -> None:
        pool.processes["node0"].kill()
        pool.processes["node0"].wait()

    worker.copies.then = kill
    assert worker.get("a") == [True] * COUNT  # nobody can have written there since
    assert worker.memory.bytes.raw == content
    worker.copies.then = int
    until(lambda: mapped() == 0)


def test_after_a_restart_of_the_master_nothing_old_is_read(pool: Pool, worker: Worker) -> None:
    worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")

    def restart() -> None:
        pool.signal_mooncake_master(signal.SIGKILL)
        until(lambda: pool.stats().available and len(pool.stats().segments) == 1)

    worker.copies.then = restart
    seen: list[bool] = [True]
    try:
        seen = worker.get("a")
    except StoreError:
        seen = []
    assert not any(seen)
    worker.copies.then = int
    content = worker.memory.fill(50)
    until_all(lambda: worker.store.put(keys("b"), worker.memory.blocks))
    worker.meet("b")
    assert worker.memory.bytes.raw == content


def test_a_stopped_node_is_read_on_and_a_stopped_master_is_noticed(pool: Pool, worker: Worker) -> None:
    content = worker.memory.fill(1)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    pool.signal_node(signal.SIGSTOP)
    assert worker.get("a") == [True] * COUNT
    assert worker.memory.bytes.raw == content
    pool.signal_node(signal.SIGCONT)
    pool.signal_mooncake_master(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreError, match="mooncake_master"):
        worker.get("a")
    assert time.monotonic() - started < 8
    pool.signal_mooncake_master(signal.SIGCONT)


def test_a_node_that_leaves_hands_its_blocks_over_and_its_memory_back(pool: Pool, worker: Worker) -> None:
    content = worker.memory.fill(3)
    assert all(worker.store.put(keys("a"), worker.memory.blocks))
    worker.meet("a")
    pool.start("node1", "node")
    pool.wait(lambda seen: len(seen.segments) == 2)
    until(lambda: len(list(pool.near.iterdir())) == 2)
    pool.processes["node0"].terminate()
    assert pool.processes["node0"].wait(60) == 0
    until(lambda: mapped() == 0)
    assert len(list(pool.near.iterdir())) == 1
    worker.meet("a")  # from the other
    assert worker.memory.bytes.raw == content


@pytest.mark.parametrize("near", [False, True])
def test_nothing_corrupt_is_read_while_the_pool_evicts(near: bool, pool: Pool, worker: Worker) -> None:
    """While another writes ten times what the pool holds, and removes by force."""
    reader, writer = Worker(pool, near=near), Worker(pool)
    done, failed = threading.Event(), list[BaseException]()

    def write() -> None:
        try:
            for i in range(640):
                writer.memory.fill(i)
                writer.store.put(keys(f"k{i % 80}"), writer.memory.blocks)
                if i % 16 == 0:
                    writer.store.remove(f"k{(i + 40) % 80}/")
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    i = hits = 0
    while not done.is_set():
        hits += sum(reader.get(f"k{i % 80}"))
        i += 1
    thread.join()
    reader.store.close()
    writer.store.close()
    assert not failed
    stats = reader.store.stats
    assert stats.blocks_corrupt == 0
    assert stats.blocks_verified >= stats.blocks_near
    assert (stats.blocks_near > 0) is near
    assert hits


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.e2e.test_kvstore_near import Worker, keys, mapped

class Known:
    master, near = sys.argv[1], Path(sys.argv[2])

worker = Worker(Known)
worker.memory.fill(1)
assert all(worker.store.put(keys("a"), worker.memory.blocks))
worker.meet("a")
assert mapped() == 1
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker_leaves_nothing_behind(pool: Pool, worker: Worker) -> None:
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _KILLED, pool.master, str(pool.near)], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
    until(lambda: Path("/proc/net/unix").read_text().count(f"{pool.near}/") == 1)  # the node listens, and has hung up
    worker.meet("a")
