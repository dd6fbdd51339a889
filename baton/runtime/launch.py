"""Launcher: how a worker's other ranks come to run. `LocalLauncher` has them as processes of this machine.

What a rank needs is an address, a token and its number; all else it is told by rank 0 over the connections that it makes (`runtime.rank`).
So a launcher for several machines (Ray's: an actor for each rank, which calls `runtime.rank.run`) brings these two classes, and nothing
else changes.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol

import torch

from baton.cluster.machine import die_with_parent

TOKEN = "BATON_RANK_TOKEN"
_END_S = 5.0


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

    def start(self, rank: int, address: str, token: str) -> Rank: ...


class LocalRank:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def exit_code(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LocalLauncher:
    """Ranks write to this process's stderr, die with it, and do not hear a terminal's Ctrl-C, which is for rank 0 to answer. Rank i has the
    i-th of this process's GPUs: it sees them all, that one first, so that all its threads use it without being told."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # for this process's part, too
            os.environ.setdefault(name, "lo")

    def start(self, rank: int, address: str, token: str) -> LocalRank:
        command = [sys.executable, "-m", "baton.runtime.rank", address, str(rank)]
        environment = {**os.environ, TOKEN: token, **_devices(rank)}
        die = functools.partial(die_with_parent, os.getpid())
        return LocalRank(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, preexec_fn=die))


def _devices(rank: int) -> Mapping[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[rank:] + names[:rank])} if len(names) > rank else {}
