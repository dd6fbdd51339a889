"""Breakers: workers that fail request after request, although they are there, are left alone for a while.

    closed ── `failures` in a row ──▶ open for 1 s ──▶ half open: one request tries ── first token ──▶ closed
                                        ▲                        │ fails
                                        └─ twice as long, ≤ 30 s ┘

One that tries and in the end asks another worker, or is refused because this one is full, leaves it to the next. One whose client left, or
that was overtaken, does not: the worker may hang, and then one in a while is enough.
A worker that is gone needs none: its broken stream takes it out (`workers.Workers`). Where all are open, none counts: anybody is asked.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

_FIRST_S, _LONGEST_S = 1.0, 30.0
_OLD_S = 600.0  # a failure so long ago says nothing


@dataclass(slots=True)
class _Breaker:
    failures: int = 0  # in a row
    open_s: float = 0.0  # 0: closed
    again_at: float = 0.0  # when somebody may try
    trying: str = ""  # the request that does
    failed_at: float = 0.0


class Breakers:
    """By worker and process: a successor starts anew."""

    def __init__(
        self,
        instance: Callable[[str], str | None],
        *,
        failures: int = 3,
        try_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`instance`: of a worker's process as it is now; None: it is gone. `try_s`: how long the one that tries is waited for, before
        another may."""
        self._instance, self._failures, self._try_s, self._clock = instance, failures, try_s, clock
        self._breakers: dict[tuple[str, str], _Breaker] = {}  # of those that failed last

    def open(self) -> list[str]:
        """Workers not to be asked now."""
        now = self._clock()
        return [
            worker
            for (worker, instance), breaker in self._breakers.items()
            if breaker.open_s and now < breaker.again_at and instance == self._instance(worker)
        ]

    def asked(self, worker: str, instance: str, request_id: str) -> None:
        """A request goes there. Where the breaker is half open, the others wait for what becomes of it."""
        breaker = self._breakers.get((worker, instance))
        if breaker is not None and breaker.open_s:
            breaker.again_at, breaker.trying = self._clock() + self._try_s, request_id

    def released(self, worker: str, instance: str, request_id: str) -> None:
        """The request went no further, and nothing is known by it. If it was the one that tries, another may at once."""
        breaker = self._breakers.get((worker, instance))
        if breaker is not None and breaker.trying == request_id:
            breaker.again_at, breaker.trying = self._clock(), ""

    def succeeded(self, worker: str, instance: str) -> None:
        if self._breakers:
            self._breakers.pop((worker, instance), None)

    def failed(self, worker: str, instance: str) -> bool:
        """Whether it is open now. Those that were on their way there when it opened prolong nothing, and what a process did that is gone
        says nothing of its successor."""
        if instance != self._instance(worker):
            return False
        now = self._clock()
        for key, old in list(self._breakers.items()):
            if (key[0] == worker and key[1] != instance) or now - old.failed_at > _OLD_S:
                del self._breakers[key]
        breaker = self._breakers.setdefault((worker, instance), _Breaker())
        breaker.failures, breaker.failed_at = breaker.failures + 1, now
        if breaker.trying or (not breaker.open_s and breaker.failures >= self._failures):
            breaker.open_s = min(2 * breaker.open_s, _LONGEST_S) or _FIRST_S
            breaker.again_at, breaker.trying = now + breaker.open_s, ""
        return breaker.open_s > 0
