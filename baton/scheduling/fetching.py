"""Fetch a block or compute it: whichever is predicted to take less time, by what fetching took from each tier, and what steps take here.

A tier that was judged too slow is not measured any more; so that it can recover, what is known of it *ages*: its predicted seconds halve
every HALF_LIFE_S, until it is tried again. Knows nothing of stores and engines.
"""

import time
from collections import deque
from collections.abc import Sequence

NUM_SAMPLES = 15
HALF_LIFE_S = 30.0


class Rate:
    """Seconds per byte of loads from a tier: the median of the latest, weighted by their bytes, so that neither a hiccup nor a tiny call
    counts for much; of two equal halves the faster. One thread adds, any may read."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=NUM_SAMPLES)  # seconds per byte, bytes
        self._median: tuple[float, float] | None = None  # and when it was measured

    def add(self, nbytes: int, seconds: float) -> None:
        if nbytes <= 0:
            return
        self._samples.append((seconds / nbytes, nbytes))
        ordered, below = sorted(self._samples), 0
        half = sum(weight for _, weight in ordered) / 2
        for rate, weight in ordered:
            below += weight
            if below >= half:
                self._median = (rate, time.monotonic())
                return

    def seconds(self, nbytes: int) -> float:
        """Predicted, the more hopefully the longer nothing was measured; 0 before the first sample."""
        if self._median is None:
            return 0.0
        rate, measured = self._median
        return float(nbytes * rate * 0.5 ** ((time.monotonic() - measured) / HALF_LIFE_S))


def num_to_fetch(fetch_s: Sequence[float], compute_s: Sequence[float], wait_s: float) -> int:
    """How many of the leading blocks to fetch, so that all of them are there soonest; of equals, the most.

    `fetch_s` and `compute_s` are seconds for each block, in order. Computing begins when all is fetched, but not before `wait_s`, when the
    engine is through with what waits already:   max(seconds fetching, wait_s) + seconds to compute what is left.
    """
    best, fetched, left = 0, 0.0, sum(compute_s)
    best_s = wait_s + left
    for count, (to_fetch, to_compute) in enumerate(zip(fetch_s, compute_s, strict=True), 1):
        fetched += to_fetch
        left -= to_compute
        total_s = max(fetched, wait_s) + left
        if total_s <= best_s:
            best, best_s = count, total_s
    return best
