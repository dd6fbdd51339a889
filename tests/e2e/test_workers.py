"""What goes wrong between prefill and decode workers. Whatever it is, the client gets the tokens of the reference, and nothing stays
taken."""

import asyncio
import itertools
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from baton.errors import Draining, InternalError, InvalidRequest, TransferError, WorkerLost
from baton.rpc import convert
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.runtime.flights import DeviceLost
from baton.scheduling.plan import StepPlan, StepResult
from baton.types import FinishReason, GenerateOutput, GenerateRequest, MemberState, OutputToken, PushShard, PushTarget, Role
from tests.properties.toy import BLOCK_SIZE, reference
from tests.workers import LEASE_S, Pool, PromptTransfer, Script, call, drained, failure, generate, prompt, scripted, worker

# -- what should happen


@pytest.mark.parametrize("output", [0, 5], ids=["new", "migrated"])
async def test_a_prefill_worker_computes_and_the_decode_worker_takes_over(output: int) -> None:
    pool: Pool = {}
    async with worker(Role.PREFILL, pool) as p, worker(Role.DECODE, pool) as d:
        request = prompt(output=output)
        answer = await generate(d, request, p.address)
        assert answer.tokens == reference(request)
        assert [name for name, _ in answer.decisions] == ["prefill-0"]
        assert answer.last.finish_reason is FinishReason.LENGTH
        assert answer.last.cache is not None
        assert answer.last.cache.num_prefill_tokens > 40
        again = await generate(d, request, p.address)
        assert again.tokens == reference(request)
        assert [name for name, _ in again.decisions] == [""]  # little is missing now
        for each in (p, d):
            await each.is_idle(20)


async def test_a_prefill_call_gives_one_token_whatever_was_asked() -> None:
    async with worker(Role.PREFILL, {}) as p:
        request = prompt(max_tokens=50, output=3)
        message = prefill_pb2.PrefillRequest(sequence=convert.request_to_proto(request), fingerprint="f")
        outputs = [convert.output_from_proto(item) async for item in prefill_pb2_grpc.PrefillStub(p.channel).Prefill(message)]
        assert [token.token_id for output in outputs for token in output.tokens] == reference(request)[:1]
        assert outputs[-1].num_saved_blocks == 63 // BLOCK_SIZE
        await p.is_idle(20)


@pytest.mark.parametrize(
    ("role", "length", "pool_available", "says"),
    [
        (Role.DECODE, 8, True, "8 of 8 tokens missing, computed here"),
        (Role.DECODE, 60, False, "no KV pool and no direct push, computed here"),
        (Role.UNIFIED, 60, True, "unified worker"),
    ],
)
async def test_nobody_is_asked_where_it_would_not_help(role: Role, length: int, pool_available: bool, says: str) -> None:
    async with scripted(silent) as p, worker(role, {}, pool_available=pool_available) as d:
        answer = await generate(d, prompt(length), p.address)
        assert (answer.tokens, answer.decisions) == (reference(prompt(length)), [("", says)])
        assert p.called == 0


class Forgetful(dict[str, tuple[int | None, ...]]):
    """Says that it holds what it cannot give."""

    def get(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("output", [0, 5], ids=["new", "migrated"])
async def test_what_was_found_and_did_not_come_is_told_with_why_it_was_computed_here(output: int) -> None:
    request, pool = prompt(output=output), Forgetful()
    async with worker(Role.PREFILL, pool) as p:
        message = prefill_pb2.PrefillRequest(sequence=convert.request_to_proto(request), fingerprint="f")
        await drained(prefill_pb2_grpc.PrefillStub(p.channel).Prefill(message))
    known = f"{60 + output} tokens{' (prompt and 5 so far)' if output else ''}"
    missing = (59 + output) % BLOCK_SIZE + 1
    async with scripted(silent) as p, worker(Role.DECODE, pool) as d:
        answer = await generate(d, request, p.address)
        assert answer.tokens == reference(request)
        lost = 60 + output - missing
        assert answer.decisions[-1] == ("", f"{missing} of {known} missing, computed here; {lost} that were found did not come")
        assert answer.last.cache is not None
        assert answer.last.cache.num_cached_tokens == 0


async def test_a_step_longer_than_the_lease_is_not_taken_for_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody falls silent meanwhile: not the call, and not the state stream."""
    begun, over = threading.Event(), threading.Event()
    async with scripted(silent) as p, worker(Role.DECODE, {}) as d:
        compute = d.runner.submit

        def submit(plan: StepPlan) -> Callable[[], StepResult]:
            begun.set()
            over.wait(60)
            return compute(plan)

        monkeypatch.setattr(d.runner, "submit", submit)
        state = worker_pb2_grpc.WorkerStub(d.channel).WatchState(worker_pb2.WatchStateRequest())
        await state.read()
        busy = asyncio.create_task(generate(d, prompt(8, name="busy", max_tokens=1)))
        assert await asyncio.to_thread(begun.wait, 30)
        stream = call(d, prompt(), p.address)  # its lookup waits for the step
        try:
            assert max(await asyncio.gather(pause_s(stream), pause_s(state))) < LEASE_S / 2
        finally:
            over.set()
        stream.cancel()
        state.cancel()
        await busy


async def pause_s(stream: Any) -> float:
    """Between two messages; the median of several, for one may find the machine busy."""
    times: list[float] = []
    for _ in range(6):
        await asyncio.wait_for(stream.read(), 30)
        times.append(time.monotonic())
    return statistics.median(after - before for before, after in itertools.pairwise(times))


async def test_a_pushed_token_is_emitted_at_once() -> None:
    """The prefill worker goes on saving for a while: nobody waits for it."""
    saved: list[float] = []

    async def slow_to_save(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        yield GenerateOutput(tokens=(OutputToken(reference(request)[0]),))
        for _ in range(5):
            await asyncio.sleep(LEASE_S / 2)
            saved.append(time.monotonic())
            yield GenerateOutput()

    async with scripted(slow_to_save) as p, worker(Role.DECODE, {}) as d:
        began = time.monotonic()
        answer = await generate(d, prompt(), p.address)
        assert answer.tokens == reference(prompt())
        assert began + answer.first_token_s < saved[-1]


# -- prefill workers that fail


async def silent(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    await asyncio.sleep(3600)
    yield GenerateOutput()


async def silent_after_progress(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    yield GenerateOutput(num_computed_tokens=16)
    await asyncio.sleep(3600)


async def dies_at_once(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    raise ConnectionError
    yield


async def dies_after_progress(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    yield GenerateOutput(num_computed_tokens=16)
    raise ConnectionError


async def refuses(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    raise Draining("this worker is draining")
    yield


async def promises_blocks_and_dies(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    yield GenerateOutput(num_computed_tokens=48, num_saved_blocks=12)
    raise ConnectionError


BEFORE_THE_TOKEN = [silent, silent_after_progress, dies_at_once, dies_after_progress, refuses, promises_blocks_and_dies]


@pytest.mark.parametrize("script", BEFORE_THE_TOKEN)
async def test_the_next_candidate_is_asked(script: Script) -> None:
    pool: Pool = {}
    async with scripted(script) as bad, worker(Role.PREFILL, pool) as good, worker(Role.DECODE, pool) as d:
        started = time.monotonic()
        answer = await generate(d, prompt(), bad.address, good.address)
        assert time.monotonic() - started < LEASE_S + 5
        assert answer.tokens == reference(prompt())
        assert answer.decisions[-1][0] == "prefill-1"
        for each in (good, d):
            await each.is_idle(20)


@pytest.mark.parametrize("script", BEFORE_THE_TOKEN)
async def test_without_another_candidate_it_is_computed_here(script: Script) -> None:
    async with scripted(script) as bad, worker(Role.DECODE, {}) as d:
        started = time.monotonic()
        answer = await generate(d, prompt(), bad.address)
        assert time.monotonic() - started < LEASE_S + 5
        assert answer.tokens == reference(prompt())
        assert answer.decisions[-1] == ("", "no prefill worker managed it, computed here")
        await d.is_idle(20)


async def pushes_and_dies(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    yield GenerateOutput(tokens=(OutputToken(reference(request)[0]),))
    raise ConnectionError


async def pushes_and_falls_silent(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    yield GenerateOutput(tokens=(OutputToken(reference(request)[0]),))
    await asyncio.sleep(3600)


@pytest.mark.parametrize("script", [pushes_and_dies, pushes_and_falls_silent])
async def test_a_token_is_never_taken_from_two_prefill_workers(script: Script) -> None:
    async with scripted(script) as bad, scripted(silent) as other, worker(Role.DECODE, {}) as d:
        answer = await generate(d, prompt(), bad.address, other.address)
        assert answer.tokens == reference(prompt())
        assert other.called == 0
        await d.is_idle(20)


async def test_nobody_listens_there() -> None:
    pool: Pool = {}
    async with worker(Role.PREFILL, pool) as gone:
        address = gone.address
    async with worker(Role.PREFILL, pool) as good, worker(Role.DECODE, pool) as d:
        answer = await generate(d, prompt(), address, good.address)
        assert answer.tokens == reference(prompt())
        assert answer.decisions[-1][0] == "prefill-1"


async def test_another_model_is_refused_by_name() -> None:
    pool: Pool = {}
    async with worker(Role.PREFILL, pool, fingerprint="theirs") as p, worker(Role.DECODE, pool, fingerprint="ours") as d:
        answer = await generate(d, prompt(), p.address)
        assert answer.tokens == reference(prompt())
        assert answer.decisions[-1][0] == ""
        message = prefill_pb2.PrefillRequest(sequence=convert.request_to_proto(prompt()), fingerprint="ours")
        error = await failure(prefill_pb2_grpc.PrefillStub(p.channel).Prefill(message))
        assert isinstance(error, InvalidRequest)
        assert "ours" in error.message
        assert "theirs" in error.message


async def test_workers_of_different_degrees_do_not_meet_in_the_pool() -> None:
    """Without a direct path the decode worker computes, and does not have a prefill worker compute for nothing."""
    pool: Pool = {}
    async with worker(Role.PREFILL, pool) as p, worker(Role.DECODE, pool) as d:
        candidates = [decode_pb2.PrefillCandidate(id="p", address=p.address, tensor_parallel_size=2)]
        message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(prompt()), prefill_candidates=candidates)
        answers = await drained(decode_pb2_grpc.DecodeStub(d.channel).Generate(message))
        assert [token.token_id for answer in answers for token in answer.output.tokens] == reference(prompt())
        assert p.runner.num_steps == 0
        target = PushTarget(lease="l", first_block=0, shards=(PushShard("m", (), (0,)),) * 2)
        asked = prefill_pb2.PrefillRequest(
            sequence=convert.request_to_proto(prompt()), fingerprint="f", target=convert.target_to_proto(target)
        )
        error = await failure(prefill_pb2_grpc.PrefillStub(p.channel).Prefill(asked))
        assert isinstance(error, TransferError)
        assert "blocks of 2 ranks alone, not of 1" in error.message


# -- clients that go away


async def test_a_cancelled_call_frees_everything_at_any_moment() -> None:
    rng, pool = random.Random(0), dict[str, Any]()
    async with worker(Role.PREFILL, pool) as p, worker(Role.DECODE, pool) as d:
        p.runner.step_s = d.runner.step_s = 0.01

        async def one(index: int) -> None:
            stream = call(d, prompt(40 + index, name=f"r{index}", max_tokens=40), p.address)
            reader = asyncio.create_task(drained(stream))
            await asyncio.sleep(rng.random() * 0.5)
            stream.cancel()
            await asyncio.gather(reader, return_exceptions=True)

        await asyncio.gather(*(one(index) for index in range(40)))
        for each in (p, d):
            await each.is_idle(20)
        answer = await generate(d, prompt(), p.address)
        assert answer.tokens == reference(prompt())


async def test_the_end_of_who_was_cancelled_is_not_its_successors() -> None:
    async with worker(Role.UNIFIED, {}) as w:
        first = w.engine.submit(prompt())
        first.close()
        second = w.engine.submit(prompt())
        first.deliver(GenerateOutput(finish_reason=FinishReason.LENGTH))  # was on its way
        assert list(w.engine._live.values()) == [second]
        second.close()


async def test_a_client_that_does_not_read_can_still_be_cancelled() -> None:
    async with worker(Role.UNIFIED, {}) as d:
        stream = call(d, prompt(8, max_tokens=700))
        await stream.read()
        await asyncio.sleep(0.2)
        stream.cancel()
        await d.is_idle(20)


async def test_the_prefill_call_is_cancelled_with_the_client() -> None:
    ended = asyncio.Event()

    async def never_silent(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        try:
            while True:
                yield GenerateOutput()
                await asyncio.sleep(LEASE_S / 4)
        finally:
            ended.set()

    async with scripted(never_silent) as p, worker(Role.DECODE, {}) as d:
        stream = call(d, prompt(), p.address)
        await stream.read()
        while not p.called:
            await asyncio.sleep(0.01)
        stream.cancel()
        await d.is_idle(20)
        await asyncio.wait_for(ended.wait(), 20)


async def test_cancel_by_name_ends_the_stream() -> None:
    async with worker(Role.UNIFIED, {}) as d:
        d.runner.step_s = 0.01
        task = asyncio.create_task(generate(d, prompt(8, name="x", max_tokens=700)))
        stub = worker_pb2_grpc.WorkerStub(d.channel)
        while not d.intake._inside:
            await asyncio.sleep(0.01)
        assert (await stub.Cancel(worker_pb2.CancelRequest(request_id="x"))).found
        answer = await asyncio.wait_for(task, 20)
        assert answer.last.finish_reason is FinishReason.ABORT
        assert not (await stub.Cancel(worker_pb2.CancelRequest(request_id="x"))).found
        await d.is_idle(20)


# -- draining and state


async def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    async with worker(Role.UNIFIED, {}) as d:
        d.runner.step_s = 0.01
        stub = worker_pb2_grpc.WorkerStub(d.channel)
        running = asyncio.create_task(generate(d, prompt(8, name="old", max_tokens=700)))
        while not d.intake._inside:
            await asyncio.sleep(0.01)
        assert (await stub.Drain(worker_pb2.DrainRequest(grace_seconds=0))).num_unfinished == 1
        assert isinstance(await failure(call(d, prompt(8, name="new"))), Draining)
        assert convert.member_from_proto(await stub.GetMember(worker_pb2.GetMemberRequest())).state is MemberState.DRAINING
        d.runner.step_s = 0
        assert (await stub.Drain(worker_pb2.DrainRequest(grace_seconds=60))).num_unfinished == 0
        assert (await running).tokens == reference(prompt(8, max_tokens=700))


async def test_a_part_that_does_not_end_leaves_the_others_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def fail() -> None:
        raise InternalError("a rank has not answered")

    async with worker(Role.DECODE, {}) as d:
        tier = d.engine._tiers[0]
        d.engine._tiers = (tier, PromptTransfer(d.runner, {}, "files"))
        monkeypatch.setattr(d.engine._tiers[1], "close", fail)  # the first to be closed
        monkeypatch.setattr(tier, "close", lambda: ended.append("tier"))
        d.engine.on_stopped = lambda: ended.append("all")
        await d.engine.stop()
    assert ended == ["tier", "all"]


@pytest.mark.parametrize(("flush_s", "calls"), [(0.0, "close_files close_pool"), (5.0, "flush_pool flush_files close_files close_pool")])
async def test_an_end_with_time_left_saves_first(flush_s: float, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    async with worker(Role.DECODE, {}) as d:
        d.engine._tiers = (d.engine._tiers[0], PromptTransfer(d.runner, {}, "files"))
        for tier in d.engine._tiers:
            monkeypatch.setattr(tier, "flush", lambda limit_s, tier=tier: made.append(f"flush_{tier.name}"))
            monkeypatch.setattr(tier, "close", lambda tier=tier: made.append(f"close_{tier.name}"))
        await d.engine.stop(flush_s)
    assert made == calls.split()


async def test_the_state_stream_starts_with_a_snapshot_and_is_never_silent() -> None:
    async with worker(Role.UNIFIED, {}) as d:
        stream = worker_pb2_grpc.WorkerStub(d.channel).WatchState(worker_pb2.WatchStateRequest())
        first = convert.state_from_proto(await stream.read())
        assert first.snapshot
        await generate(d, prompt())
        stored: set[bytes] = set()
        last = first
        while len(stored) < 60 // BLOCK_SIZE:
            update = convert.state_from_proto(await asyncio.wait_for(stream.read(), 20))
            assert update.sequence == last.sequence + 1
            stored |= {item for event in update.events for item in event.block_hashes}
            last = update
        for _ in range(2):  # nothing happens any more
            update = convert.state_from_proto(await asyncio.wait_for(stream.read(), 20))
            assert (update.sequence, update.snapshot) == (last.sequence + 1, False)
            last = update
        stream.cancel()


async def test_a_lost_device_ends_the_worker_and_its_requests_move() -> None:
    """Every later step would fail, too."""
    async with worker(Role.UNIFIED, {}) as w:
        crashed = asyncio.Event()
        loop = asyncio.get_running_loop()
        w.engine.on_crash = lambda: loop.call_soon_threadsafe(crashed.set)
        await anext(aiter(call(w, prompt(8, name="before", max_tokens=3))))

        def lost(plan: StepPlan) -> Callable[[], StepResult]:
            raise DeviceLost("an illegal memory access")

        w.runner.submit = lost  # type: ignore[method-assign]
        assert isinstance(await failure(call(w, prompt(8))), WorkerLost)
        await asyncio.wait_for(crashed.wait(), 10)
