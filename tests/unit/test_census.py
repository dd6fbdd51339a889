"""What routers are told of a worker's requests: each once, and only what it still has to compute itself."""

from types import SimpleNamespace

import pytest

from baton.runtime.census import Census
from baton.runtime.entry import Entry
from baton.runtime.feed import Feed
from baton.runtime.flights import Flights
from baton.runtime.state import MIN_INTERVAL_S, StatePublisher
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepResult
from baton.scheduling.request import Request, RequestStatus
from baton.scheduling.scheduler import Scheduler
from baton.types import FinishReason, GenerateRequest, OutputToken, Pace, SamplingParams, StateUpdate

LENGTH, BLOCKS = 24, 16


class Worker:
    def __init__(self) -> None:
        self.scheduler, self.entries = Scheduler(KVCache(BLOCKS, 4), max_num_batched_tokens=8, max_num_seqs=4), dict[str, Entry]()
        self.flights = Flights()
        self.census = Census(self.scheduler, self.entries, Pace, self.flights)

    def submit(self, name: str, *, hold: bool = False) -> Entry:
        whole = GenerateRequest(request_id=name, prompt_token_ids=tuple(range(LENGTH)), sampling=SamplingParams(max_tokens=2))
        request = Request.create(whole, eos_token_ids=frozenset(), max_model_len=100, block_size=4, arrival=0.0)
        entry = Entry(request, Feed(request, hold=hold, await_saves=False), SimpleNamespace(ended=False))  # type: ignore[arg-type]
        self.census.arrives(entry)
        return entry

    def take_in(self, entry: Entry) -> None:
        self.entries[entry.request.request_id] = entry
        self.census.taken_in(entry)


def test_a_request_is_counted_from_its_arrival_on() -> None:
    worker = Worker()
    entry = worker.submit("a")
    assert worker.census.take_arrived() == ["a"]
    for load in (worker.census.measure(), worker.take_in(entry) or worker.census.measure()):
        assert (load.num_waiting, load.num_waiting_tokens, load.num_waiting_pairs) == (1, LENGTH, LENGTH * LENGTH // 2)
    assert worker.census.take_arrived() == []


@pytest.mark.parametrize("taken_in", [False, True])
def test_a_prompt_that_another_worker_computes_is_no_work_here(taken_in: bool) -> None:
    worker = Worker()
    entry = worker.submit("a", hold=True)
    if taken_in:
        worker.take_in(entry)
    load = worker.census.measure()
    assert (load.num_waiting, load.num_held, load.num_waiting_tokens) == (1, 1, 0)
    entry.feed.hold = False  # nobody has computed it after all
    load = worker.census.measure()
    assert (load.num_waiting, load.num_held, load.num_waiting_tokens) == (1, 0, LENGTH)


def test_what_is_computed_and_on_its_way_is_no_work_any_more() -> None:
    worker = Worker()
    entry = worker.submit("a")
    worker.take_in(entry)
    entry.request.status, entry.request.finish_reason = RequestStatus.FINISHED, FinishReason.LENGTH
    load = worker.census.measure()
    assert (load.num_waiting, load.num_waiting_tokens, load.num_waiting_pairs) == (0, 0, 0)


class Reader:
    def __init__(self) -> None:
        self.updates: list[StateUpdate] = []

    def send(self, update: StateUpdate) -> None:
        self.updates.append(update)


def test_reports_name_who_is_counted_for_the_first_time() -> None:
    worker = Worker()
    publisher, reader = StatePublisher(worker.census, worker.scheduler.cache.pool), Reader()
    publisher.subscribe(reader)  # type: ignore[arg-type]
    now = 100.0
    publisher.publish(now)
    worker.submit("a")
    publisher.publish(now + MIN_INTERVAL_S / 2)
    told = len(reader.updates)
    assert publisher.wait(now + MIN_INTERVAL_S / 2) <= MIN_INTERVAL_S  # it will be looked at again, and soon
    publisher.measure()  # somebody else asked meanwhile: the readers do not know yet
    publisher.publish(now + 1.5 * MIN_INTERVAL_S)
    [update] = reader.updates[told:]
    assert update.arrived == ("a",)
    assert update.load.num_waiting == 1
    publisher.publish(now + 3 * MIN_INTERVAL_S)
    assert len(reader.updates) == told + 1


def test_what_a_waiting_request_will_find_cached_is_no_work() -> None:
    """What is cached as it comes; and of two that come together, what the first of them computes for both."""
    worker = Worker()
    first, second = worker.submit("a"), worker.submit("b")
    for entry in (first, second):
        worker.take_in(entry)
    shared = (LENGTH - 1) // 4 * 4
    load = worker.census.measure()
    assert load.num_waiting_tokens == LENGTH + LENGTH - shared
    assert load.num_waiting_pairs == (LENGTH**2 + LENGTH**2 - shared**2) // 2
    scheduler = worker.scheduler
    scheduler.add(first.request)
    left = LENGTH
    while scheduler.running or scheduler.waiting:  # what it has computed is seen as it is
        plan = scheduler.schedule()
        scheduler.advance(plan)
        tokens = {item.request.request_id: OutputToken(0) for item in plan.scheduled if item.samples}
        scheduler.update(plan, StepResult(tokens))
        left = max(left - 8, 1)
        if first.request.finish_reason is None:
            assert worker.census.measure().num_waiting_tokens == left + LENGTH - shared
    assert worker.census.measure().num_waiting_tokens == LENGTH - shared
    third = worker.submit("c")
    worker.take_in(third)
    assert worker.census.measure().num_waiting_tokens == 2 * (LENGTH - shared)


def test_who_leaves_before_it_is_computed_is_not_counted_on() -> None:
    worker = Worker()
    worker.take_in(first := worker.submit("a"))
    assert worker.census.measure().num_waiting_tokens == LENGTH
    del worker.entries["a"]
    assert worker.census.measure().num_waiting_tokens == 0
    worker.take_in(worker.submit("b"))
    assert worker.census.measure().num_waiting_tokens == LENGTH
    assert first.request.num_computed_tokens == 0


def test_who_counted_on_one_that_was_cancelled_is_counted_whole() -> None:
    worker = Worker()
    entries = [worker.submit(name) for name in "abc"]
    for entry in entries:
        worker.take_in(entry)
    shared = (LENGTH - 1) // 4 * 4
    assert worker.census.measure().num_waiting_tokens == LENGTH + 2 * (LENGTH - shared)
    del worker.entries["a"]
    entries[0].request.finish_reason = FinishReason.ABORT
    for _ in range(2):
        assert worker.census.measure().num_waiting_tokens == LENGTH + LENGTH - shared


def test_a_request_whose_last_step_is_in_flight_still_runs() -> None:
    worker = Worker()
    entry = worker.submit("a")
    worker.take_in(entry)
    worker.scheduler.add(entry.request)
    while entry.request.status is not RequestStatus.ENDING:
        plan = worker.scheduler.schedule()
        worker.scheduler.advance(plan)
        load = worker.census.measure()
        assert (load.num_running, load.num_waiting, load.num_context_tokens) == (1, 0, plan.scheduled[0].end)


def test_a_step_that_has_not_ended_is_still_to_be_computed() -> None:
    """Though the scheduler counts it as computed, so that the next one can be decided."""
    worker = Worker()
    entry = worker.submit("a")
    worker.take_in(entry)
    worker.scheduler.add(entry.request)
    plan = worker.scheduler.schedule()
    worker.scheduler.advance(plan)
    assert worker.census.measure().num_waiting_tokens == LENGTH - 8
    worker.flights.add(plan, lambda: StepResult({}))
    load = worker.census.measure()
    assert (load.num_waiting_tokens, load.num_waiting_pairs, load.num_steps) == (LENGTH, LENGTH * LENGTH // 2, 0)
    worker.flights.oldest()
    assert worker.census.measure() == load  # its result is waited for
    worker.flights.ended()
    load = worker.census.measure()
    assert (load.num_waiting_tokens, load.num_steps) == (LENGTH - 8, 1)
