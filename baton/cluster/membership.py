"""Membership: who is in the cluster. A Protocol, and the in-memory twin that ships with the product.

Level-triggered: `watch` yields whole views, never deltas, so a reader that missed one has missed nothing. A view survives its source:
while etcd is away the last one stays in force.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from baton.types import Member

View = Mapping[str, Member]
"""Members by id."""


class Membership(Protocol):
    async def join(self, member: Member) -> None:
        """Announces `member`, or what has changed about it, and keeps it announced until `leave`; comes back by itself after losing the
        lease (a paused process, an etcd restart). Returns once announced, or raises MembershipError; ConfigError where it is refused."""
        ...

    async def leave(self) -> None:
        """Withdraws what was joined. Never raises: an unreachable etcd forgets us when the lease ends."""
        ...

    def watch(self) -> AsyncIterator[View]:
        """The view now, then each time that it changes."""
        ...

    async def close(self) -> None: ...


class InMemoryMembership:
    """Members of one process, for tests. Every instance that shares a `hub` sees the others."""

    def __init__(self, hub: dict[str, Member] | None = None) -> None:
        self._hub = {} if hub is None else hub
        self._joined: str | None = None
        self._closed = False

    async def join(self, member: Member) -> None:
        self._hub[member.id] = member
        self._joined = member.id

    async def leave(self) -> None:
        if self._joined is not None:
            self._hub.pop(self._joined, None)

    async def watch(self) -> AsyncIterator[View]:
        seen: dict[str, Member] | None = None
        while not self._closed:
            if seen != self._hub:
                seen = dict(self._hub)
                yield seen
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._closed = True
        await self.leave()
