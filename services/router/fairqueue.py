"""FairQueue: requests that wait for their turn, and whose turn it is. Knows no clock and waits for nothing.

    priority              the lowest number first, always
    then fair share       the tenant that has been served the least for its weight (Sheng et al., "Fairness in Serving Large Language
                          Models", OSDI 2024: a virtual counter of tokens per tenant)
    then deadline         within a tenant the earliest, then arrival

Two tenants that both wait all the time are served in proportion to their weights, within one request of each. Who comes back after having
had nothing to ask does not get the past back: its counter is lifted to the lowest of those that wait.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_arrivals = itertools.count()


@dataclass(slots=True, eq=False)
class Waiting:
    tenant: str
    cost: float  # tokens
    weight: float = 1.0
    priority: int = 0
    deadline: float = math.inf
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def key(self) -> tuple[float, int]:
        return self.deadline, self.arrival


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    def __init__(self) -> None:
        self._levels: dict[int, dict[str, list[W]]] = {}  # priority → tenant → by deadline; nothing in it is empty
        self._served: dict[str, float] = {}  # tenant → tokens / weight
        self._last = ""  # tenant served
        self._count = 0

    def __len__(self) -> int:
        """Also on another thread."""
        return self._count

    def __iter__(self) -> Iterator[W]:
        return (waiting for level in self._levels.values() for queue in level.values() for waiting in queue)

    def push(self, waiting: W) -> None:
        self._served[waiting.tenant] = self._lifted(waiting.tenant)
        queue = self._levels.setdefault(waiting.priority, {}).setdefault(waiting.tenant, [])
        bisect.insort(queue, waiting, key=lambda each: each.key)
        self._count += 1

    def first(self) -> W | None:
        """Whose turn it is."""
        if not self._levels:
            return None
        level = self._levels[min(self._levels)]
        return level[min(level, key=lambda name: (self._served[name], level[name][0].key))][0]

    def take(self, waiting: W) -> None:
        """It goes; the tenant is charged for it."""
        self.remove(waiting)
        self._served[waiting.tenant] += waiting.cost / waiting.weight
        self._last = waiting.tenant

    def remove(self, waiting: W) -> bool:
        """Whether it was still there."""
        level = self._levels.get(waiting.priority, {})
        queue = level.get(waiting.tenant, [])
        place = bisect.bisect_left(queue, waiting.key, key=lambda each: each.key)
        if place == len(queue) or queue[place] is not waiting:
            return False
        del queue[place]
        self._count -= 1
        if not queue:
            del level[waiting.tenant]
        if not level:
            del self._levels[waiting.priority]
        return True

    def correct(self, waiting: W, cost: float) -> None:
        """What was taken has cost this, not what was thought."""
        self._served[waiting.tenant] += (cost - waiting.cost) / waiting.weight

    def last(self, newcomer: W) -> W:
        """Who has to go where there is no room for all: of the least urgent, and of them of the tenant that has the most waiting for its
        weight, the last one. The newcomer counts as one of them."""
        lowest = max([*self._levels, newcomer.priority])
        queues = {name: list(queue) for name, queue in self._levels.get(lowest, {}).items()}
        if newcomer.priority == lowest:
            bisect.insort(queues.setdefault(newcomer.tenant, []), newcomer, key=lambda each: each.key)
        heaviest = max(queues.values(), key=lambda queue: (sum(each.cost for each in queue) / queue[0].weight, queue[-1].key))
        return heaviest[-1]

    def ahead(self, newcomer: W) -> float:
        """Tokens that will be served before it, if nobody else comes."""
        more_urgent = sum(w.cost for p, level in self._levels.items() if p < newcomer.priority for queue in level.values() for w in queue)
        level = self._levels.get(newcomer.priority, {})
        own = sum(w.cost for w in level.get(newcomer.tenant, []) if w.key < newcomer.key)
        counter = self._lifted(newcomer.tenant)
        others = 0.0
        for tenant, queue in level.items():
            if tenant != newcomer.tenant:  # gets its share while the own ones ahead are served, and what it is behind
                share = (own / newcomer.weight + counter - self._served[tenant]) * queue[0].weight
                others += min(max(share, 0.0), sum(w.cost for w in queue))
        return more_urgent + own + others

    def _lifted(self, tenant: str) -> float:
        """Its counter, were it to wait now."""
        served, waiting = self._served.get(tenant, 0.0), {name for level in self._levels.values() for name in level}
        if tenant in waiting:
            return served
        lowest = min((self._served[name] for name in waiting), default=self._served.get(self._last, 0.0))
        return max(served, lowest)
