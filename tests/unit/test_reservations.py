"""Reservations on the receiving side: who waits for room, and for how long."""

from typing import Any

from baton.kv.push import Door
from baton.runtime.loading import Feed
from baton.runtime.pushing import Reservations
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request
from baton.types import GenerateRequest, PushTarget, SamplingParams

SIZE, BLOCKS = 4, 16


class Receiver:
    doors, revocable = (Door("m", (("tcp", "s"),), 0, 1),), True

    def advance(self) -> None: ...

    def fence(self) -> None: ...

    def close(self) -> None: ...


def feed(number: int, num_blocks: int) -> Feed:
    tokens = tuple(range(1000 * number, 1000 * number + SIZE * num_blocks))
    request = GenerateRequest(request_id=str(number), prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1))
    inner = Request.create(request, eos_token_ids=frozenset(), max_model_len=10**6, block_size=SIZE, arrival=0.0)
    return Feed(inner, hold=True, await_saves=False, num_tokens=len(tokens), num_blocks=num_blocks, looked_up=True)


def reservations(patience_s: float) -> tuple[Reservations, KVCache]:
    cache = KVCache(BLOCKS, SIZE)
    made = Reservations(cache, Receiver(), after_steps=lambda action: action(), patience_s=patience_s)
    return made, cache


def test_who_finds_no_room_waits_for_it_in_order() -> None:
    made, cache = reservations(60.0)
    answers: list[tuple[int, PushTarget | None]] = []
    feeds = [feed(number, 6) for number in range(3)]
    for number, each in enumerate(feeds):
        made.reserve(each, lambda target, number=number: answers.append((number, target)))
    assert [number for number, _ in answers] == [0]  # half of all blocks at most, beside one request
    made.serve()
    assert len(answers) == 1
    [(_, first)] = answers
    assert first is not None
    made.settle(first.lease)
    made.serve()
    assert [number for number, _ in answers] == [0, 1]
    feeds[2].closed = True
    second = answers[1][1]
    assert second is not None
    made.settle(second.lease)
    made.serve()
    assert answers[2] == (2, None)  # its request has ended meanwhile
    assert cache.pool.num_free == BLOCKS


def test_nobody_waits_for_long(monkeypatch: Any) -> None:
    made, cache = reservations(2.0)
    clock = [0.0]
    monkeypatch.setattr("baton.runtime.pushing.time.monotonic", lambda: clock[0])
    cache.pool.take(BLOCKS - 2)
    answers: list[PushTarget | None] = []
    made.reserve(feed(0, 6), answers.append)
    made.reserve(feed(1, 1), answers.append)
    assert answers == []
    assert made.next_deadline == 2.0  # until when the engine may sleep
    clock[0] = 2.5
    made.serve()
    assert answers[0] is None
    assert answers[1] is not None  # there is room for the second
