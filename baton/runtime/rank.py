"""A rank beside rank 0: the process that has a share of a worker's model and of its KV, and does with them what rank 0 does with its own.

    connect ─▶ told the configuration ─▶ load the share ─▶ ready ─▶ compute each step; move KV when called ─▶ rank 0 is gone: end

It decides nothing, serves nobody and knows no requests. It ends with its connection to rank 0, whatever it is doing; what it fails in, it
does not survive, since the others wait for it there.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baton.cluster.machine import die_with_parent
from baton.config import WorkerConfig
from baton.errors import EXIT_SOFTWARE, BatonError, exit_code
from baton.kv.shards import Share
from baton.parallel.group import Group, TorchGroup
from baton.parallel.link import Link, connect, unpack_step
from baton.runtime.crew import Solo
from baton.runtime.launch import TOKEN
from baton.runtime.loaded import load
from baton.runtime.rank_kv import connect_kv
from baton.runtime.spread import Handlers

logger = logging.getLogger(__name__)


class Follower(Solo):
    """One rank's place in the group: it leads nobody."""

    def __init__(self, rank: int, size: int, address: str) -> None:
        self._rank, self._size, self._address = rank, size, address

    def join(self, device: torch.device) -> Group:
        return TorchGroup(self._rank, self._size, self._address, device)


class Office:
    """Answers rank 0's calls on a thread of its own, from `open` on; ends the process when rank 0 is gone."""

    def __init__(self, calls: Link) -> None:
        self._calls = calls
        self._handlers: Handlers | None = None
        self._thread = threading.Thread(target=self._serve, name="calls", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self, handlers: Handlers, fingerprint: str) -> None:
        self._handlers = handlers
        self._calls.send_json({"ready": fingerprint})

    def _serve(self) -> None:
        try:
            while (message := self._calls.receive_json()) is not None:
                assert self._handlers is not None
                self._handlers.serve(message["name"], message["arguments"], self._answer(message["call"]))
        except Exception:
            logger.critical("a call of rank 0 has failed", exc_info=True)
            os._exit(EXIT_SOFTWARE)
        os._exit(0)

    def _answer(self, call: int) -> Callable[..., None]:
        def answer(value: Any, last: bool = True) -> None:
            failed = isinstance(value, BatonError)
            told = {"error": [value.code, value.message]} if failed else {"value": value}
            try:
                self._calls.send_json({"call": call, "last": last, **told})
            except OSError:
                pass  # rank 0 is gone: this process is ending

        return answer


def run(address: str, token: str, rank: int, host: str = "") -> None:
    """Rank `rank` of the worker whose rank 0 listens at `address`. `host`: that this machine is reached at, if it is not rank 0's. Does not
    return."""
    calls, steps = connect(address, token, rank, "calls"), connect(address, token, rank, "steps")
    setup = calls.receive_json()
    if setup is None:
        os._exit(0)
    config = WorkerConfig.model_validate(setup["config"])
    if host:
        elsewhere = {name: getattr(config, name).model_copy(update={"host": host}) for name in ("push", "pool")}
        config = config.model_copy(update=elsewhere)
    size = config.engine.tensor_parallel_size
    office = Office(calls)
    office.start()
    try:
        loaded = load(Path(config.model), config.engine, Follower(rank, size, setup["group"]))
        kv = connect_kv(config, loaded.pool, loaded.layout, Share(rank, size), loaded.fingerprint, apart=setup["apart"])
    except BatonError as error:
        calls.send_json({"error": [error.code, error.message]})
        os._exit(exit_code(error))
    office.open(Handlers(kv), loaded.fingerprint)
    gc.collect()
    gc.freeze()
    while (message := steps.receive()) is not None:
        loaded.runner.compute(*unpack_step(message))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="baton.runtime.rank", description="A rank of a worker, started by its rank 0")
    parser.add_argument("address")
    parser.add_argument("rank", type=int)
    parser.add_argument("--host", default="", help="that this machine is reached at, if it is not rank 0's")
    arguments = parser.parse_args()
    die_with_parent(int(os.environ["BATON_DIE_WITH_PARENT"]))
    for number in (signal.SIGTERM, signal.SIGINT):  # of a whole unit: rank 0 drains, and we end with it
        signal.signal(number, signal.SIG_IGN)
    form = f"%(asctime)s %(levelname)s rank {arguments.rank}[{os.getpid()}] %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    try:
        run(arguments.address, os.environ[TOKEN], arguments.rank, arguments.host)
    except Exception:
        logger.critical("this rank has failed", exc_info=True)
    os._exit(EXIT_SOFTWARE)


if __name__ == "__main__":
    main()
