"""A node of the KV pool with a disk: real processes, which are killed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.errors import StoreError
from baton.kv.mooncake import MooncakeStore
from tests.e2e.test_kvstore import BLOCK, COUNT, Memory, Pool, keys, until

ROUNDS = 64  # of COUNT blocks: twice the node's memory


class Node:
    """With what is on its disk."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.told = folder.with_name("link")  # which Mooncake would refuse
        self.told.symlink_to(folder)

    def start(self, budget: str = "1GiB") -> None:
        disk = (f"disk.path={self.told}", f"disk.bytes={budget}", "disk.buffer=64MiB")
        self.pool.start("node0", "node", "16MiB", *disk, "drain_grace_s=0")
        self.pool.wait(lambda seen: seen.available and len(seen.segments) == 1)

    def end(self, number: signal.Signals) -> None:
        self.pool.processes["node0"].send_signal(number)
        self.pool.processes["node0"].wait(60)

    def blocks(self) -> int:
        return len(list(self.folder.glob("*.meta")))


class Client:
    def __init__(self, pool: Pool) -> None:
        self.store, self.memory = MooncakeStore(pool.master, host="127.0.0.1"), Memory()
        self.store.register(self.memory.region)

    def save(self) -> None:
        """Where memory is full, when there is room."""
        for number in range(ROUNDS):
            self.memory.fill(number)
            until(lambda number=number: all(self.store.put(keys(f"{number}"), self.memory.blocks)))

    def found(self) -> int:
        """How many blocks are read; each is what was saved."""
        count = 0
        for number in range(ROUNDS):
            content = self.memory.fill(number)
            self.memory.fill(number + 100)
            try:
                got = self.store.get(keys(f"{number}"), self.memory.blocks)
            except StoreError:  # the node is gone, and the master does not know yet
                continue
            for i in (i for i, good in enumerate(got) if good):
                assert self.memory.bytes.raw[i * BLOCK : (i + 1) * BLOCK] == content[i * BLOCK : (i + 1) * BLOCK]
            count += sum(got)
        return count


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path)
    try:
        made.start("master", "master")
        yield made
    finally:
        made.kill()


@pytest.fixture
def client(pool: Pool) -> Iterator[Client]:
    made = Client(pool)
    yield made
    made.store.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_memory_forgets_and_what_a_restarted_node_had_is_read_from_its_disk(pool: Pool, client: Client, tmp_path: Path) -> None:
    node = Node(pool, tmp_path / "disk")
    node.start()
    client.save()
    until(lambda: node.blocks() == ROUNDS * COUNT)
    assert client.found() == ROUNDS * COUNT
    for number in (signal.SIGKILL, signal.SIGTERM):
        node.end(number)
        assert bool((node.folder / "baton-disk").read_text()) == (number == signal.SIGKILL), "an orderly end is marked"
        node.start()  # at once
        until(lambda: client.found() == ROUNDS * COUNT)
    node.end(signal.SIGTERM)
    node.start(budget="8MiB")
    until(lambda: node.blocks() <= 8 * 2**20 // BLOCK)
    until(lambda: 0 < client.found() <= 8 * 2**20 // BLOCK)
    node.end(signal.SIGTERM)
