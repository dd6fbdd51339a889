"""Launcher: how a worker's other ranks come to run. `LocalLauncher` has them as processes of this machine, `runtime.ray_launch` as
processes of the nodes of a Ray cluster.

What a rank needs is an address, a token and its number; all else it is told by rank 0 over the connections that it makes (`runtime.rank`).
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol

from baton.config import WorkerConfig
from baton.errors import ConfigError

TOKEN = "BATON_RANK_TOKEN"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # environment: where ranks meet
END_S = 5.0  # that a rank has to end by itself


class Rank(Protocol):
    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    def end(self) -> None:
        """Waits until it has ended by itself, or ends it."""
        ...


class Launcher(Protocol):
    host: str
    """That ranks reach rank 0 at."""
    apart: bool
    """Whether ranks are on several machines."""

    def start(self, rank: int, address: str, token: str) -> Rank: ...

    def close(self) -> None:
        """After the ranks' end. Idempotent."""
        ...


def connect_launcher(config: WorkerConfig) -> Launcher:
    """For a worker of several ranks; before anything looks at the GPUs, of which Ray may have others in mind. Raises ConfigError."""
    engine, parallel = config.engine, config.parallel
    if parallel.launcher == "local":
        return LocalLauncher()
    if engine.device == "auto":
        raise ConfigError("engine.device=auto cannot be asked for many machines at once: with parallel.launcher=ray say cpu or cuda")
    from baton.runtime.ray_launch import RayLauncher

    cuda = engine.device == "cuda"
    cores = 1 if cuda else engine.num_threads or 1
    return RayLauncher(engine.tensor_parallel_size, cuda=cuda, cores=cores, address=parallel.ray_address, wait_s=parallel.wait_s)


class LocalRank:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def exit_code(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LocalLauncher:
    """Ranks write to this process's stderr, die with it, and do not hear a terminal's Ctrl-C, which is for rank 0 to answer. Rank i has the
    i-th of this process's GPUs: it sees them all, that one first, so that all its threads use it without being told."""

    host, apart = "127.0.0.1", False

    def __init__(self) -> None:
        for name in INTERFACES:  # for this process's part, too
            os.environ.setdefault(name, "lo")

    def start(self, rank: int, address: str, token: str) -> LocalRank:
        return LocalRank(start_rank(rank, address, {**os.environ, TOKEN: token, **_devices(rank)}))

    def close(self) -> None:
        pass


def start_rank(rank: int, address: str, environment: Mapping[str, str], host: str = "") -> subprocess.Popen[bytes]:
    """A rank's process, which dies with this one. `host`: see `rank.run`."""
    command = [sys.executable, "-m", "baton.runtime.rank", address, str(rank), *([f"--host={host}"] if host else [])]
    environment = {**environment, "BATON_DIE_WITH_PARENT": str(os.getpid())}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)


def _devices(rank: int) -> Mapping[str, str]:
    import torch  # not for Ray's tasks, which import this

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[rank:] + names[:rank])} if len(names) > rank else {}
