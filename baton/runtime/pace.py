"""PaceLearner: what a step takes on this worker, learned from the steps that it made. Belongs to the engine's thread.

A step's seconds are taken as linear in its prompts' tokens, in the pairs of them that attend to each other, in the requests that decode,
and in the context that they read (`types.Pace`). Least squares of the relative error, no coefficient negative; older steps fade. Steps with
and without prompts fade apart, so that an hour of decoding does not wash out what a prompt takes. Of a step that took many times what was
expected (a stopped process, a collection) the excess does not count.

Where a step is computed on cores that other processes use as well, the clock tells more of them than of it: a worker beside a busy one
takes twice as long. So its seconds are those for which its threads had the cores: the process's CPU seconds over the cores, since threads
share the work, or the engine's thread's own where they are more, since there is work that none can share (much of a step that decodes on
many cores). What the clock adds is learned apart, as one factor. Where a thread was kept from its core the engine's does some of its share,
which then looks like work that none can share: a little of the waiting counts as the step's own.
"""

import contextlib
import time

import numpy as np
from numpy.typing import NDArray

from baton.scheduling.plan import StepPlan
from baton.types import Pace

KEPT = 0.98  # of what a step counts for, after one more of its kind
_RIDGE = 1e-6  # of the diagonal: decides where steps alone can't
_OUTLIER = 3.0  # times what was expected
_FADED = 1e-9  # of what steps count for: a feature that has faded so far is as if never met
_INTERVAL_S = 0.05  # between two looks at what the sums say
_SCALE = np.array([1.0, 1e-2, 1e-5, 1e-1, 1e-4])  # brings typical features near 1

Array = NDArray[np.float64]


class Stopwatch:
    """Times steps that follow each other, by the clock and in seconds of their device. Belongs to the thread that makes them."""

    def __init__(self, cores: int) -> None:
        """`cores`: those that this process's threads compute a step on; 0: a device of its own does."""
        self._cores, self._since, self._used_s, self._own_s = cores, 0.0, 0.0, 0.0

    def start(self) -> None:
        self._since, self._used_s, self._own_s = time.monotonic(), time.process_time(), time.thread_time()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last `start` or `lap`: by the clock, and of the device."""
        since, used_s, own_s = self._since, self._used_s, self._own_s
        self.start()
        elapsed = self._since - since
        computed = max((self._used_s - used_s) / self._cores, self._own_s - own_s) if self._cores else elapsed
        return elapsed, min(elapsed, computed)


class _Memory:
    """Faded sums of the normal equations."""

    def __init__(self) -> None:
        self.matrix, self.target = np.zeros((len(_SCALE), len(_SCALE))), np.zeros(len(_SCALE))

    def add(self, features: Array, seconds: float, weight: float) -> None:
        weighted = weight * features
        self.matrix = KEPT * self.matrix + np.outer(weighted, features)
        self.target = KEPT * self.target + weighted * seconds


class PaceLearner:
    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._prefills, self._decodes = _Memory(), _Memory()
        self._interval_s, self._solved_at = interval_s, 0.0
        self._values = np.zeros(len(_SCALE))  # of the features
        self._pace = Pace()
        self._own_s = self._elapsed_s = 0.0  # faded sums
        self._stale = False
        self._seen = False

    @property
    def pace(self) -> Pace:
        if self._stale and (now := time.monotonic()) >= self._solved_at + self._interval_s:
            self._stale, self._solved_at = False, now
            with contextlib.suppress(np.linalg.LinAlgError):  # steps that say nothing new leave what is known
                self._values = _solve(self._prefills.matrix + self._decodes.matrix, self._prefills.target + self._decodes.target)
            base, token, pair, row, context = (self._values * _SCALE).tolist()
            crowded = max(self._elapsed_s / self._own_s - 1, 0.0)
            self._pace = Pace(base_s=base, token_s=token, pair_s=pair, row_s=row, context_s=context, crowded=crowded)
        return self._pace

    def observe(self, plan: StepPlan, seconds: float, elapsed_s: float | None = None) -> None:
        """A step of `plan` took so many seconds of the device, and so many by the clock, if that is not the same. The first one is passed
        over: it holds what happens once."""
        if not self._seen or seconds <= 0:
            self._seen = True
            return
        tokens, pairs, rows, context = plan.work()
        features = _SCALE * (1.0, tokens, pairs, rows, context)
        expected = float(features @ self._values)  # by what was published last
        counted = min(seconds, _OUTLIER * expected) if expected and (self._pace.token_s or not tokens) else seconds
        (self._prefills if tokens else self._decodes).add(features, counted, 1 / seconds**2)
        at_most = _OUTLIER * counted * (1 + self._pace.crowded)
        self._own_s = KEPT * self._own_s + counted
        self._elapsed_s = KEPT * self._elapsed_s + min(seconds if elapsed_s is None else elapsed_s, at_most)
        self._stale = True


def _solve(matrix: Array, target: Array) -> Array:
    """Least squares; coefficients that would be negative are left out, the worst first. Raises LinAlgError."""
    diagonal = matrix.diagonal()
    used = np.flatnonzero(diagonal > _FADED * diagonal[0])
    values = np.zeros(len(target))
    while len(used):
        found = np.linalg.solve(matrix[np.ix_(used, used)] + np.diag(_RIDGE * diagonal[used]), target[used])
        if found.min() >= 0:
            values[used] = found
            return values
        used = np.delete(used, found.argmin())
    return values
