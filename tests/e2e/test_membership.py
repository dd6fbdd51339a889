"""Membership on a real etcd that is killed, stopped and started again, and the static list."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.cluster.etcd import EtcdMembership
from baton.cluster.machine import free_port
from baton.cluster.membership import InMemoryMembership, Membership, View
from baton.cluster.static import StaticMembership
from baton.errors import ConfigError, MembershipError, WorkerLost
from baton.types import Member, MemberState, Role
from tests.cluster import until

LEASE_S = 3.0  # etcd drops who does not refresh it, which is done every second


class Etcd:
    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        """`certificates`: the folder of its own; it then asks clients for theirs."""
        program = shutil.which("etcd")
        assert program, "etcd is not installed: run make setup"
        client, peer, health = free_port(), free_port(), free_port()
        scheme = "http" if certificates is None else "https"
        self.url, self._folder = f"{scheme}://127.0.0.1:{client}", folder
        self._command = [program, "--name=t", f"--data-dir={folder}", "--log-level=error", "--unsafe-no-fsync"]
        self._command += [f"--listen-client-urls={self.url}", f"--advertise-client-urls={self.url}"]
        self._command += [f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}"]
        self._command += [f"--initial-cluster=t=http://127.0.0.1:{peer}"]
        if certificates is not None:
            files = {"cert-file": "tls.crt", "key-file": "tls.key", "trusted-ca-file": "ca.crt"}
            self._command += [f"--{option}={certificates / file}" for option, file in files.items()] + ["--client-cert-auth"]
        self._health = f"http://127.0.0.1:{health}"
        self._command += [f"--listen-metrics-urls={self._health}", "--heartbeat-interval=10", "--election-timeout=100"]  # elected soon
        self.start()

    def start(self, *, empty: bool = False) -> None:
        if empty:
            shutil.rmtree(self._folder)
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._is_healthy)

    def _is_healthy(self) -> bool:
        """It listens some time before it has a leader, and serves nothing meanwhile."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self._health}/health", timeout=5).json()["health"] == "true"
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path / "etcd")
    yield server
    server.kill()


def member(name: str, state: MemberState = MemberState.READY) -> Member:
    return Member(id=name, role=Role.DECODE, address=f"127.0.0.1:1{name[-1]}", state=state, pid=7, fingerprint="f")


@asynccontextmanager
async def opened(etcd: Etcd, lease_s: float = LEASE_S) -> AsyncIterator[EtcdMembership]:
    membership = EtcdMembership(etcd.url, "test", lease_s=lease_s)
    try:
        yield membership
    finally:
        await membership.close()


class Seen:
    """The latest view, and whether anybody was ever missing."""

    def __init__(self, membership: Membership) -> None:
        self.view: View = {}
        self.history: list[set[str]] = []
        self._task = asyncio.create_task(self._watch(membership))

    async def _watch(self, membership: Membership) -> None:
        async for view in membership.watch():
            self.view = view
            self.history.append(set(view))

    async def until(self, condition: Callable[[View], bool], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.view):
            assert time.monotonic() < deadline, f"still {dict(self.view)}"
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_members_come_change_and_go(etcd: Etcd) -> None:
    async with opened(etcd, lease_s=30) as a, opened(etcd) as b, opened(etcd) as reader:
        await a.join(member("w1"))
        seen = Seen(reader)
        await seen.until(lambda view: view == {"w1": member("w1")})
        await b.join(member("w2"))
        await seen.until(lambda view: set(view) == {"w1", "w2"})
        await a.join(member("w1", MemberState.DRAINING))
        await seen.until(lambda view: view["w1"].state is MemberState.DRAINING)
        await asyncio.sleep(LEASE_S * 1.5)  # kept alive
        assert set(seen.view) == {"w1", "w2"}
        await a.leave()
        await seen.until(lambda view: set(view) == {"w2"}, 10)  # it has said so: its lease is longer
        await seen.close()


async def test_a_silent_member_is_gone_after_its_lease(etcd: Etcd) -> None:
    async with opened(etcd) as a, opened(etcd) as reader:
        await a.join(member("w1"))
        seen = Seen(reader)
        await seen.until(lambda view: "w1" in view)
        assert a._keeper is not None
        a._keeper.cancel()  # as if the process was stopped
        started = time.monotonic()
        await seen.until(lambda view: not view, 3 * LEASE_S + 5)  # a watch that breaks meanwhile gives it another lease
        assert time.monotonic() - started > LEASE_S / 2
        await seen.close()


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "without its data"])
async def test_a_restart_of_etcd_loses_nobody(etcd: Etcd, empty: bool) -> None:
    async with opened(etcd) as a, opened(etcd) as reader:
        await a.join(member("w1"))
        seen = Seen(reader)
        await seen.until(lambda view: "w1" in view)
        etcd.kill()
        await asyncio.sleep(LEASE_S * 1.5)
        assert "w1" in seen.view
        await asyncio.to_thread(etcd.start, empty=empty)
        await asyncio.sleep(LEASE_S + 3)  # longer than who is missing is waited for
        assert "w1" in seen.view
        before_joining = seen.history.index({"w1"})
        assert all(view == {"w1"} for view in seen.history[before_joining:])
        async with opened(etcd) as b:
            await b.join(member("w2"))
            await seen.until(lambda view: set(view) == {"w1", "w2"})
        await seen.close()


async def test_a_stopped_etcd_is_waited_for_and_who_died_meanwhile_is_dropped(etcd: Etcd) -> None:
    async with opened(etcd) as a, opened(etcd) as b, opened(etcd) as reader:
        await a.join(member("w1"))
        await b.join(member("w2"))
        seen = Seen(reader)
        await seen.until(lambda view: len(view) == 2)
        etcd.signal(signal.SIGSTOP)
        assert b._keeper is not None
        b._keeper.cancel()
        await asyncio.sleep(LEASE_S * 2)
        assert set(seen.view) == {"w1", "w2"}
        etcd.signal(signal.SIGCONT)
        await seen.until(lambda view: set(view) == {"w1"})
        await asyncio.sleep(LEASE_S)
        assert set(seen.view) == {"w1"}
        await seen.close()


async def test_a_watch_that_died_quietly_is_noticed(etcd: Etcd) -> None:
    async with opened(etcd) as a, opened(etcd) as b, opened(etcd) as reader:
        clients: list[Any] = []
        new_client = reader._new_client
        reader._new_client = lambda: clients.append(new_client()) or clients[-1]  # type: ignore[method-assign]
        await a.join(member("w1"))
        seen = Seen(reader)
        await seen.until(lambda view: "w1" in view)
        await asyncio.sleep(0.2)
        clients[0]._watcher._callbacks.clear()  # events go nowhere from now on
        await b.join(member("w2"))
        await seen.until(lambda view: set(view) == {"w1", "w2"})
        await seen.close()


async def test_the_next_endpoint_is_tried(etcd: Etcd) -> None:
    membership = EtcdMembership(f"http://127.0.0.1:1,{etcd.url}", "test", lease_s=30)
    with pytest.raises(MembershipError, match="cannot be reached"):
        await membership.join(member("w1"))
    await membership.join(member("w1"))
    seen = Seen(membership)
    await seen.until(lambda view: "w1" in view)
    await seen.close()
    await membership.close()


async def test_an_unreachable_etcd_is_an_error_at_once() -> None:
    membership = EtcdMembership("http://127.0.0.1:1", "test", lease_s=LEASE_S)
    with pytest.raises(MembershipError, match="cannot be reached"):
        await membership.join(member("w1"))
    await membership.close()
    for wrong in ("http://", "http://a:b", "ftp://a:1", "https://a:1,http://b:1", "http://a:1,,"):
        with pytest.raises(ConfigError, match="must look like"):
            EtcdMembership(wrong, "test", lease_s=LEASE_S)


async def test_static_members_are_those_that_answer() -> None:
    alive = {"a:1": member("w1"), "b:2": member("w2")}

    async def probe(address: str) -> Member:
        if address not in alive:
            raise WorkerLost("nobody there")
        return alive[address]

    seen = Seen(StaticMembership(["a:1", "b:2", "c:3"], probe, lease_s=0.5))
    await seen.until(lambda view: set(view) == {"w1", "w2"})
    del alive["a:1"]
    await seen.until(lambda view: set(view) == {"w2"})
    await seen.close()


async def test_a_static_member_that_hangs_or_cannot_be_read_hides_no_other() -> None:
    there = member("w1")

    async def probe(address: str) -> Member:
        if address == "hangs:1":
            await asyncio.sleep(3600)
        if address == "newer:1":
            raise KeyError("a role of another version")
        return there

    seen = Seen(StaticMembership(["hangs:1", "newer:1", "a:1"], probe, lease_s=5))
    await seen.until(lambda view: set(view) == {"w1"})
    there = dataclasses.replace(there, pid=2)
    await seen.until(lambda view: view["w1"].pid == 2)
    await seen.close()


async def test_the_in_memory_twin() -> None:
    hub: dict[str, Member] = {}
    a, b = InMemoryMembership(hub), InMemoryMembership(hub)
    await a.join(member("w1"))
    seen = Seen(b)
    await seen.until(lambda view: set(view) == {"w1"})
    await a.close()
    await seen.until(lambda view: not view)
    await seen.close()
