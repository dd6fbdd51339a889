"""The memory that a node hands to workers of its machine: who gets it, from whom it is taken, and when it goes."""

import asyncio
import ctypes
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.kv import neighbours
from baton.kv.memory import CpuMemory
from baton.kv.neighbours import Lender, Neighbours, SharedMemory, meeting_place, pool_name
from baton.kv.store import Buffer

BYTES = 1 << 20
POOL = pool_name("here:50051", "")
BASE = 1 << 40  # where the memory lies in the other process


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def find(near: Neighbours, name: str, address: int, nbytes: int = 8) -> Buffer | None:
    near.meet()
    with near.held():
        found = near.find([("elsewhere:1", 0), (name, address)], nbytes)
    assert found is None or found[0] == (name, address)
    return found and found[1]


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:baton-kv")


def test_a_worker_sees_the_memory_until_the_node_ends(tmp_path: Path) -> None:
    async def run() -> None:
        memory = SharedMemory(BYTES)
        with mmap.mmap(memory.file, BYTES) as own:
            ((start, length, offset),) = memory.pieces()
            assert (length, offset) == (BYTES, 0)
            own[100:108] = b"a block!"
            lender, near = Lender(memory, tmp_path / "a" / "b", POOL), Neighbours(tmp_path / "a" / "b", CpuMemory(), POOL)
            assert not near.meet()
            assert find(near, "here:1", start) is None
            lender.open("here:1")
            await until(near.meet)
            found = find(near, "here:1", start + 100)
            assert found is not None
            assert ctypes.string_at(found.address, 8) == b"a block!"
            for address, nbytes in ((start - 1, 8), (start + BYTES - 7, 8), (start, BYTES + 1)):
                assert find(near, "here:1", address, nbytes) is None
            assert find(near, "../here:1", start) is None
            lender.close()
            assert find(near, "here:1", start + 100) is None  # at once
            await until(lambda: mapped() == 1)
            await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kv-near")])
            assert not near.meet()
            lender.open("here:1")
            await until(lambda: find(near, "here:1", start) is not None)
            near.close()
            assert mapped() == 1
            assert find(near, "here:1", start) is None  # and it does not come back
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-near")]
            lender.close()
        os.close(memory.file)

    asyncio.run(run())


def test_another_user_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        memory = SharedMemory(BYTES)
        lender = Lender(memory, tmp_path, POOL)
        lender.open("here:1")
        monkeypatch.setattr(neighbours, "_user", lambda peer: os.getuid() + 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(tmp_path / f"{POOL}-here:1"))
            message, files, _, _ = await asyncio.to_thread(socket.recv_fds, stranger, 100, 1)
            assert (message, files) == (b"", [])
        assert "it belongs to user" in caplog.text
        lender.close()
        os.close(memory.file)

    asyncio.run(run())


def test_the_sockets_of_the_dead_are_removed(tmp_path: Path) -> None:
    async def run() -> None:
        memory = SharedMemory(BYTES)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(tmp_path / "dead:1"))
            dead.listen()
        (tmp_path / "a file").touch()
        first, second = Lender(memory, tmp_path, POOL), Lender(memory, tmp_path, POOL)
        first.open("here:1")
        second.open("here:2")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{POOL}-here:1", f"{POOL}-here:2", "a file"]
        first.close()
        second.close()
        assert [path.name for path in tmp_path.iterdir()] == ["a file"]
        os.close(memory.file)

    asyncio.run(run())


def _sealed(nbytes: int = BYTES) -> int:
    return SharedMemory(nbytes).file


def _header(nbytes: int = BYTES, length: int = BYTES) -> bytes:
    return json.dumps({"bytes": nbytes, "pieces": [[BASE, length, 0]]}).encode()


HOSTILE: dict[str, tuple[bytes, Callable[[], int] | None]] = {
    "nothing": (_header(), None),
    "hangs up": (b"", None),
    "no description": (b"{", _sealed),
    "another description": (b"[1]", _sealed),
    "may shrink": (_header(), lambda: os.memfd_create("baton-kv")),
    "a file": (_header(), lambda: os.open(__file__, os.O_RDONLY)),
    "is smaller": (_header(), lambda: _sealed(4096)),
    "lies beyond": (_header(length=2 * BYTES), _sealed),
    "lies nowhere": (json.dumps({"bytes": BYTES, "pieces": []}).encode(), _sealed),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_peer_that_is_no_node_is_not_believed(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message, make = HOSTILE[case]
    near = Neighbours(tmp_path, CpuMemory(), POOL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / f"{POOL}-here:1"))
        listener.listen()
        listener.settimeout(10)
        assert find(near, "here:1", BASE) is None
        peer, _ = listener.accept()
        with peer:
            files = [make()] if make is not None else []
            if message:
                socket.send_fds(peer, [message], files)
            peer.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 10
            while "come over the network" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert find(near, "here:1", BASE) is None
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):  # it is not asked again so soon
                listener.accept()
        for file in files:
            os.close(file)
    near.close()
    assert mapped() == 0


def test_the_socket_of_another_user_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(neighbours, "_user", lambda peer: os.getuid() + 1)
    near = Neighbours(tmp_path, CpuMemory(), POOL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / f"{POOL}-here:1"))
        listener.listen()
        find(near, "here:1", BASE)
        near.close()
    assert "its socket belongs to user" in caplog.text


def test_where_they_meet() -> None:
    assert meeting_place("") is None
    assert meeting_place("/run/kv") == Path("/run/kv")
    automatic = meeting_place("auto")
    assert automatic is not None
    assert str(os.getuid()) in automatic.name


def test_who_copies_keeps_nobody_from_asking_and_what_is_copied_from_stays(tmp_path: Path) -> None:
    async def run() -> None:
        memory = SharedMemory(BYTES)
        with mmap.mmap(memory.file, BYTES):
            ((start, _, _),) = memory.pieces()
            lender, near = Lender(memory, tmp_path, POOL), Neighbours(tmp_path, CpuMemory(), POOL)
            lender.open("here:1")
            await until(near.meet)
            (tmp_path / f"{POOL}-new:1").touch()
            with near.held():
                assert near.find([("here:1", start)], 8) is not None
                assert await asyncio.wait_for(asyncio.to_thread(near.meet), 10)
                lender.close()
                await asyncio.sleep(0.2)
                assert mapped() == 2  # the node's own, and the worker's
            await until(lambda: mapped() == 1)
            near.close()
        os.close(memory.file)

    asyncio.run(run())


def test_nodes_of_other_pools_are_not_met(tmp_path: Path) -> None:
    async def run() -> None:
        memory = SharedMemory(BYTES)
        lender, near = Lender(memory, tmp_path, pool_name("here:50052", "")), Neighbours(tmp_path, CpuMemory(), POOL)
        lender.open("here:1")
        assert not near.meet()
        assert not near._threads
        lender.close()
        os.close(memory.file)

    asyncio.run(run())
    assert pool_name("here:1", "a") == pool_name("here:1", "b")  # its address is enough
    assert len({pool_name("here:1", ""), pool_name("etcd://here:1", "a"), pool_name("etcd://here:1", "b")}) == 3


def test_a_dead_socket_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_AGAIN_S", 0.0)
    near = Neighbours(tmp_path, CpuMemory(), POOL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / f"{POOL}-dead:1"))
        dead.listen()
    (tmp_path / f"{POOL}-none:1").write_text("no socket, either")
    with caplog.at_level("DEBUG"):
        for _ in range(3):
            assert not near.meet()
            for thread in list(near._threads.values()):
                thread.join(10)
    assert {record.levelname for record in caplog.records if "come over the network" in record.message} == {"DEBUG"}
    caplog.clear()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:  # of another kind
        other.bind(str(tmp_path / f"{POOL}-other:1"))
        other.listen()
        for _ in range(3):
            assert not near.meet()
            for thread in list(near._threads.values()):
                thread.join(10)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    near.close()
