"""Breakers: open after failures, try once, close."""

from services.router.breakers import Breakers
from tests.unit.clock import Clock


def test_a_breaker_opens_tries_once_and_closes() -> None:
    clock = Clock()
    breakers = Breakers(lambda worker: "1", failures=3, try_s=5.0, clock=clock)
    for _ in range(2):
        breakers.failed("w", "1")
    breakers.succeeded("w", "1")
    for _ in range(2):
        assert not breakers.failed("w", "1")
    assert breakers.open() == []
    assert breakers.failed("w", "1")
    assert breakers.open() == ["w"]
    breakers.failed("w", "1")  # was on its way there
    clock.now = 1.01
    assert breakers.open() == []
    breakers.asked("w", "1", "a")
    assert breakers.open() == ["w"]  # one tries
    breakers.failed("w", "1")
    clock.now += 1.5
    assert breakers.open() == ["w"]  # for two seconds now
    clock.now += 0.6
    breakers.asked("w", "1", "b")
    clock.now += 5.1
    assert breakers.open() == []  # nothing was heard of it: another may try
    breakers.asked("w", "1", "c")
    breakers.succeeded("w", "1")
    assert breakers.open() == []
    assert not breakers.failed("w", "1")


def test_one_that_went_elsewhere_leaves_it_to_the_next_to_try() -> None:
    clock = Clock()
    breakers = Breakers(lambda worker: "1", failures=1, clock=clock)
    breakers.failed("w", "1")
    breakers.released("w", "1", "a")  # was on its way there: it is no try
    assert breakers.open() == ["w"]
    clock.now += 1.1
    breakers.asked("w", "1", "a")
    breakers.released("w", "1", "another")
    assert breakers.open() == ["w"]
    breakers.released("w", "1", "a")
    assert breakers.open() == []
    breakers.asked("w", "1", "b")
    breakers.released("w", "1", "a")
    assert breakers.open() == ["w"]
    breakers.failed("w", "1")
    breakers.released("w", "1", "b")  # it is known by now
    clock.now += 1.1
    assert breakers.open() == ["w"]


def test_a_successor_starts_anew() -> None:
    instances = {"w": "1"}
    breakers = Breakers(instances.get, failures=1)
    breakers.failed("w", "1")
    assert breakers.open() == ["w"]
    del instances["w"]
    assert breakers.open() == []  # nobody is left alone who is not there
    instances["w"] = "2"
    assert breakers.open() == []
    breakers.failed("w", "1")  # was on its way there
    assert breakers.open() == []
    breakers.failed("w", "2")
    breakers.failed("w", "1")
    assert breakers.open() == ["w"]
    breakers.succeeded("w", "2")
    assert breakers.open() == []
