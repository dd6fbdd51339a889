"""Steps between their submission and their result, and what must not happen before they have ended."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.scheduling.plan import StepPlan, StepResult


class DeviceLost(Exception):
    """A runner's device computes nothing any more."""


class Runner(Protocol):
    @property
    def depth(self) -> int:
        """How many steps may be in flight while another one is submitted: 0 where a step is computed by `submit` itself."""
        ...

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Starts the step; the answer waits for its end. Steps are computed in the order of their submission. Where either
        raises, nothing of the step is computed any more; DeviceLost, and no step will be."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was submitted."""

    number: int
    plan: StepPlan
    result: Callable[[], StepResult]


class Flights:
    """Oldest first."""

    def __init__(self) -> None:
        self._flying: deque[Flight] = deque()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()  # with the last step that each waits for
        self._count = 0

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def num_ended(self) -> int:
        return self._count - len(self._flying)

    def plans(self) -> list[StepPlan]:
        return [flight.plan for flight in self._flying]

    def add(self, plan: StepPlan, result: Callable[[], StepResult]) -> None:
        self._count += 1
        self._flying.append(Flight(self._count, plan, result))

    def oldest(self) -> Flight:
        """Counts until `ended`, which must follow."""
        return self._flying[0]

    def ended(self) -> None:
        """The oldest."""
        flight = self._flying.popleft()
        while self._waiting and self._waiting[0][0] <= flight.number:
            self._waiting.popleft()[1]()

    def after(self, action: Callable[[], None]) -> None:
        """Runs `action` once no step that flies now can write into blocks that are free by now."""
        if self._flying:
            self._waiting.append((self._flying[-1].number, action))
        else:
            action()
