"""BlockPool, KVCache and Scheduler, by themselves."""

import pytest

from baton.hashing import block_hashes
from baton.scheduling.blocks import BlockPool
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepPlan, StepResult
from baton.scheduling.request import Request, RequestStatus
from baton.scheduling.scheduler import Scheduler
from baton.types import BlocksRemoved, BlocksStored, FinishReason, GenerateRequest, OutputToken, SamplingParams


def make_request(name: str, length: int, *, max_tokens: int = 4, first: int = 0, block_size: int = 4) -> Request:
    request = GenerateRequest(
        request_id=name, prompt_token_ids=tuple(range(first, first + length)), sampling=SamplingParams(max_tokens=max_tokens, temperature=0)
    )
    return Request.create(request, eos_token_ids=frozenset({999}), max_model_len=1000, block_size=block_size, arrival=0.0)


def make_scheduler(num_blocks: int = 16, *, budget: int = 64, seqs: int = 8, caching: bool = True) -> Scheduler:
    return Scheduler(KVCache(num_blocks, 4, prefix_caching=caching), max_num_batched_tokens=budget, max_num_seqs=seqs)


def step(scheduler: Scheduler, token: int = 7) -> StepPlan:
    plan = scheduler.schedule()
    tokens = {item.request.request_id: OutputToken(token) for item in plan.scheduled if item.samples}
    scheduler.advance(plan)
    scheduler.update(plan, StepResult(tokens))
    held = [request.block_ids for request in scheduler.running]
    assert scheduler.cache.pool.check_integrity([*held, *scheduler.cache.pinned()]) == []
    return plan


def counts(plan: StepPlan) -> dict[str, int]:
    return {item.request.request_id: item.num_new_tokens for item in plan.scheduled}


def test_least_recently_freed_blocks_are_evicted_first_and_uncached_ones_before_them() -> None:
    pool = BlockPool(4)
    a, b, c = pool.take(1), pool.take(1), pool.take(1)
    pool.register(a, [b"a"])
    pool.register(b, [b"b"])
    pool.release(b)
    pool.release(a)
    pool.release(c)  # carries no hash
    assert pool.take(2) == [*c, 3]
    assert pool.take(1) == b
    assert pool.find([b"a"]) == a
    assert pool.find([b"b"]) == []
    assert pool.drain_events() == [BlocksStored((b"a",)), BlocksStored((b"b",)), BlocksRemoved((b"b",))]


def test_a_reused_block_is_not_evicted() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    pool.register(blocks, [b"x", b"y"])
    pool.release(blocks)
    pool.reuse(blocks[:1])
    assert pool.num_free == 1
    assert pool.take(1) == blocks[1:]
    assert pool.find([b"x", b"y"]) == blocks[:1]


def test_integrity_check_finds_a_leak_and_a_double_holder() -> None:
    pool = BlockPool(3)
    (block,) = pool.take(1)
    assert pool.check_integrity([[block]]) == []
    assert any("1 references, 0 holders" in problem for problem in pool.check_integrity([]))
    assert any("1 references, 2 holders" in problem for problem in pool.check_integrity([[block], [block]]))


def test_releasing_too_often_is_a_bug() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError):
        pool.release([0])


def test_long_prompts_are_chunked_and_do_not_hold_up_those_that_generate() -> None:
    scheduler = make_scheduler(budget=8)
    scheduler.add(make_request("short", 3, max_tokens=10))
    assert counts(step(scheduler)) == {"short": 3}
    scheduler.add(make_request("long", 30, first=100))
    assert counts(step(scheduler)) == {"short": 1, "long": 7}
    assert counts(step(scheduler)) == {"short": 1, "long": 7}


def test_the_prefix_of_an_earlier_request_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 12, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", 12, max_tokens=1))
    plan = step(scheduler)
    assert counts(plan) == {"b": 4}  # the last block is computed: its last token's logits are wanted
    assert plan.scheduled[0].start == 8


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = make_scheduler(caching=False)
    for name in ("a", "b"):
        scheduler.add(make_request(name, 12, max_tokens=1))
        assert counts(step(scheduler)) == {name: 12}


def test_the_latest_request_is_preempted_and_comes_back() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=16)
    first, second = make_request("first", 7, max_tokens=8), make_request("second", 7, max_tokens=8, first=50)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(40):
        step(scheduler)
        if not scheduler.has_work:
            break
    assert scheduler.num_preemptions > 0
    assert second.num_preemptions > 0
    assert first.num_preemptions == 0
    assert [r.finish_reason for r in (first, second)] == [FinishReason.LENGTH] * 2
    assert scheduler.cache.pool.num_free == 4


@pytest.mark.parametrize("depth", [0, 1])
def test_a_long_prompt_that_does_not_fit_beside_older_requests_is_computed_once(depth: int) -> None:
    """It waits with what it has; a chunk of it may be in flight then, as steps are on a GPU."""
    scheduler = make_scheduler(num_blocks=30, budget=33)
    first, second = make_request("first", 40, max_tokens=40), make_request("second", 80, max_tokens=1, first=100)
    for request in (first, second):
        scheduler.add(request)
    flying: list[StepPlan] = []
    computed = 0
    for _ in range(200):
        plan = scheduler.schedule()
        computed += counts(plan).get("second", 0)
        scheduler.advance(plan)
        flying.append(plan)
        while len(flying) > (depth if plan.scheduled else 0):
            done = flying.pop(0)
            tokens = {item.request.request_id: OutputToken(7) for item in done.scheduled if item.samples}
            scheduler.update(done, StepResult(tokens))
        if not scheduler.has_work and not flying:
            break
    assert [request.finish_reason for request in (first, second)] == [FinishReason.LENGTH] * 2
    assert 80 <= computed <= 80 + 33, "once, but for what an older one's growth has cost"


def test_pins_stay_where_even_all_of_them_would_be_too_few() -> None:
    scheduler = make_scheduler(num_blocks=10)
    pool, cache = scheduler.cache.pool, scheduler.cache
    scheduler.add(make_request("runs", 20, max_tokens=50))
    step(scheduler)
    pushed = pool.take(3)
    pool.register(pushed, block_hashes(range(100, 112), 4))
    cache.pin("waits for its turn", pushed)
    scheduler.add(make_request("large", 36, first=500))
    step(scheduler)
    assert pushed in cache.pinned()
    assert "large" not in counts(step(scheduler))


def test_pins_are_broken_when_a_running_request_needs_the_memory() -> None:
    scheduler = make_scheduler(num_blocks=4)
    pool, cache = scheduler.cache.pool, scheduler.cache
    pinned = pool.take(3)
    pool.register(pinned, block_hashes(range(100, 112), 4))
    cache.pin("waiting", pinned)
    scheduler.add(make_request("runs", 10, max_tokens=1))
    assert counts(step(scheduler)) == {"runs": 10}
    assert cache.pinned() == []


def test_a_removed_request_frees_its_blocks_at_once() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 12)
    scheduler.add(request)
    step(scheduler)
    scheduler.remove(request)
    scheduler.remove(request)
    assert request.status is RequestStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler.cache.pool.num_free == 16


@pytest.mark.parametrize(("token", "min_tokens", "reason"), [(999, 0, FinishReason.STOP), (999, 3, None), (5, 0, FinishReason.STOP)])
def test_requests_end_by_eos_stop_ids_and_length(token: int, min_tokens: int, reason: FinishReason | None) -> None:
    request = make_request("a", 3)
    request.sampling = SamplingParams(max_tokens=4, min_tokens=min_tokens, stop_token_ids=(5,))
    request.append(token)
    assert request.finish_reason is reason
    for _ in range(3):
        if request.finish_reason is None:
            request.append(1)
    assert request.finish_reason is (reason or FinishReason.LENGTH)


def test_pins_that_cannot_be_matched_do_not_keep_their_own_request_out() -> None:
    """Two requests loaded the same prefix at once: the second one's copies carry no hash, and must not block its admission."""
    scheduler = make_scheduler(num_blocks=10)
    cache, request = scheduler.cache, make_request("b", 33, max_tokens=1)
    first, copies = cache.pool.take(4), cache.pool.take(4)
    cache.pool.register(first, request.block_hashes[:4])
    cache.pool.release(first)
    cache.pool.register(copies, request.block_hashes[:4])
    cache.pin("b", copies)
    scheduler.add(request)
    assert counts(step(scheduler)) == {"b": 17}
