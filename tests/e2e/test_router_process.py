"""A router as a process: what becomes of its gRPC calls when it is told to stop."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.cluster.machine import free_port
from baton.rpc.v1 import common_pb2, router_pb2, router_pb2_grpc
from baton.types import Role
from tests.e2e.test_worker_process import Process
from tests.workers import Worker, worker

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def routed(model: Path, grace_s: float, http_port: int = 0) -> AsyncIterator[tuple[Process, grpc.aio.Channel, Worker]]:
    """A router that serves, a channel to it, and its only worker."""
    async with worker(Role.UNIFIED, {}) as w:
        settings = [f'cluster.workers=["{w.address}"]', f"drain_grace_s={grace_s}", f"http_port={http_port}"]
        with Process(model, *settings, service="router") as process:
            async with grpc.aio.insecure_channel(process.address) as channel:
                await asyncio.wait_for(channel.channel_ready(), 60)
                async with asyncio.timeout(30):
                    while await status(channel) is not grpc.StatusCode.OK:
                        await asyncio.sleep(0.05)
                yield process, channel, w


def generate(channel: grpc.aio.Channel, max_tokens: int) -> Any:
    request = router_pb2.RouterGenerateRequest(
        token_ids=router_pb2.TokenIds(ids=range(10)),
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )
    return router_pb2_grpc.RouterStub(channel).Generate(request)


async def tokens(answers: Any) -> int:
    return sum([len(answer.tokens) async for answer in answers])


async def status(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """That a short call ends with."""
    try:
        await tokens(generate(channel, 1))
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_router_that_is_told_to_stop_finishes_its_calls_and_takes_no_new_ones(demo_model: Path) -> None:
    async with routed(demo_model, grace_s=60) as (process, channel, w):
        w.runner.step_s = 0.1
        stream = aiter(generate(channel, 300))
        num = len((await anext(stream)).tokens)
        process.signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while await status(channel) is not grpc.StatusCode.UNAVAILABLE:  # gRPC may say CANCELLED at first
                await asyncio.sleep(0)
        refused = time.monotonic()
        while time.monotonic() < refused + 1:
            num += len((await anext(stream)).tokens)
        w.runner.step_s = 0
        assert num + await tokens(stream) == 300
        assert (await process.ended(20))[0] == 0


async def test_who_outlives_the_grace_is_told_to_go_elsewhere(demo_model: Path) -> None:
    port = free_port()
    async with (
        routed(demo_model, grace_s=1, http_port=port) as (process, channel, w),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        w.runner.step_s = 0.1
        body = {"prompt": list(range(10)), "max_tokens": 600, "ignore_eos": True}
        call = aiter(generate(channel, 600))
        plain = asyncio.create_task(http.post("/v1/completions", json=body, headers={"x-request-id": "plain"}))
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}, headers={"x-request-id": "stream"}) as stream:
            await anext(call)
            process.signal(signal.SIGTERM)
            *_, error, done = [line async for line in stream.aiter_lines() if line]
        assert (stream.status_code, done) == (200, "data: [DONE]")
        told = {"message": "this router is going away; send the request again", "type": "server_error", "param": None, "code": "draining"}
        assert json.loads(error.removeprefix("data: ")) == {"error": told}
        answer = await plain
        assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-request-id"]) == (503, "1", "plain")
        assert answer.json() == {"error": told}
        with pytest.raises(grpc.aio.AioRpcError, match="going away") as caught:
            await tokens(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        code, log = await process.ended(30)
        assert (code, log.count("503 draining"), "Traceback" in log) == (0, 3, False)
        w.runner.step_s = 0
        await w.is_idle()


async def test_who_watches_its_health_or_has_left_does_not_hold_it(demo_model: Path) -> None:
    async with routed(demo_model, grace_s=300) as (process, channel, w):
        w.runner.step_s = 0.1
        left = generate(channel, 700)
        await anext(aiter(left))
        left.cancel()
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await reflection.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await reflection.read()).HasField("list_services_response")
        process.signal(signal.SIGTERM)
        assert (await anext(watch)).status == NOT_SERVING
        assert (await process.ended(30))[0] == 0
        w.runner.step_s = 0
