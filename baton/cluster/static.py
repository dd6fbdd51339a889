"""StaticMembership: a fixed list of addresses, for a machine without etcd. Who answers is a member; who is silent for a lease is not."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.cluster.membership import View
from baton.errors import BatonError
from baton.types import Member

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
        last: dict[str, Member] | None = None
        while True:
            await asyncio.gather(*(self._ask(address) for address in self._addresses))
            now = time.monotonic()
            view = {member.id: member for member, seen in self._seen.values() if now - seen < self._lease_s}
            if view != last:
                last = view
                yield dict(view)
            await asyncio.sleep(_INTERVAL_S)

    async def close(self) -> None:
        pass

    async def _ask(self, address: str) -> None:
        try:
            self._seen[address] = (await self._probe(address), time.monotonic())
        except BatonError:
            pass
