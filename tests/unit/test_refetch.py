"""What the device has lost of a request by the time that it is admitted comes from the tiers again, once for each admission."""

import pytest

from baton.runtime.refetch import MAX_PREEMPTIONS
from baton.scheduling.request import Request, RequestStatus
from tests.properties.toy import BLOCK_SIZE
from tests.unit.test_tiers import NUM_FULL, Tiers

WHOLE = NUM_FULL * BLOCK_SIZE


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


def lose(tiers: Tiers) -> None:
    """All that the device caches and nobody holds."""
    pool = tiers.machine.engine.scheduler.cache.pool
    pool.release(pool.take(pool.num_free))


def preempted(tiers: Tiers, name: str) -> Request:
    """A running request whose KV is saved, and gone from the device."""
    request = tiers.machine.entries[name].request
    while request.status is not RequestStatus.RUNNING:
        tiers.answer()
        tiers.machine.step()
    tiers.answer()
    tiers.machine.engine.scheduler._preempt_latest()
    lose(tiers)
    return request


def test_a_request_that_was_preempted_is_fetched(tiers: Tiers) -> None:
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.machine.step()
    assert (request.status, request.num_computed_tokens) == (RequestStatus.FETCHING, 0)
    tiers.answer()
    assert (request.status, request.num_computed_tokens) == (RequestStatus.RUNNING, WHOLE)
    tiers.end(name)


def test_what_was_fetched_and_lost_in_the_queue_is_fetched_again(tiers: Tiers) -> None:
    tiers.fill(tiers.host, *range(NUM_FULL))
    name = tiers.submit()
    tiers.answer()
    entry, cache = tiers.machine.entries[name], tiers.machine.engine.scheduler.cache
    assert (entry.request.status, len(cache.match(entry.request))) == (RequestStatus.WAITING, NUM_FULL)
    cache.unpin(name)  # as for somebody who runs
    lose(tiers)
    assert tiers.end(name) == WHOLE


def test_fetching_is_decided_anew(tiers: Tiers) -> None:
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.computing_takes(1e-6)
    for tier in tiers.machine.tiers:
        tier.block_s = 1000.0
    tiers.machine.step()
    tiers.answer()
    assert (request.status, request.num_computed_tokens) == (RequestStatus.RUNNING, 0)
    tiers.end(name)


def test_others_go_on_meanwhile(tiers: Tiers) -> None:
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.machine.step()
    tiers.machine.submit(prompt=[3, 3], max_tokens=4, cut=0, hold=False, await_saves=False, push=False)
    sink, _ = tiers.machine.sinks["r2"]
    while not sink.finished:  # its own prompt is too short to be looked up
        tiers.machine.step()
    assert request.status is RequestStatus.FETCHING
    tiers.end(name)


def test_who_runs_takes_the_memory_of_who_is_fetched(tiers: Tiers) -> None:
    tiers.machine.submit(prompt=[3] * 9, max_tokens=20, cut=0, hold=False, await_saves=False, push=False)
    tiers.answer()
    tiers.machine.step()
    older = tiers.machine.entries["r1"].request
    assert older.status is RequestStatus.RUNNING
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.machine.step()
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()  # now it loads
    pool = tiers.machine.engine.scheduler.cache.pool
    taken = pool.take(pool.num_free)
    while request.status is RequestStatus.FETCHING:
        tiers.machine.step()
    assert (request.status, older.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
    pool.release(taken)
    tiers.end(name)  # whatever the call writes when it returns


def test_a_call_that_does_not_return_is_given_up(tiers: Tiers) -> None:
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.machine.step()
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()
    tiers.machine.budget_is_over()
    assert (request.status, request.num_computed_tokens, request.block_ids) == (RequestStatus.RUNNING, 0, [])
    tiers.end(name)


@pytest.mark.parametrize("works", [True, False])
def test_what_is_lost_again_and_again_is_computed(tiers: Tiers, works: bool) -> None:
    name = tiers.submit()
    for count in range(1, MAX_PREEMPTIONS + 1):
        request = preempted(tiers, name)
        assert request.num_preemptions == count
        tiers.machine.step()
        assert (request.status is RequestStatus.FETCHING) == (count < MAX_PREEMPTIONS)
        tiers.answer(works=works)
        if count < MAX_PREEMPTIONS:
            assert (request.status, request.num_computed_tokens) == (RequestStatus.RUNNING, WHOLE if works else 0)
    assert request.num_computed_tokens > WHOLE
    tiers.end(name)


def test_what_tiers_do_not_give_is_computed_at_once(tiers: Tiers) -> None:
    name = tiers.submit()
    request = preempted(tiers, name)
    tiers.machine.step()
    tiers.answer(works=False)
    assert (request.status, request.num_computed_tokens) == (RequestStatus.RUNNING, 0)
    tiers.machine.step()
    assert request.num_computed_tokens > WHOLE
    tiers.end(name)
