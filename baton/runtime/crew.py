"""Crew: rank 0's side of the ranks that share a model. It starts them, tells them each step, calls them, and ends with them.

    rank 0: scheduler, tokens, serving         rank 1 … n - 1 (`runtime.rank`)
    step ──arrays──▶ steps ──────────────────▶ the same forward pass on their share; they meet in all-reduces
    call ──────────▶ calls ◀─────────────────▶ what moves their KV (`runtime.spread`)

A rank that dies, or fails in a step, leaves the others in the middle of one: nothing mends that, so this process ends at once, and with it
all ranks; peers see broken streams, and a supervisor starts the worker again. The other way round, ranks end when their connections do.
"""

import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from baton.config import WorkerConfig
from baton.errors import EXIT_SOFTWARE, BatonError, ConfigError, InternalError, error_classes, exit_code
from baton.parallel.group import ALONE, Group, TorchGroup
from baton.parallel.link import Channel, Link, Listener, pack_step
from baton.runtime.launch import Launcher

logger = logging.getLogger(__name__)
ASK_S = 30.0  # that a rank has to answer
START_S = 300.0  # that ranks have to connect: what imports torch for the first time may take minutes
Heard = Callable[[Any, BatonError | None], None]


class Team(Protocol):
    """The other ranks, as those see them who compute and move KV."""

    @property
    def others(self) -> Sequence[int]: ...

    def join(self, device: torch.device) -> Group:
        """The group of those that share the model. Waits for all. Once."""
        ...

    def step(self, arrays: Mapping[str, np.ndarray], graphed: bool) -> AbstractContextManager[None]:
        """Has the other ranks compute what is computed inside."""
        ...

    def call(self, rank: int, name: str, arguments: Mapping[str, Any], heard: Heard) -> None:
        """`heard` gets each answer, or an error, on another thread."""
        ...

    def ask(self, name: str, *, within_s: float = ASK_S, **arguments: Any) -> list[Any]:
        """All other ranks, together; waits for their one answer. Raises BatonError."""
        ...


class Solo:
    """There are no other ranks."""

    @property
    def others(self) -> Sequence[int]:
        return ()

    def step(self, arrays: Mapping[str, np.ndarray], graphed: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def call(self, rank: int, name: str, arguments: Mapping[str, Any], heard: Heard) -> None:
        raise AssertionError("there is nobody to call")

    def ask(self, name: str, *, within_s: float = ASK_S, **arguments: Any) -> list[Any]:
        return []

    def join(self, device: torch.device) -> Group:
        return ALONE

    def ready(self, fingerprint: str) -> None:
        pass

    def close(self) -> None:
        pass


class Crew:
    def __init__(self, config: WorkerConfig, launcher: Launcher) -> None:
        """Starts `config.engine.tensor_parallel_size` - 1 ranks and waits until they are connected. Raises InternalError where one
        ends before, or takes too long: it has been told nothing that it could refuse."""
        size = config.engine.tensor_parallel_size
        self.others = range(1, size)
        self._size, self._closing, self._launcher = size, False, launcher
        listener = Listener(launcher.host)
        self._ranks = {rank: launcher.start(rank, listener.address, listener.token) for rank in self.others}
        channels: tuple[Channel, ...] = ("steps", "calls")
        try:
            links = listener.accept({(rank, channel) for rank in self.others for channel in channels}, self._check, START_S)
        finally:
            listener.close()
        self._steps = [links[rank, "steps"] for rank in self.others]
        self._calls = {rank: links[rank, "calls"] for rank in self.others}
        self._server = socket.create_server((launcher.host, 0))
        self._address = f"{launcher.host}:{self._server.getsockname()[1]}"
        self._numbers, self._heard = itertools.count(1), dict[int, Heard]()
        self._ready: dict[int, Future[str]] = {rank: Future() for rank in self.others}
        for rank, link in self._calls.items():
            link.send_json({"config": config.model_dump(mode="json"), "group": self._address, "apart": launcher.apart})
            threading.Thread(target=self._listen, args=(rank, link), name=f"rank-{rank}", daemon=True).start()

    def join(self, device: torch.device) -> Group:
        return TorchGroup(0, self._size, self._address, device, self._server)

    def ready(self, fingerprint: str) -> None:
        """Waits until all ranks have loaded their share. Raises ConfigError where that is of other weights than rank 0's."""
        for rank, future in self._ready.items():
            if future.result() != fingerprint:
                raise ConfigError(f"rank {rank} of {self._size} has another model than rank 0 at the same path; all machines need the same")

    @contextmanager
    def step(self, arrays: Mapping[str, np.ndarray], graphed: bool) -> Iterator[None]:
        try:
            message = pack_step(arrays, graphed)
            for link in self._steps:
                link.send(message)
            yield
        except Exception as error:
            logger.exception("a step has failed")
            self._end(f"rank 0 has failed in a step that other ranks are in ({type(error).__name__})")
            raise

    def call(self, rank: int, name: str, arguments: Mapping[str, Any], heard: Heard) -> None:
        number = next(self._numbers)
        self._heard[number] = heard
        self._calls[rank].send_json({"call": number, "name": name, "arguments": arguments})

    def ask(self, name: str, *, within_s: float = ASK_S, **arguments: Any) -> list[Any]:
        futures: list[Future[Any]] = []
        deadline = time.monotonic() + within_s
        for rank in self.others:
            future: Future[Any] = Future()
            futures.append(future)
            self.call(rank, name, arguments, lambda value, error, future=future: _settle(future, value, error))
        try:
            return [future.result(max(deadline - time.monotonic(), 0.0)) for future in futures]
        except TimeoutError as error:
            raise InternalError(f"a rank has not answered to {name} for {within_s:.3g} s") from error

    def close(self) -> None:
        """Ends the ranks. Idempotent."""
        self._closing = True
        for link in (*self._steps, *self._calls.values()):
            link.close()
        for rank in self._ranks.values():
            rank.end()
        self._launcher.close()

    def _check(self) -> None:
        for number, rank in self._ranks.items():
            code = rank.exit_code()
            if code is not None:
                raise InternalError(
                    f"rank {number} of {self._size} has ended before it connected (exit code {code}); what it says stands above"
                )

    def _listen(self, rank: int, link: Link) -> None:
        """What one rank says, until its end."""
        try:
            while (message := link.receive_json()) is not None:
                if "call" in message:
                    self._answered(message)
                elif "error" in message:
                    self._refused(rank, message)
                else:
                    self._ready[rank].set_result(message["ready"])
        except Exception:  # somebody waits for what this would have told
            logger.exception("what rank %d has said could not be told", rank)
            self._end(f"rank {rank} is not understood")
        if not self._closing:
            self._end(f"rank {rank} has died")

    def _answered(self, message: Mapping[str, Any]) -> None:
        heard = self._heard[message["call"]]
        if message["last"]:
            del self._heard[message["call"]]
        heard(message.get("value"), _error(message))

    def _refused(self, rank: int, message: dict[str, Any]) -> None:
        """A rank can't start. Rank 0 may be waiting for it where nothing wakes it up, so it ends here."""
        error = _error(message)
        assert error is not None
        print(f"rank {rank} of {self._size}: {error.message}", file=sys.stderr, flush=True)
        os._exit(exit_code(error))

    def _end(self, why: str) -> None:
        logger.critical("%s; this worker ends, with all its ranks", why)
        os._exit(EXIT_SOFTWARE)


def _error(message: Mapping[str, Any]) -> BatonError | None:
    if "error" not in message:
        return None
    code, text = message["error"]
    return error_classes().get(code, InternalError)(text)


def _settle(future: Future[Any], value: Any, error: BatonError | None) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
