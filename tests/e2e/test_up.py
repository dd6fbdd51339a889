"""`baton up` and the command line: starting, watching, and saying what is wrong."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import psutil
import pytest
import yaml

from baton.cli.cluster import Child, Cluster, Plan
from baton.cluster.machine import free_port
from baton.errors import ConfigError
from baton.rpc.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.cluster import RunningCluster, running_cluster, stop, until
from tests.e2e.test_membership import Etcd

BATON = [sys.executable, "-c", "from baton.cli import main; main()"]


@pytest.fixture(scope="module")
def unified(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Without etcd, without a pool; of a model by another name."""
    link = tmp_path_factory.mktemp("links") / "prod"
    link.symlink_to(tiny_model)
    with running_cluster(model=link, unified=1, kvstore=0, etcd="none") as cluster:
        yield cluster


def baton(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, **environment}
    return subprocess.run([*BATON, *arguments], capture_output=True, text=True, timeout=timeout, check=False, env=told)


def complete(cluster: RunningCluster, prompt: str = "hello", **fields: object) -> httpx.Response:
    return httpx.post(f"{cluster.url}/v1/completions", json={"prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}, timeout=60)


def restarts_after(cluster: RunningCluster, name: str, number: signal.Signals) -> None:
    before = cluster.children()[name].pid
    cluster.signal(name, number)
    until(lambda: (child := cluster.children().get(name)) is not None and child.pid != before)


def test_a_unified_worker_without_etcd_serves(unified: RunningCluster) -> None:
    answer = complete(unified)
    assert answer.status_code == 200
    assert "decode=unified-0" in answer.headers["x-baton-route"]
    assert set(unified.children()) == {"unified-0", "router"}


def test_what_is_said_when_it_is_ready_can_be_used(unified: RunningCluster) -> None:
    said = (unified.logs / "up.log").read_text()
    for page in ("console", "metrics"):
        assert httpx.get(re.findall(rf"http://\S+/{page}", said)[0]).status_code == 200
    program = re.findall(r"(\S+) chat --url", said)[0]
    assert shutil.which(program)


def names_of(cluster: RunningCluster) -> tuple[list[str], str, str]:
    """What the router lists; what its worker and the worker's metrics say."""
    listed = [card["id"] for card in httpx.get(f"{cluster.url}/v1/models").json()["data"]]
    (worker,) = cluster.workers()
    label = re.search(r'model_name="([^"]*)"', httpx.get(f"http://{worker['metrics']}/metrics").text)
    return listed, worker["model"], label[1] if label else ""


def test_a_link_is_the_name_of_its_model(unified: RunningCluster) -> None:
    assert names_of(unified) == (["prod"], "prod", "prod")
    assert complete(unified, model="prod").json()["model"] == "prod"


async def test_a_model_is_called_by_the_names_that_it_was_given_and_shown_by_the_first(tiny_model: Path) -> None:
    options = ["--served-model-name", "org/one", "--served-model-name", "two"]
    with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none", options=options) as cluster:
        assert names_of(cluster) == (["org/one", "two"], "org/one", "org/one")
        assert {complete(cluster, model=name).json()["model"] for name in ("org/one", "two")} == {"org/one"}
        refused = complete(cluster, model=tiny_model.name)
        assert refused.status_code == 404
        assert "'org/one', 'two' are" in refused.json()["error"]["message"]
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            generate = router_pb2_grpc.RouterStub(channel).Generate
            sampling = common_pb2.SamplingParams(max_tokens=3)
            assert [answer async for answer in generate(router_pb2.RouterGenerateRequest(text="x", model="two", sampling=sampling))]
            with pytest.raises(grpc.aio.AioRpcError, match="'org/one', 'two' are"):
                await generate(router_pb2.RouterGenerateRequest(text="x", model="three", sampling=sampling)).read()


def test_a_worker_that_dies_is_started_again_under_its_name(unified: RunningCluster) -> None:
    restarts_after(unified, "unified-0", signal.SIGKILL)
    assert "unified-0 died (exit code -9); starting it again" in (unified.logs / "up.log").read_text()
    unified.wait_ready()
    assert complete(unified).status_code == 200


def test_status_chat_and_bench(unified: RunningCluster) -> None:
    (worker,) = json.loads(baton("status", "--url", unified.url, "--json").stdout)["workers"]
    assert set(worker) >= {"id", "role", "pid", "address", "state", "running", "waiting", "blocks_free", "blocks_total", "blocks_cached"}
    assert "unified-0" in baton("status", "--url", unified.url).stdout
    told = baton("chat", "hi", "--url", unified.url, "--max-tokens", "5").stdout
    assert "first token after" in told
    assert "policy=predicted" in told


def test_replay_sends_a_traces_prompts(unified: RunningCluster, tmp_path: Path) -> None:
    """Equal ids are equal tokens: the second prompt finds two blocks of 64 tokens, the third none."""
    line = {"input_length": 1100, "output_length": 64}
    trace, out = tmp_path / "trace.jsonl", tmp_path / "replay.json"
    requests = ((0, [7, 8, 9]), (27_000, [7, 8, 10]), (27_000, [11, 12, 13]))  # at a load of 9, the first has 3 s to be computed
    trace.write_text("\n".join(json.dumps({**line, "timestamp": at, "hash_ids": ids}) for at, ids in requests))
    settings = ("--length-scale", "0.125", "--seconds", "0", "--load", "9", "--ttft-slo-ms", "60000")
    ran = baton("replay", str(trace), "--url", unified.url, *settings, "--json", str(out))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert (result["requests"], result["failures"], result["met"]) == (3, 0, 1.0)
    assert result["hit_rate"] == pytest.approx(128 / (3 * 138))
    told = ran.stdout.splitlines()
    assert re.fullmatch(r"3 requests in \d+\.\d s, 0 failed", told[0])
    columns = ["requests", "failed", "TTFT mean", "p95, s", "ITL mean", "p95, ms", "met", "goodput/s", "hits"]
    assert [column.strip() for column in told[2].strip("┃").split("┃")] == columns


def test_bench_counts_exactly(unified: RunningCluster, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    ran = baton(
        *("bench", "--url", unified.url, "--num-requests", "6", "--concurrency", "2", "--input-len", "40-60", "--output-len", "7"),
        *("--shared-prefix", "32", "--json", str(out)),
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert (result["requests"], result["failures"]) == (6, 0)
    assert result["output_tokens_per_s"] == pytest.approx(6 * 7 / result["seconds"])
    assert 0.2 < result["cache_hit_rate"] < 0.9  # all but the first find the shared 32 tokens
    assert result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"]


def test_an_etcd_that_panics_is_started_again_and_sigint_leaves_nothing(tiny_model: Path) -> None:
    """It ends with the exit code of a wrong configuration; our own services say by it that trying again is of no use."""
    with running_cluster(model=tiny_model, unified=1, kvstore=0) as cluster:
        restarts_after(cluster, "etcd", signal.SIGQUIT)
        assert complete(cluster).status_code == 200
        everybody = psutil.Process(cluster.process.pid).children(recursive=True)
        cluster.process.send_signal(signal.SIGINT)
        cluster.process.wait(30)
        gone, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive
        assert len(gone) == 3
        assert not cluster.ready_file.exists()
        assert not list(cluster.logs.glob("baton-*/*.yaml"))
        assert cluster.process.returncode == 0


def test_a_worker_has_as_many_gpus_of_its_own_as_ranks(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees them first, and the others: NVLink maps their memory."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    settings = ("decode.engine.tensor_parallel_size=1", "decode-1.engine.tensor_parallel_size=3")
    cluster = Cluster(
        Plan(model=tiny_model, prefill=1, decode=2, kvstore=0, http_port=0, grpc_port=0, tensor_parallel_size=2, settings=settings)
    )
    children = {child.name: child for group in cluster._plan_groups() for child in group}
    assert [children[name].gpus for name in ("prefill-0", "decode-0", "decode-1")] == ["0,1,2,3,4", "2,3,4,0,1", "3,4,0,1,2"]
    files = [Path(children[name].command[4]) for name in ("prefill-0", "decode-0", "decode-1")]
    assert [yaml.safe_load(file.read_text())["engine"]["tensor_parallel_size"] for file in files] == [2, 1, 3]
    asyncio.run(cluster.stop())
    assert not files[0].exists()


def test_workers_are_spread_over_the_gpus_and_no_orphan_survives_a_killed_supervisor(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=1) as cluster:
        seen = {name: child.environ().get("CUDA_VISIBLE_DEVICES") for name, child in cluster.children().items()}
        assert [seen[name] for name in ("prefill-0", "decode-0", "router")] == ["4,6,7", "6,7,4", "4,6,7"]  # the router's as it was
        everybody = psutil.Process(cluster.process.pid).children(recursive=True)
        assert len(everybody) == 7  # etcd, master supervisor, master, node, prefill, decode, router
        cluster.process.kill()
        cluster.process.wait()
        _, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive
        stop(cluster)


def test_an_etcd_that_runs_already(tiny_model: Path, tmp_path: Path) -> None:
    server = Etcd(tmp_path / "etcd")
    try:
        options = ["--set", "decode.push.protocols=[]"]
        with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=0, etcd=server.url, options=options) as cluster:
            answer = complete(cluster, "hello " * 20)
            assert "prefill=local" in answer.headers["x-baton-route"]
            assert "no KV pool and no direct push, computed here" in answer.headers["x-baton-route"]
            assert "etcd" not in cluster.children()
    finally:
        server.kill()


def test_a_router_alone_is_not_ready_and_says_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "router.yaml"
    config.write_text(f"model: {tiny_model}\nhttp_port: {port}\ncluster: {{lease_s: 1}}\n")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*BATON, "serve", "router", "--config", str(config), "policy=round_robin"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=0), timeout=10) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert client.get("/health").status_code == 200
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            ready = client.get("/ready")
            assert (ready.status_code, "no prefill and decode" in ready.json()["problem"]) == (503, True)
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
            assert refused.headers["retry-after"] == "1"
            assert client.get("/cluster").json()["policy"] == "round_robin"
    finally:
        process.terminate()
        assert process.wait(20) == 0


# -- what is said when it can't be


def test_there_is_no_such_service() -> None:
    ran = baton("serve", "planner")
    assert ran.returncode == 2
    assert ran.stderr.endswith("router, prefill, decode and kvstore\n")
    assert "`baton serve decode` with `role: unified`" in baton("serve", "unified").stderr


def test_a_taken_port(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = baton("up", "--model", str(tiny_model), "--http-port", str(taken.getsockname()[1]), "--grpc-port", "0")
    assert ran.returncode == 2
    assert "is taken" in ran.stderr
    assert "--http-port" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/nowhere"], "not a Hugging Face model folder"),
        (["--prefill", "1", "--decode", "0"], "needs a prefill and a decode worker"),
        (["--set", "block_size"], "role.key=value"),
        (["--set", "decod.engine.block_size=32"], "no role 'decod'"),
        (["--http-port", "99999"], "--http-port"),
        (["--log-dir", "/dev/null/logs"], "--log-dir /dev/null/logs cannot be made (Not a directory)"),
        (
            ["--unified", "1", "--kvstore", "0", "--set", "unified.engine.blok_size=8"],
            "unified-0: unknown key engine.blok_size; did you mean block_size?",
        ),
        (
            ["--set", "router.hedging.after=3", "--set", "router.hedging.share=2"],
            "router: hedging.share: Input should be less than or equal to 1",
        ),
        (["--set", "router.hedging=3"], "router: hedging: must be a section of keys with values (--set router.KEY=VALUE)"),
        (["--unified", "1", "--kvstore", "0", "--policy", "psychic"], "no policy 'psychic'; there are predicted,"),
    ],
)
def test_wrong_options_are_explained(tiny_model: Path, arguments: list[str], says: str) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny_model)]
    ran = baton("up", "--http-port", "0", "--grpc-port", "0", "--etcd", "none", *model, *arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


ONE_WORKER = ("--unified", "1", "--kvstore", "0", "--http-port", "0", "--grpc-port", "0")


def test_a_broken_checkpoint_stops_the_start_with_the_reason_and_its_log_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "broken", tmp_path / "tmp"
    shutil.copytree(tiny_model, folder)
    temporary.mkdir()
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    ran = baton("up", "--model", str(folder), *ONE_WORKER, TMPDIR=str(temporary))
    assert ran.returncode == 2
    assert "truncated" in ran.stderr
    (log,) = temporary.glob("baton-*/unified-0.log")
    assert "truncated" in log.read_text()
    assert str(log) in ran.stderr
    assert not (log.parent / "etcd").exists()


def test_a_start_that_takes_too_long_says_who_is_awaited_and_keeps_the_logs(tiny_model: Path, tmp_path: Path) -> None:
    ran = baton("up", "--model", str(tiny_model), *ONE_WORKER, "--etcd", "none", "--start-timeout", "0.3", TMPDIR=str(tmp_path))
    assert ran.returncode == 2
    (log,) = tmp_path.glob("baton-*/unified-0.log")
    assert f"not ready after 0.3 s (--start-timeout): unified-0, router; their logs are kept in {log.parent}" in ran.stderr
    assert "Traceback" not in ran.stderr


def plan(model: Path, **more: Any) -> Plan:
    return Plan(model=model, prefill=0, decode=0, unified=1, kvstore=0, etcd="none", http_port=0, grpc_port=0, **more)


async def test_a_start_without_a_limit_goes_on_saying_who_is_awaited(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("baton.cli.cluster._TELL_S", 0.1)
    cluster = Cluster(plan(tiny_model, start_timeout_s=0.0))
    try:
        await cluster.start()
    finally:
        await cluster.stop()
    assert f"their logs are in {cluster._logs}" in caplog.text
    assert "waiting for unified-0, router, " in caplog.text
    assert not cluster._logs.exists()


async def test_what_dies_again_and_again_while_it_starts_ends_the_start_however_long_it_has_lived(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cli.cluster._STEADY_S", 0.0)
    cluster = Cluster(plan(tiny_model, start_timeout_s=0.0))
    child = Child("unified-0", "unified", ["false"], cluster._logs / "unified-0.log")
    monkeypatch.setattr(cluster, "_plan_groups", lambda: [[child]])
    try:
        async with asyncio.timeout(60):
            with pytest.raises(ConfigError, match="unified-0 cannot run"):
                await cluster.start()
    finally:
        await cluster.stop()


def test_no_router_to_talk_to() -> None:
    for command in (["status"], ["bench", "--num-requests", "1"], ["chat", "hi"]):
        ran = baton(*command, "--url", "http://127.0.0.1:1")
        assert ran.returncode == 2
        assert "baton up" in ran.stderr


def test_workers_of_two_models_are_not_paired(tiny_model: Path, tmp_path: Path) -> None:
    from baton.models.create import create_model

    other = tmp_path / "other"
    create_model(other, "llama", max_len=1024, seed=1)
    options = ["--set", f"prefill-1.model={other}", "--set", f"decode-1.model={other}"]
    with running_cluster(model=tiny_model, prefill=2, decode=2, kvstore=1, options=options) as cluster:
        prints = {worker["id"]: worker["fingerprint"] for worker in cluster.workers()}
        assert len(set(prints.values())) == 2
        for i in range(8):
            route = complete(cluster, f"prompt {i} " * 20).headers["x-baton-route"]
            decode, prefill = (route.split(f"{role}=")[1].split(";")[0] for role in ("decode", "prefill"))
            assert prints[decode] == prints[prefill]
        cluster.signal("prefill-1", signal.SIGTERM)
        assert complete(cluster, "still here " * 20).status_code == 200
