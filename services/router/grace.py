"""Grace: for how long a router that goes away waits for the requests that it has. Then each ends with an error that its client can read."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from baton.errors import Draining


class Grace:
    def __init__(self) -> None:
        self.over = False
        self._limits = set[asyncio.Timeout]()

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncGenerator[None]:
        """What is inside, which must be of one task, is cancelled once the grace is over. Raises Draining then."""
        limit = asyncio.timeout(None)
        self._limits.add(limit)
        try:
            async with limit:
                if self.over:
                    limit.reschedule(0)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise Draining("this router is going away; send the request again") from None
        finally:
            self._limits.discard(limit)

    def end(self) -> None:
        self.over = True
        for limit in self._limits:
            limit.reschedule(0)
