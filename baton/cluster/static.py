"""StaticMembership: a fixed list of addresses, for a machine without etcd. Who answers is a member; who is silent for a lease is not."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.cluster.membership import View
from baton.errors import BatonError
from baton.types import Member

logger = logging.getLogger(__name__)
_INTERVAL_S = 0.5


class StaticMembership:
    def __init__(self, addresses: Sequence[str], probe: Callable[[str], Awaitable[Member]], *, lease_s: float) -> None:
        """`probe` asks an address who it is; it raises a BatonError, soon, where nobody answers."""
        self._addresses, self._probe, self._lease_s = tuple(addresses), probe, lease_s
        self._seen: dict[str, tuple[Member, float]] = {}

    async def join(self, member: Member) -> None:
        """Nothing to announce: the list is fixed, and others probe."""

    async def leave(self) -> None:
        pass

    async def watch(self) -> AsyncIterator[View]:
        """Each address is asked by itself: one that hangs, or answers what nobody understands, hides no other."""
        answered = asyncio.Event()
        tasks = [asyncio.create_task(self._ask(address, answered), name=f"probe-{address}") for address in self._addresses]
        last: dict[str, Member] | None = None
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_INTERVAL_S):
                        await answered.wait()
                answered.clear()
                now = time.monotonic()
                view = {member.id: member for member, seen in self._seen.values() if now - seen < self._lease_s}
                if view != last:
                    last = view
                    yield dict(view)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        pass

    async def _ask(self, address: str, answered: asyncio.Event) -> None:
        told = ""
        while True:
            try:
                self._seen[address] = (await self._probe(address), time.monotonic())
                answered.set()
            except BatonError:
                pass
            except Exception as error:
                if told != repr(error):
                    told = repr(error)
                    logger.warning("who is at %s cannot be read: %s", address, told)
            await asyncio.sleep(_INTERVAL_S)
