"""Machines for a test: network namespaces with an address, a name and a folder for Ray each; processes in them. Needs root."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.chart.network import Network

RAY_PORT = 6379
_ENTER = 'mount --bind "$1" "$2" && hostname "$3" && touch "$1/entered" && exec sleep 3600'


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class HostProcess:
    def __init__(self, host: "TestHost", command: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        with log.open("wb") as file:
            self._process = subprocess.Popen([*host.enter, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        self.pid = self._process.pid  # nsenter's, which becomes the command's

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def exit_code(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    @property
    def running(self) -> bool:
        return self._process.poll() is None


class TestHost:
    """Ray's files are under `ray`, a path that all machines have, with something else behind it on each."""

    __test__ = False

    def __init__(self, network: Network, number: int, folder: Path, ray: Path) -> None:
        self.namespace, self.address = network.add()
        self.folder, self.ray = folder / f"host-{number}", ray
        self.folder.mkdir()
        own = self.folder / "ray"
        own.mkdir()
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "--uts", "sh", "-c", _ENTER, "sh"]
        self._holder = subprocess.Popen([*command, str(own), str(ray), f"host-{number}"], stdin=subprocess.DEVNULL)
        until((own / "entered").exists, 10)
        self.enter = ["nsenter", f"--target={self._holder.pid}", "--net", "--mount", "--uts", "--"]
        self._started: list[HostProcess] = []

    def start(self, *command: str) -> HostProcess:
        self._started.append(HostProcess(self, command, self.folder / f"{len(self._started)}.log"))
        return self._started[-1]

    def start_ray(self, head: str = "") -> HostProcess:
        """A node of one core and, as it is told, one GPU; the head, if `head` is empty."""
        lead = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={self.ray}"]
        role = [f"--address={head}"] if head else lead
        size = ["--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000"]
        ray = str(Path(sys.executable).with_name("ray"))
        return self.start(ray, "start", "--block", *role, *size, f"--node-ip-address={self.address}", "--disable-usage-stats")

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Of this machine, those with `word` in their command line."""
        inode = os.stat(f"/run/netns/{self.namespace}").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == inode and word in " ".join(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue  # it has ended
        return found

    def tails(self) -> list[str]:
        """What the latest processes have said last."""
        return [f"--- {each.log}\n{each.log.read_text(errors='replace')[-2000:]}" for each in self._started[-5:]]

    def close(self) -> None:
        """Ends all that runs here."""
        for process in self.processes():
            process.kill()
        self._holder.wait()
        for started in self._started:
            started.exit_code(10)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[TestHost, TestHost]]:
    """With a Ray cluster of both, whose head is on the first."""
    network, hosts = Network(), list[TestHost]()
    shared = folder / "r"  # short: Ray makes sockets under it
    shared.mkdir()
    try:
        for number in range(2):
            hosts.append(TestHost(network, number, folder, shared))
        first, second = hosts
        rays = [first.start_ray()]
        until(lambda: "Ray runtime started" in rays[0].log.read_text(), 90)
        rays.append(second.start_ray(f"{first.address}:{RAY_PORT}"))
        until(lambda: "Ray runtime started" in rays[1].log.read_text(), 90)
        yield first, second
    finally:
        for host in reversed(hosts):
            host.close()
        network.close()
