"""EngineLeases: the event loop's side of `pushing`, see hosting.engine.Leases."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from baton.errors import Draining
from baton.runtime.pushing import Pusher, Receiver, Reservations
from baton.types import LeaseEnd

T = TypeVar("T")
Post = Callable[[Callable[[], None]], None]


async def asked(post: Post, ask: Callable[[Callable[[T], None]], None]) -> T:
    """Runs `ask` on the engine's thread and waits for what it is told, then or later."""
    answer: Future[T] = Future()

    def tell(value: T) -> None:
        if answer.set_running_or_notify_cancel():  # else who asked has gone
            answer.set_result(value)

    post(lambda: ask(tell))
    return await asyncio.wrap_future(answer)


class EngineLeases:
    def __init__(
        self, pusher: Pusher, reservations: Reservations, receiver: Receiver | None, *, post: Post, stopping: Callable[[], bool]
    ) -> None:
        self._pusher, self._reservations, self._receiver, self._post, self._stopping = pusher, reservations, receiver, post, stopping

    async def settled(self, lease: str) -> LeaseEnd:
        if self._stopping():
            raise Draining("this worker is stopping")

        def ask(tell: Callable[[LeaseEnd], None]) -> None:
            self._pusher.when_over(lease, tell)

        return await asked(self._post, ask)

    async def reserved(self, lease: str) -> bool:
        if self._stopping():
            return False

        def ask(tell: Callable[[bool], None]) -> None:
            tell(self._reservations.is_open(lease))

        return await asked(self._post, ask)

    def settle(self, lease: str) -> None:
        self._post(lambda: self._reservations.settle(lease))

    @property
    def revocable(self) -> bool:
        return self._receiver is None or self._receiver.revocable

    async def fence(self, grace_s: float) -> None:
        if self._receiver is not None and not self._stopping():
            await asyncio.to_thread(self._receiver.advance)
            await asyncio.sleep(grace_s)
            await asyncio.to_thread(self._receiver.fence)
            await asked(self._post, lambda tell: tell(self._reservations.end_old()))  # before another advance makes more look old
