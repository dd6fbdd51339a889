"""How `baton up` and what it started stop."""

import asyncio
import json
import signal
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from baton.cli.cluster import Child, Cluster, Plan
from baton.rpc import convert
from baton.rpc.channel import _NARROW_OPTIONS
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc
from baton.types import GenerateRequest, SamplingParams
from tests.cluster import running_cluster, until


def test_drain_lets_streams_finish(tiny_model: Path) -> None:
    with running_cluster(model=tiny_model, unified=2, kvstore=0, etcd="none") as cluster:
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            name = response.headers["x-baton-route"].split("decode=")[1].split(";")[0]
            cluster.signal(name, signal.SIGTERM)
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert rest[-1]["baton"]["moves"] == []
        until(lambda: f"{name} ended (exit code 0); starting it again" in (cluster.logs / "up.log").read_text())


def test_a_second_signal_stops_at_once(tiny_model: Path) -> None:
    with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none") as cluster:
        everybody = psutil.Process(cluster.process.pid).children(recursive=True)
        (worker,) = cluster.workers()
        sampling = SamplingParams(max_tokens=900, ignore_eos=True)
        request = GenerateRequest(request_id="unread", prompt_token_ids=(20, 21, 22), sampling=sampling)
        message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request))
        with grpc.insecure_channel(worker["address"], options=_NARROW_OPTIONS) as channel:
            stream = decode_pb2_grpc.DecodeStub(channel).Generate(message)
            next(stream)  # and no further: the worker waits until the rest is read
            cluster.process.send_signal(signal.SIGINT)
            until(lambda: "a second Ctrl-C stops at once" in (cluster.logs / "up.log").read_text())  # or the two signals may be one
            time.sleep(0.5)
            assert cluster.process.poll() is None
            cluster.process.send_signal(signal.SIGINT)
            cluster.process.wait(timeout=10)
        _, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive


def test_a_stream_that_outlives_the_stop_is_told_so_and_nobody_is_killed(tiny_model: Path) -> None:
    options = ["--set", "router.drain_grace_s=1"]
    with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none", options=options) as cluster:
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            cluster.signal("unified-0", signal.SIGSTOP)  # it would take too long, however fast it is
            cluster.process.send_signal(signal.SIGINT)
            *_, error, done = [line for line in lines if line]
        assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == ("draining", "data: [DONE]")
        assert cluster.process.wait(30) == 0
        said = (cluster.logs / "up.log").read_text()
        assert "or 1 s have gone by" in said
        assert "killing" not in said


async def test_each_child_has_time_to_end_by_itself_and_what_is_killed_has_said_why(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("baton.cli.cluster._LEAVE_S", 0.5)
    cluster = Cluster(Plan(model=tiny_model, etcd="none", http_port=0, grpc_port=0, settings=("router.drain_grace_s=60",)))
    graces = {child.name: child.drain_grace_s for group in cluster._plan_groups() for child in group}
    assert graces == {"kvstore-master": 10, "prefill-0": 10, "decode-0": 10, "kvstore-0": 10, "router": 60}
    stubborn = "trap 'echo 3 requests are not finished >&2' TERM; echo begun >&2; while :; do sleep 0.01; done"
    child = Child("stubborn", "decode", ["bash", "-c", stubborn], tmp_path / "log", drain_grace_s=0.5)
    await cluster._spawn(child)
    async with asyncio.timeout(30):
        while not child.log.read_text():
            await asyncio.sleep(0.01)
        await cluster._end(child)
    await cluster.stop()
    assert "stubborn has not ended after 1 s; killing it. The end of its log: 3 requests are not finished" in caplog.text


def test_a_closed_terminal_stops_everything(tiny_model: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests' own may be ignored, which is inherited
    try:
        with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none") as cluster:
            everybody = psutil.Process(cluster.process.pid).children(recursive=True)
            cluster.process.send_signal(signal.SIGHUP)
            assert cluster.process.wait(30) == 0
            _, alive = psutil.wait_procs(everybody, timeout=5)
            assert not alive
            assert not list(cluster.logs.glob("baton-*/*.yaml"))
    finally:
        signal.signal(signal.SIGHUP, before)
