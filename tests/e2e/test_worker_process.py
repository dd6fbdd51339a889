"""A worker as a process: signals, and starts that fail."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cluster.machine import free_port
from baton.errors import Draining
from baton.rpc import convert
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc
from baton.types import SamplingParams
from tests.workers import failure, prompt


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


async def test_a_process_that_is_told_to_stop_finishes_first(tiny_model: Path) -> None:
    with Process(tiny_model) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            health, stub = health_pb2_grpc.HealthStub(channel), decode_pb2_grpc.DecodeStub(channel)
            while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
            request = dataclasses.replace(prompt(8, max_tokens=300), sampling=SamplingParams(max_tokens=300, ignore_eos=True))
            stream = aiter(stub.Generate(decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request))))
            outputs = [await anext(stream)]
            process.signal(signal.SIGTERM)
            while (await health.Check(health_pb2.HealthCheckRequest())).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                await asyncio.sleep(0.01)
            new = dataclasses.replace(request, request_id="new")
            assert isinstance(await failure(stub.Generate(decode_pb2.GenerateRequest(sequence=convert.request_to_proto(new)))), Draining)
            outputs += [message async for message in stream]
            assert sum(len(message.output.tokens) for message in outputs) == 300
        assert (await process.ended(10))[0] == 0


async def test_a_process_that_is_not_in_etcd_is_alive_and_not_ready(tiny_model: Path) -> None:
    port = free_port()
    with Process(tiny_model, f"server.metrics_port={port}", f"cluster.etcd=http://127.0.0.1:{free_port()}") as process:
        async with grpc.aio.insecure_channel(process.address) as channel, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            await asyncio.wait_for(channel.channel_ready(), 60)
            assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_second_signal_ends_it_at_once(tiny_model: Path) -> None:
    with Process(tiny_model) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            request = dataclasses.replace(prompt(8), sampling=SamplingParams(max_tokens=900, ignore_eos=True))
            stream = decode_pb2_grpc.DecodeStub(channel).Generate(decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request)))
            await stream.read()
            process.signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.signal(signal.SIGINT)
            assert (await process.ended(5))[0] == 1


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
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=30)
    assert ended.returncode == 70
    assert "stuck in a step" in ended.stderr


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
        code, said = await process.ended(60)
        assert code == 2
        assert said.splitlines()[-1].startswith(says)
        assert "Traceback" not in said
