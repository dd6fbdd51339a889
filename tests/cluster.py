"""A real cluster for a test: `baton up` in a process of its own, and handles to look at it and to break it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

START_TIMEOUT_S = 180  # as long as `baton up` allows itself
WORKER_ROLES = ("prefill", "decode", "unified")


def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class RunningCluster:
    url: str
    grpc: str
    process: subprocess.Popen[bytes]
    ready_file: Path
    logs: Path
    urls: Sequence[str] = ()  # of all routers; `url` is the first one's

    def status(self, url: str = "") -> dict[str, Any]:
        """As a router sees it. Raises httpx.HTTPError."""
        return httpx.get(f"{url or self.url}/cluster", timeout=10).json()

    def workers(self) -> list[dict[str, Any]]:
        """As the first router sees them that answers. Raises httpx.HTTPError."""
        for url in self.urls[:-1]:
            with suppress(httpx.HTTPError):
                return self.status(url)["workers"]
        return self.status(self.urls[-1])["workers"]

    def children(self) -> dict[str, psutil.Process]:
        """Live processes of the cluster by id, as the operating system has them now."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                line = child.cmdline()
                if "--config" in line:
                    found[Path(line[line.index("--config") + 1]).stem] = child
                elif line and Path(line[0]).name == "etcd":
                    found["etcd"] = child
                elif line and Path(line[0]).name == "mooncake_master":
                    found["mooncake_master" + _config_stem(child.parent()).removeprefix("kvstore-master")] = child
        return found

    def describe_etcd(self) -> str:
        """host:port of its etcd."""
        return str(json.loads(self.ready_file.read_text())["etcd"]).removeprefix("http://")

    def url_of(self, router: str) -> str:
        """Of one of several: router-0, router-1."""
        return self.urls[int(router.rpartition("-")[2])]

    def signal(self, name: str, number: signal.Signals) -> None:
        self.children()[name].send_signal(number)

    def wait_ready(self, timeout_s: float = 120) -> None:
        """Until every worker that the cluster began with is ready and idle, and each router says so of the process that it is now."""
        names = [each["id"] for each in json.loads(self.ready_file.read_text())["processes"] if each["role"] in WORKER_ROLES]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            children = self.children()
            processes = {(name, children[name].pid) for name in names if name in children}
            with suppress(httpx.HTTPError):
                if len(processes) == len(names) and all(self._is_ready(url, processes) for url in self.urls):
                    return
            time.sleep(0.1)
        raise TimeoutError(f"not ready after {timeout_s} s: {self.workers()}\n{self.tail()}")

    def _is_ready(self, url: str, processes: set[tuple[str, int]]) -> bool:
        idle = [w for w in self.status(url)["workers"] if w["state"] == "ready" and not w["running"] and not w["waiting"]]
        return processes <= {(w["id"], w["pid"]) for w in idle} and httpx.get(f"{url}/ready", timeout=10).status_code == 200

    def integrity(self) -> dict[str, tuple[list[str], int, int]]:
        """For each worker: problems, free blocks, all blocks, by its own count."""

        async def ask() -> dict[str, tuple[list[str], int, int]]:
            answers = {}
            for worker in self.workers():
                async with grpc.aio.insecure_channel(worker["address"]) as channel:
                    stub = worker_pb2_grpc.WorkerStub(channel)
                    answer = await stub.CheckIntegrity(worker_pb2.CheckIntegrityRequest(), timeout=10)
                    answers[worker["id"]] = (list(answer.problems), answer.load.blocks_free, answer.load.blocks_total)
            return answers

        return asyncio.run(ask())

    def assert_clean(self, timeout_s: float = 30) -> None:
        """No worker has a problem, and soon all blocks are free."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.integrity()
            if all(not problems and free == total for problems, free, total in state.values()):
                return
            assert time.monotonic() < deadline, f"blocks stay taken: {state}"
            time.sleep(0.1)

    def tail(self, lines: int = 12) -> str:
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in sorted(self.logs.glob("*.log"))
        )


def _config_stem(process: psutil.Process | None) -> str:
    line = process.cmdline() if process is not None else []
    return Path(line[line.index("--config") + 1]).stem if "--config" in line else ""


@contextmanager
def running_cluster(
    *, model: Path | None = None, etcd: str = "auto", options: Sequence[str] = (), **counts: int
) -> Iterator[RunningCluster]:
    """`counts` are prefill, decode, unified, routers, kvstore and kvstore_masters. On leaving, all is stopped, and nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-c", "from baton.cli import main; main()", "up", "--http-port", "0", "--grpc-port", "0"]
        command += ["--ready-file", str(ready), "--log-dir", folder, "--etcd", etcd]
        command += ["--model", str(model)] if model else []
        command += [part for role, count in counts.items() for part in (f"--{role.replace('_', '-')}", str(count))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}  # what a killed one leaves goes with it
        with (Path(folder) / "up.log").open("wb") as log:
            process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        cluster = RunningCluster("", "", process, ready, Path(folder))
        try:
            _wait_for_start(cluster)
            yield cluster
        except BaseException:
            print(cluster.tail(40))
            raise
        finally:
            stop(cluster)


def _wait_for_start(cluster: RunningCluster) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not cluster.ready_file.exists():
        if cluster.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the cluster did not start (exit code {cluster.process.poll()}):\n{cluster.tail(40)}")
        time.sleep(0.05)
    described = json.loads(cluster.ready_file.read_text())
    cluster.url, cluster.grpc = described["http"], described["grpc"]
    cluster.urls = [router["http"] for router in described["routers"]]


def stop(cluster: RunningCluster) -> None:
    """Asks it to stop; asserts that no process is left behind, and no file."""
    if cluster.process.poll() is None:
        everybody = psutil.Process(cluster.process.pid).children(recursive=True)
        cluster.process.terminate()
        try:
            cluster.process.wait(40)
        finally:
            _, alive = psutil.wait_procs(everybody, timeout=20)  # orphans stay zombies until init looks
            for orphan in alive:
                orphan.kill()
            if cluster.process.poll() is None:
                cluster.process.kill()
                cluster.process.wait()
        assert not alive, f"processes were left behind: {alive}"
        assert not (left := list(cluster.logs.glob("baton-*/*.yaml"))), f"files were left behind: {left}"
