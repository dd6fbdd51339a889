"""A worker as a process: signals, and starts that fail."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cluster.machine import free_port
from baton.errors import Draining
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc
from baton.types import SamplingParams
from tests.workers import failure, prompt

pytestmark = pytest.mark.timeout(240)
START_S = 120
NUM_TOKENS = 300


class Process:
    """A service of its own, which nobody else knows; a unified worker, unless told otherwise."""

    def __init__(self, model: Path, *settings: str, service: str = "decode") -> None:
        self.address = f"127.0.0.1:{free_port()}"
        command = [
            sys.executable,
            "-m",
            f"services.{service}",
            f"model={model}",
            f"server.grpc_port={self.address.split(':')[1]}",
            *settings,
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self, within_s: float) -> tuple[int, str]:
        """Exit code and what it said."""
        _, said = await asyncio.to_thread(self._process.communicate, timeout=within_s)
        return self._process.returncode, said


def generate(name: str) -> decode_pb2.GenerateRequest:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return decode_pb2.GenerateRequest(sequence=convert.request_to_proto(dataclasses.replace(prompt(8, name=name), sampling=sampling)))


@asynccontextmanager
async def narrow(process: Process) -> AsyncIterator[Any]:
    """A stream of which the worker can send little ahead: it has the request until somebody reads on, however fast it computes."""
    channels = Channels(60)
    try:
        yield decode_pb2_grpc.DecodeStub(channels.narrow(process.address)).Generate(generate("under way"))
    finally:
        await channels.close()


async def test_a_process_that_is_told_to_stop_finishes_first(tiny_model: Path) -> None:
    with Process(tiny_model) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), START_S)
            health, stub = health_pb2_grpc.HealthStub(channel), decode_pb2_grpc.DecodeStub(channel)
            while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
            async with narrow(process) as stream:
                outputs = [await stream.read()]
                process.signal(signal.SIGTERM)
                while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                    await asyncio.sleep(0.01)
                assert isinstance(await failure(stub.Generate(generate("new"))), Draining)
                while (message := await stream.read()) is not grpc.aio.EOF:
                    outputs.append(message)
                assert sum(len(message.output.tokens) for message in outputs) == NUM_TOKENS
        assert (await process.ended(60))[0] == 0


async def test_a_process_that_is_not_in_etcd_is_alive_and_not_ready(tiny_model: Path) -> None:
    port = free_port()
    with Process(tiny_model, f"server.metrics_port={port}", f"cluster.etcd=http://127.0.0.1:{free_port()}") as process:
        async with (
            grpc.aio.insecure_channel(process.address) as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        ):
            await asyncio.wait_for(channel.channel_ready(), START_S)
            assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_second_signal_ends_it_at_once(tiny_model: Path) -> None:
    with Process(tiny_model) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), START_S)
        async with narrow(process) as stream:
            await stream.read()
            process.signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.signal(signal.SIGINT)
            assert (await process.ended(15))[0] == 1  # half its grace


def test_a_stuck_engine_ends_its_process() -> None:
    """Also while requests come and go, of which its event loop tells the routers."""
    code = """
import asyncio
from baton.hosting.worker import end_if_stuck
from baton.types import Role
from tests.workers import prompt, worker

async def main():
    async with worker(Role.UNIFIED, {}) as stuck:
        watchdog = asyncio.create_task(end_if_stuck(stuck.engine, 2.0))
        await asyncio.sleep(2.5)  # idle is not stuck
        stuck.runner.step_s = 3600
        stuck.engine.submit(prompt())
        while True:
            stuck.engine.submit(prompt(name="another")).close()
            await asyncio.sleep(0.1)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=100)
    assert ended.returncode == 70
    assert "stuck in a step" in ended.stderr


def test_an_engine_that_has_stopped_is_not_stuck() -> None:
    """What it saves yet takes longer than a step may."""
    code = """
import asyncio
from baton.hosting.worker import end_if_stuck
from baton.types import Role
from tests.workers import worker

async def main():
    async with worker(Role.UNIFIED, {}) as made:
        watchdog = asyncio.create_task(end_if_stuck(made.engine, 1.0))
        await made.engine.stop()
        await watchdog

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["engine.blok_size=3"], "decode: configuration: unknown key engine.blok_size; did you mean block_size?"),
        (["role=prefill"], "decode: role=prefill is not for this service; use decode or unified"),
        (["cluster.etcd=http://a:b"], "decode: cluster.etcd='http://a:b' must look like http://127.0.0.1:2379"),
    ],
)
async def test_what_cannot_start_says_why_in_one_line(tiny_model: Path, settings: list[str], says: str) -> None:
    with Process(tiny_model, *settings) as process:
        code, said = await process.ended(START_S)
        assert code == 2
        assert said.splitlines()[-1].startswith(says)
        assert "Traceback" not in said
