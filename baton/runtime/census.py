"""Census: what a worker has in hand, for the routers. Requests are counted from the moment that they were submitted, since the step which
keeps the engine from taking them in may be long."""

import queue
from collections.abc import Callable, Mapping

from baton.runtime.entry import Entry
from baton.runtime.flights import Flights
from baton.scheduling.backlog import Backlog
from baton.scheduling.request import RequestStatus
from baton.scheduling.scheduler import Scheduler
from baton.types import Load, Pace, Tier


class Census:
    """`arrives` belongs to the event loop, all else to whoever has the engine's state (`StatePublisher.lock`)."""

    def __init__(
        self,
        scheduler: Scheduler,
        entries: Mapping[str, Entry],
        pace: Callable[[], Pace],
        flights: Flights,
        fetching: Callable[[], tuple[tuple[Tier, float], ...]] = tuple,
    ) -> None:
        """`entries`: the requests that the engine has taken in. `flights`: what is in them the scheduler takes for computed.
        `fetching`: see `Load.fetch_token_s`."""
        self._scheduler, self._entries, self._pace, self._flights = scheduler, entries, pace, flights
        self._fetching, self._backlog = fetching, Backlog(scheduler.cache)
        self._arriving: dict[Entry, None] = {}  # in the engine's inbox
        self._arrived: queue.SimpleQueue[str] = queue.SimpleQueue()  # not told to the routers yet

    def arrives(self, entry: Entry) -> None:
        self._arriving[entry] = None
        self._arrived.put(entry.request.request_id)

    def taken_in(self, entry: Entry) -> None:
        self._arriving.pop(entry, None)

    def take_arrived(self) -> list[str]:
        """Ids of requests that `measure` counts from now on; each once."""
        return [self._arrived.get_nowait() for _ in range(self._arrived.qsize())]

    def measure(self) -> Load:
        pool = self._scheduler.cache.pool
        inside = [entry for entry in (*self._entries.values(), *self._arriving) if not entry.is_computed]
        own = [entry.request for entry in inside if not entry.is_held]
        running = [request for request in own if request.status in (RequestStatus.RUNNING, RequestStatus.ENDING)]
        tokens, pairs = self._backlog.measure(own)
        for item in (item for plan in self._flights.plans() for item in plan.scheduled if item.num_new_tokens > 1):
            if item.request.finish_reason is None:
                tokens += item.num_new_tokens
                pairs += (item.end**2 - item.start**2) // 2
        return Load(
            num_running=len(running),
            num_waiting=len(inside) - len(running),
            num_held=len(inside) - len(own),
            num_waiting_tokens=tokens,
            num_waiting_pairs=pairs,
            num_context_tokens=sum(request.num_computed_tokens for request in running),
            num_steps=self._flights.num_ended,
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            pace=self._pace(),
            fetch_token_s=self._fetching(),
        )
