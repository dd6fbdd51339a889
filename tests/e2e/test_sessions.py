"""Many sequences on one stream, as a router has them: each gets its own tokens and its own end, and leaving frees what it held."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.errors import BatonError, InvalidRequest, WorkerLost
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import decode_pb2
from baton.types import GenerateRequest, Role
from services.router.sessions import Sessions
from tests.properties.toy import reference
from tests.workers import PATIENT_S, Worker, prompt, until, worker


@asynccontextmanager
async def sessions(lease_s: float = PATIENT_S) -> AsyncIterator[Sessions]:
    channels = Channels(lease_s)
    try:
        yield Sessions(channels, lease_s=lease_s)
    finally:
        await channels.close()


async def tokens(made: Sessions, at: Worker, request: GenerateRequest, most: int = 1000) -> list[int]:
    message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request))
    found: list[int] = []
    stream = made.generate("w", at.address, message)
    try:
        async for response in stream:
            found += [token.token_id for token in response.output.tokens]
            if len(found) >= most:
                break
    finally:
        await stream.aclose()
    return found


async def test_each_gets_its_own_tokens_and_the_last_ends_the_session() -> None:
    async with worker(Role.UNIFIED, {}) as w, sessions() as made:
        for _ in range(2):
            requests = [prompt(10 + i, name=f"r{i}", max_tokens=3 + i) for i in range(6)]
            assert await asyncio.gather(*(tokens(made, w, r) for r in requests)) == [reference(r) for r in requests]
            assert not made._sessions
        await w.is_idle()


async def test_one_that_fails_fails_alone() -> None:
    async with worker(Role.UNIFIED, {}) as w, sessions() as made:
        good, twin = prompt(20, name="good"), prompt(12, name="good")
        answers: list[Any] = await asyncio.gather(tokens(made, w, good), tokens(made, w, twin), return_exceptions=True)
        assert answers[0] == reference(good)
        assert isinstance(answers[1], InvalidRequest)
        await w.is_idle()


async def test_who_leaves_early_frees_what_it_held_and_disturbs_nobody() -> None:
    async with worker(Role.UNIFIED, {}) as w, sessions() as made:
        leaving, staying = prompt(20, name="leaving", max_tokens=100), prompt(13, name="staying", max_tokens=30)
        some, whole = await asyncio.gather(tokens(made, w, leaving, most=2), tokens(made, w, staying))
        assert some == reference(leaving)[: len(some)]
        assert whole == reference(staying)
        await w.is_idle()
        task = asyncio.create_task(tokens(made, w, leaving))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await w.is_idle()


async def test_a_worker_that_dies_ends_all_of_them() -> None:
    async with worker(Role.UNIFIED, {}) as w, sessions() as made:
        w.runner.step_s = 0.05
        tasks = [asyncio.create_task(tokens(made, w, prompt(8, name=f"r{i}", max_tokens=100))) for i in range(3)]
        await asyncio.sleep(0.2)
        await w.server.stop(0)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, WorkerLost)
        assert not made._sessions
        await until(lambda: not [task for task in asyncio.all_tasks() if "_consume_request_iterator" in repr(task.get_coro())])


async def test_a_step_longer_than_the_lease_is_not_taken_for_a_loss() -> None:
    lease_s = 3.5
    async with worker(Role.UNIFIED, {}) as w, sessions(lease_s) as made:
        w.runner.step_s = 1.2 * lease_s
        request = prompt(8, max_tokens=1)
        assert await tokens(made, w, request) == reference(request)


async def test_nobody_listens() -> None:
    async with sessions() as made:
        async with worker(Role.UNIFIED, {}) as w:
            pass
        with pytest.raises(BatonError):
            await tokens(made, w, prompt(8))


async def test_what_came_while_nobody_read_is_one_response() -> None:
    request = prompt(20, name="slow", max_tokens=30)
    message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request))
    async with worker(Role.UNIFIED, {}) as w, sessions() as made:
        stream = made.generate("w", w.address, message)
        first = await anext(stream)
        await w.is_idle()  # all has been given away
        await asyncio.sleep(0.2)
        rest = [response async for response in stream]
    assert len(rest) < 10
    assert [token.token_id for each in (first, *rest) for token in each.output.tokens] == reference(request)
