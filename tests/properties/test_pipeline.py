"""Steps in flight: what may happen between a step's submission and its end. Their late writes are the toy runner's way."""

from baton.scheduling.request import PENDING, RequestStatus
from baton.types import FinishReason, GenerateRequest, SamplingParams
from tests.properties.test_engine_machine import EngineMachine
from tests.properties.toy import BLOCK_SIZE, next_token, reference


def machine(num_blocks: int = 12, budget: int = 30, seqs: int = 4) -> EngineMachine:
    made = EngineMachine()
    made.start(num_blocks=num_blocks, budget=budget, seqs=seqs, caching=True, depth=1)
    return made


def submit(made: EngineMachine, prompt: list[int], *, max_tokens: int = 6, hold: bool = False) -> str:
    made.submit(prompt=prompt, max_tokens=max_tokens, cut=0, hold=hold, await_saves=False)
    made.transfer.answer_one(True)  # the lookup
    made.run_inbox()
    return f"r{made.count}"


def test_the_next_step_is_submitted_before_the_first_has_ended() -> None:
    made = machine()
    name = submit(made, [1, 2, 3])
    made.step()
    request = made.entries[name].request
    assert request.token_ids == [1, 2, 3, PENDING]
    assert made.sinks[name][0].tokens == []
    made.step()
    assert request.token_ids == [1, 2, 3, next_token([1, 2, 3]), PENDING]
    assert made.sinks[name][0].tokens == [next_token([1, 2, 3])]
    made.teardown()


def test_a_tier_that_is_doubted_is_asked_and_not_waited_for() -> None:
    made = machine()
    made.transfer.doubtful = True
    made.submit(prompt=[1, 2, 3] * 4, max_tokens=2, cut=0, hold=False, await_saves=False)
    entry = made.entries[f"r{made.count}"]
    assert entry.feed.ready
    made.step()
    assert made.transfer.answer_one(True)  # the lookup
    made.run_inbox()
    made.transfer.doubtful = False
    made.submit(prompt=[4, 5, 6] * 4, max_tokens=2, cut=0, hold=False, await_saves=False)
    entry = made.entries[f"r{made.count}"]
    assert not entry.feed.ready
    made.teardown()


def test_a_step_counts_as_work_while_its_result_is_waited_for() -> None:
    """Routers are told meanwhile of what comes: this worker is not idle."""
    made = machine()
    submit(made, [1] * 20)
    told: list[int] = []
    compute = made.runner._compute
    made.runner._compute = lambda work: told.append(made.engine._census.measure().num_waiting_tokens) or compute(work)  # type: ignore[func-returns-value]
    made.step()
    made.step()
    assert told == [20 + 1]  # and its first token
    made.teardown()


def test_no_load_lands_in_a_block_that_a_step_in_flight_still_writes() -> None:
    """Else the late write would lie over what was loaded."""
    made = machine()
    first = submit(made, [3] * (BLOCK_SIZE - 1))
    made.step()
    prompt = [0, 1, 2, 3, 1, 2, 3, 0, 1]
    for end in (BLOCK_SIZE, 2 * BLOCK_SIZE):
        key = made_hashes(prompt, end)
        made.transfer.pool[key] = tuple(prompt[end - BLOCK_SIZE : end])
    freed = made.entries[first].request.block_ids[0]
    made.engine.abort(made.entries[first])
    made.sinks.pop(first)
    second = submit(made, prompt)
    assert made.entries[second].feed.in_flight[0] == freed
    assert not made.transfer.answer_one(True)  # it waits for the step
    made.step()
    assert made.transfer.answer_one(True)
    made.teardown()
    sink, request = made.sinks[second]
    assert sink.tokens == reference(request)


def made_hashes(prompt: list[int], end: int) -> str:
    from baton.hashing import block_hashes

    return block_hashes(prompt[:end], BLOCK_SIZE)[-1].hex()


def test_who_stops_while_its_next_step_is_in_flight_gets_no_token_more() -> None:
    made = machine()
    stop = next_token([1, 2, 3])
    made.engine._eos_token_ids = frozenset({stop})
    from baton.runtime.entry import Entry
    from baton.runtime.feed import Feed
    from baton.scheduling.request import Request
    from tests.properties.test_engine_machine import Sink

    request = GenerateRequest(request_id="s", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=9, temperature=0))
    inner = Request.create(request, eos_token_ids=frozenset({stop}), max_model_len=100, block_size=BLOCK_SIZE, arrival=0.0)
    sink = Sink()
    made.engine._admit(Entry(inner, Feed(inner, hold=False, await_saves=False), sink))  # type: ignore[arg-type]
    made.transfer.answer_one(True)
    made.run_inbox()
    for _ in range(4):
        made.step()
    assert sink.tokens == [stop]
    assert sink.finished
    assert inner.finish_reason is FinishReason.STOP
    assert inner.status is RequestStatus.FINISHED
    assert made.engine._check_integrity() == []
    made.teardown()


def test_a_request_whose_draw_needs_its_history_is_not_run_ahead() -> None:
    made = machine()
    name = submit(made, [1, 2, 3])
    made.entries[name].request.sampling = SamplingParams(max_tokens=6, temperature=0, presence_penalty=0.5)
    made.step()
    assert PENDING not in made.entries[name].request.token_ids
    assert len(made.sinks[name][0].tokens) == 1
    made.teardown()
