"""PaceLearner: what a step takes on this worker, learned from the steps that it made. Belongs to the engine's thread.

A step's seconds are taken as linear in its prompts' tokens, in the pairs of them that attend to each other, in the requests that decode,
and in the context that they read (`types.Pace`). Least squares of the relative error, no coefficient negative; older steps fade. Steps with
and without prompts fade apart, so that an hour of decoding does not wash out what a prompt takes. Of a step that took many times what was
expected (a stopped process, a collection) the excess does not count.
"""

import contextlib
import time

from baton.scheduling.plan import StepPlan
from baton.types import Pace

KEPT = 0.98  # of what a step counts for, after one more of its kind
_RIDGE = 1e-6  # of the diagonal: decides where steps alone can't
_OUTLIER = 3.0  # times what was expected
_FADED = 1e-9  # of what steps count for: a feature that has faded so far is as if never met
_INTERVAL_S = 0.05  # between two looks at what the sums say
_SIZE = 5
_ORDER = tuple((row, column) for row in range(_SIZE) for column in range(row + 1))
_SCALE = (1.0, 1e-2, 1e-5, 1e-1, 1e-4)  # brings typical features near 1

Vector = list[float]


class _Memory:
    """Faded sums of the normal equations."""

    def __init__(self) -> None:
        self.products = [0.0] * len(_ORDER)  # the lower triangle
        self.targets = [0.0] * _SIZE

    def add(self, features: Vector, target: float, weight: float) -> None:
        weighted = [weight * value for value in features]
        self.products = [KEPT * old + weighted[row] * features[column] for old, (row, column) in zip(self.products, _ORDER, strict=True)]
        self.targets = [KEPT * old + value * target for old, value in zip(self.targets, weighted, strict=True)]


class PaceLearner:
    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._prefills, self._decodes = _Memory(), _Memory()
        self._interval_s, self._solved_at = interval_s, 0.0
        self._pace = Pace()
        self._stale = False
        self._seen = False

    @property
    def pace(self) -> Pace:
        if self._stale and (now := time.monotonic()) >= self._solved_at + self._interval_s:
            self._stale, self._solved_at = False, now
            with contextlib.suppress(ArithmeticError):  # steps that say nothing new leave what is known
                self._pace = _solve(self._prefills, self._decodes)
        return self._pace

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step of `plan` took so long. The first one is passed over: it holds what happens once."""
        if not self._seen or seconds <= 0:
            self._seen = True
            return
        tokens = pairs = rows = context = 0
        for item in plan.scheduled:
            count = item.num_new_tokens
            if count > 1:
                tokens += count
                pairs += count * (item.start + count // 2)
            else:
                rows += 1
                context += item.start
        features = [scale * value for scale, value in zip(_SCALE, (1.0, tokens, pairs, rows, context), strict=True)]
        known = self._pace  # as it was published last
        expected = known.base_s + known.token_s * tokens + known.pair_s * pairs + known.decode_s(rows, context)
        counted = min(seconds, _OUTLIER * expected) if expected and (known.token_s or not tokens) else seconds
        (self._prefills if tokens else self._decodes).add(features, counted, 1 / seconds**2)
        self._stale = True


def _solve(*memories: _Memory) -> Pace:
    """The coefficients of all sums together; those that would be negative are left out, the worst first."""
    matrix = [[0.0] * _SIZE for _ in range(_SIZE)]
    target = [0.0] * _SIZE
    for memory in memories:
        for value, (row, column) in zip(memory.products, _ORDER, strict=True):
            matrix[row][column] += value
            if row != column:
                matrix[column][row] += value
        target = [old + new for old, new in zip(target, memory.targets, strict=True)]
    used = [index for index in range(_SIZE) if matrix[index][index] > _FADED * matrix[0][0]]
    while used:
        values = _gauss(
            [[matrix[row][column] * (1 + _RIDGE * (row == column)) for column in used] for row in used], [target[i] for i in used]
        )
        worst = min(range(len(used)), key=lambda place: values[place])
        if values[worst] >= 0:
            found = dict(zip(used, values, strict=True))
            base, token, pair, row, context = (found.get(index, 0.0) * _SCALE[index] for index in range(_SIZE))
            return Pace(base_s=base, token_s=token, pair_s=pair, row_s=row, context_s=context)
        used.pop(worst)
    return Pace()


def _gauss(matrix: list[Vector], target: Vector) -> Vector:
    """The solution of a symmetric, positive definite system; `matrix` is used up."""
    size = len(target)
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            for column in range(pivot, size):
                matrix[row][column] -= factor * matrix[pivot][column]
            target[row] -= factor * target[pivot]
    for row in reversed(range(size)):
        rest = sum(matrix[row][column] * target[column] for column in range(row + 1, size))
        target[row] = (target[row] - rest) / matrix[row][row]
    return target
