"""Fetch a block or compute it: whichever is predicted to take less time, at rates that are learned from what fetching and computing took.

A tier that was judged too slow is not measured any more; so that it can recover, what is known of it *ages*: its predicted seconds halve
every HALF_LIFE_S, until it is tried again. Knows nothing of stores and engines.
"""

import time
from collections import deque
from collections.abc import Sequence

NUM_SAMPLES = 15
HALF_LIFE_S = 30.0


class Pace:
    """Seconds per unit of some work: the median of the latest samples, weighted by their amounts, so that neither a hiccup nor a tiny call
    counts for much; of two equal halves the faster. One thread adds, any may read."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=NUM_SAMPLES)  # seconds per unit, amount
        self._median: tuple[float, float] | None = None  # and when it was measured

    def add(self, amount: float, seconds: float) -> None:
        if amount <= 0:
            return
        self._samples.append((seconds / amount, amount))
        ordered, below = sorted(self._samples), 0.0
        half = sum(weight for _, weight in ordered) / 2
        for rate, weight in ordered:
            below += weight
            if below >= half:
                self._median = (rate, time.monotonic())
                return

    @property
    def per_unit(self) -> float | None:
        """Seconds; None before the first sample."""
        return None if self._median is None else self._median[0]

    @property
    def aged(self) -> float:
        """Seconds per unit, the more hopeful the longer nothing was measured; 0 before the first sample."""
        if self._median is None:
            return 0.0
        rate, measured = self._median
        return float(rate * 0.5 ** ((time.monotonic() - measured) / HALF_LIFE_S))


def num_to_fetch(fetch_s: Sequence[float], compute_s: float, wait_s: float) -> int:
    """How many of the leading blocks to fetch, so that all of them are there soonest; of equals, the most.

    `fetch_s` are seconds for each block, in order, `compute_s` seconds to compute one. Computing begins when all is fetched, but not before
    `wait_s`, when the engine is through with what waits already:   max(fetched, wait) + (what is left) · compute_s.
    """
    best, fetched = 0, 0.0
    best_s = wait_s + len(fetch_s) * compute_s
    for count, seconds in enumerate(fetch_s, 1):
        fetched += seconds
        total_s = max(fetched, wait_s) + (len(fetch_s) - count) * compute_s
        if total_s <= best_s:
            best, best_s = count, total_s
    return best
