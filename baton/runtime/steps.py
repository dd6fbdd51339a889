"""Steps: what was decided is submitted to the runner, and what it has computed is taken in. Belongs to the engine's thread.

Where the runner can hold more than one step, the next one is decided and submitted while the device computes (see Request's pending
tokens). Blocks that become free meanwhile may still be written by steps in flight: later steps come after those anyway, and loads from
the pool wait for them (`Flights.after`).

A step that raises fails the requests in it, and nobody else.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from baton.errors import BatonError, InternalError
from baton.runtime.flights import DeviceLost, Flights, Runner
from baton.runtime.pace import PaceLearner, Stopwatch
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.scheduling.request import Request, RequestStatus
from baton.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Steps:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        flights: Flights,
        pace: PaceLearner,
        *,
        cores: int,
        elsewhere: Callable[[], AbstractContextManager[None]],
        meanwhile: Callable[[], None],
        on_computed: Callable[[ScheduledRequest, StepResult, bool], None],
        on_failed: Callable[[Request, BatonError], None],
        on_step: Callable[[StepPlan, float], None],
    ) -> None:
        """`cores`: see `pace.Stopwatch`. `elsewhere` is entered while the runner is, and `meanwhile` called when its device is at work.
        `on_computed` is told of each request of a step that has ended, and whether it still has the blocks that it had in it; `on_step` of
        the step, and its seconds by the clock."""
        self._scheduler, self._runner, self._flights, self._pace, self._watch = scheduler, runner, flights, pace, Stopwatch(cores)
        self._elsewhere, self._meanwhile = elsewhere, meanwhile
        self._on_computed, self._on_failed, self._on_step = on_computed, on_failed, on_step

    def run(self, plan: StepPlan) -> bool:
        """Submits the step, if there is one, and takes in those that are to end first. False where there was nothing to do. Raises
        DeviceLost."""
        if plan.scheduled:
            self._submit(plan)
        elif not self._flights:
            return False
        if self._runner.depth:
            self._meanwhile()
        ahead = self._runner.depth if plan.scheduled and not plan.needs_history else 0
        while len(self._flights) > ahead:
            self._collect()
        return True

    def _submit(self, plan: StepPlan) -> None:
        if not self._flights:
            self._watch.start()
        try:
            with self._elsewhere():
                result = self._runner.submit(plan)
        except DeviceLost:
            raise
        except Exception as error:
            self._failed(plan, error)
            return
        self._flights.add(plan, result)
        self._scheduler.advance(plan)

    def _collect(self) -> None:
        """Takes in the oldest step in flight."""
        flight = self._flights.oldest()
        plan = flight.plan
        try:
            with self._elsewhere():
                result = flight.result()
        except DeviceLost:
            raise
        except Exception as error:
            self._failed(plan, error)
        else:
            live = [item for item in plan.scheduled if item.request.status is not RequestStatus.FINISHED]
            kept = {item.request for item in live if item.block_ids is item.request.block_ids}  # not preempted meanwhile
            self._scheduler.update(plan, result)
            for item in live:
                self._on_computed(item, result, item.request in kept)
            elapsed_s, own_s = self._watch.lap()
            self._pace.observe(plan, own_s, elapsed_s)
            self._on_step(plan, elapsed_s)
        self._flights.ended()

    def _failed(self, plan: StepPlan, error: Exception) -> None:
        logger.error("a step of %d requests failed", len(plan.scheduled), exc_info=error)
        for item in plan.scheduled:
            if item.request.status is not RequestStatus.FINISHED:
                self._on_failed(item.request, InternalError(f"the engine failed in a step: {type(error).__name__}: {error}"))
