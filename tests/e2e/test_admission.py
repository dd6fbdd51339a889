"""Who is let in, when, and what the others are told: a real cluster with tenants and one place, the official client, gRPC, TLS."""

import json
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest

from baton.cluster.machine import free_port
from baton.rpc.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.certificates import certificate
from tests.cluster import RunningCluster, running_cluster, until
from tests.e2e.test_up import BATON, baton

SLOW_S = 6  # between requests that the tenant may have; its test sends three in less


@pytest.fixture(scope="module")
def cluster(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("keys")
    limits: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"most_urgent": -1},
        "slow": {"requests_per_s": 1 / SLOW_S},
        "few": {"tokens_per_min": 60},
        "low": {"priority": 5},
    }
    for name in limits:
        (folder / name).write_text(f"sk-{name}\n")
    tenants = [{"name": name, "key_file": str(folder / name), **own} for name, own in limits.items()]
    settings = [f"tenants={json.dumps(tenants)}", "admission.max_running=1", "admission.max_waiting=3", "cluster.lease_s=2"]
    options = [part for setting in settings for part in ("--set", f"router.{setting}")]
    with running_cluster(model=demo_model, prefill=1, decode=1, kvstore=0, options=options) as running:
        yield running


@pytest.fixture(autouse=True)
def whole(cluster: RunningCluster) -> None:
    cluster.wait_ready()


def client(cluster: RunningCluster, key: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=retries)


def post(cluster: RunningCluster, key: str = "sk-one", headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    body = {"prompt": "What is Baton?", "max_tokens": 4, "ignore_eos": True, **body}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}", **(headers or {})}, timeout=60)


def metric(cluster: RunningCluster, name: str, **labels: str) -> float:
    """The sum of its samples with these labels."""
    lines = [
        line for line in httpx.get(f"{cluster.url}/metrics").text.splitlines() if line.startswith((f"baton:{name}{{", f"baton:{name} "))
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(f'{key}="{value}"' in line for key, value in labels.items()))


class Occupied:
    """A stream that has the only place until it is left, long before its end."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._http = httpx.Client(timeout=60, headers={"authorization": "Bearer sk-one"})
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "n": 16, "ignore_eos": True, "stream": True}
        self._stream = self._http.stream("POST", f"{cluster.url}/v1/completions", json=body)

    def __enter__(self) -> httpx.Response:
        return self._stream.__enter__()

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)  # type: ignore[arg-type]
        self._http.close()


def in_background(call: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def test_only_who_has_a_key_may_ask(cluster: RunningCluster) -> None:
    refused = metric(cluster, "requests_refused_total", reason="key")
    for key in ("wrong", "sk-one2"):
        with client(cluster, key) as made, pytest.raises(openai.AuthenticationError) as caught:
            made.completions.create(model="demo-model", prompt="x")
        assert caught.value.code == "invalid_api_key"
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = httpx.post(f"{cluster.url}{path}", json={"prompt": "x"})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401
    assert metric(cluster, "requests_refused_total", reason="key") == refused + 7
    assert httpx.get(f"{cluster.url}/health").status_code == 200
    with client(cluster, "sk-two") as made:
        assert made.completions.create(model="demo-model", prompt="x", max_tokens=2).choices[0].text


def test_the_command_line_shows_its_key(cluster: RunningCluster, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at, "input_length": 512, "output_length": 2, "hash_ids": [at]} for at in (0, 9)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    commands = (
        ("chat", "hi", "--max-tokens", "2"),
        ("bench", "--num-requests", "2", "--concurrency", "1", "--input-len", "8", "--output-len", "2"),
        ("replay", str(trace), "--seconds", "0", "--length-scale", "0.125"),
    )
    for command in commands:
        for key, says in (("", "an API key is needed"), ("wrong", "this API key is not known here"), ("schlüssel", "printable ASCII")):
            ran = baton(*command, "--url", cluster.url, OPENAI_API_KEY=key)
            assert ran.returncode == 2, ran.stderr
            assert says in ran.stderr
            assert "--api-key" in ran.stderr
            assert "Traceback" not in ran.stderr
        shown = baton(*command, "--url", cluster.url, "--api-key", "sk-one", OPENAI_API_KEY="wrong")
        assert shown.returncode == 0, shown.stderr
    assert baton(*commands[0], "--url", cluster.url, OPENAI_API_KEY="sk-one").returncode == 0
    assert f"{cluster.url}/nothing answers 404" in baton("status", "--url", f"{cluster.url}/nothing").stderr


def test_a_tenants_rate_is_kept_and_the_client_comes_again_when_it_is_told(cluster: RunningCluster) -> None:
    began = time.monotonic()
    with client(cluster, "sk-slow") as made:
        made.completions.create(model="demo-model", prompt="x", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            made.completions.create(model="demo-model", prompt="x", max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"
    assert SLOW_S - (time.monotonic() - began) <= int(caught.value.response.headers["retry-after"]) <= SLOW_S
    assert "requests_per_s" in caught.value.message
    with client(cluster, "sk-slow", retries=1) as made:
        assert made.completions.create(model="demo-model", prompt="x", max_tokens=1).choices  # waits as long as it was told
    assert metric(cluster, "requests_refused_total", reason="rate", tenant="slow") >= 2


def test_tokens_are_counted_when_they_are_known(cluster: RunningCluster) -> None:
    assert post(cluster, "sk-few", max_tokens=100).status_code == 200
    refused = post(cluster, "sk-few")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 30  # 40 and the prompt too many, at one a second
    assert post(cluster, "sk-two").status_code == 200


def test_requests_wait_for_the_place_in_order_and_the_queue_is_bounded(cluster: RunningCluster) -> None:
    asked = {
        "low": ("sk-low", {"priority": -9}),
        "flex": ("sk-two", {"service_tier": "flex"}),
        "normal": ("sk-two", {}),
        "urgent": ("sk-two", {"service_tier": "priority"}),
    }
    waiting: dict[str, tuple[threading.Thread, list[httpx.Response]]] = {}

    def come(name: str) -> None:
        key, body = asked[name]
        waiting[name] = in_background(lambda: post(cluster, key, {"x-request-id": name}, **body))

    with Occupied(cluster):
        for place, name in enumerate(("low", "flex", "normal"), 1):
            come(name)
            until(lambda place=place: metric(cluster, "num_requests_queued") == place)
        refused = post(cluster, "sk-low")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        come("urgent")
        waiting["low"][0].join(20)  # the least urgent one has to go
        assert waiting["low"][1][0].status_code == 429
    placed: list[tuple[float, str]] = []
    for name in ("flex", "normal", "urgent"):
        waiting[name][0].join(60)
        assert waiting[name][1][0].status_code == 200
        assert "queued=" in waiting[name][1][0].headers["x-baton-route"]
        page = httpx.get(f"{cluster.url}/debug/routes/{name}", headers={"authorization": "Bearer sk-two"}).json()
        placed.append((page["sequences"][0]["decisions"][0]["at"], name))
    assert [name for _, name in sorted(placed)] == ["urgent", "normal", "flex"]
    assert metric(cluster, "requests_refused_total", reason="full", tenant="low") == 2
    assert metric(cluster, "num_requests_queued") == 0


def test_who_goes_away_leaves_the_queue_at_once(cluster: RunningCluster) -> None:
    with Occupied(cluster):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{cluster.url}/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer sk-two"}, timeout=0.3)
        until(lambda: metric(cluster, "num_requests_queued") == 0, within_s=15)  # long before admission.max_wait_s
    assert post(cluster).status_code == 200


def test_what_cannot_be_in_time_is_refused_at_once(cluster: RunningCluster) -> None:
    until(lambda: "predicted_ttft" in post(cluster, prompt=f"{time.monotonic()} " * 60).headers["x-baton-route"])
    refused = post(cluster, headers={"x-slo-ttft-ms": "0.01"}, prompt="again " * 500)
    assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (429, "overloaded", "1")
    assert "its first token is expected after" in refused.json()["error"]["message"]
    choppy = post(cluster, headers={"x-slo-tpot-ms": "0.0001"})
    assert (choppy.status_code, "a token is expected every" in choppy.json()["error"]["message"]) == (429, True)
    assert post(cluster, headers={"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "10000"}).status_code == 200
    for wrong in ("soon", "-1", "nan", "inf", "0"):
        answer = post(cluster, headers={"x-slo-ttft-ms": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-slo-ttft-ms")
    assert post(cluster, service_tier="gold").json()["error"]["param"] == "service_tier"


def test_a_decision_can_be_looked_up_by_who_asked(cluster: RunningCluster) -> None:
    until(lambda: "predicted_ttft" in post(cluster, prompt=f"{time.monotonic()} " * 60).headers["x-baton-route"])
    answer = post(cluster, headers={"x-request-id": "why"}, prompt="Explain yourself. " * 100, n=2)
    assert answer.headers["x-request-id"] == "why"
    page = httpx.get(f"{cluster.url}/debug/routes/why", headers={"authorization": "Bearer sk-one"}).json()
    assert len(page["sequences"]) == 2
    first = page["sequences"][0]
    [decision] = first["decisions"]
    assert first["prompt_tokens"] == decision["facts"]["num_prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert decision["ttft_s"]["actual"] > 0
    assert decision["ttft_s"]["predicted"] == pytest.approx(decision["candidates"][0]["ttft_s"] + (decision["ttft_s"]["beside"] or 0))
    assert first["decode"] == decision["chosen"]["decode"] == decision["candidates"][0]["decode"]
    chosen, *others = decision["candidates"]  # a decode worker alone is told of, but is none while a prefill worker is idle
    assert chosen["cost_s"] <= min((other["cost_s"] for other in others if other["prefill"] != "local"), default=chosen["cost_s"])
    assert set(decision["candidates"][0]["workers"]) >= {"decode-0"}
    for key, name in (("sk-two", "why"), ("sk-one", "never")):
        other = httpx.get(f"{cluster.url}/debug/routes/{name}", headers={"authorization": f"Bearer {key}"})
        assert (other.status_code, other.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{cluster.url}/debug/routes/why").status_code == 401


async def test_the_same_over_grpc(cluster: RunningCluster) -> None:
    greedy = common_pb2.SamplingParams(max_tokens=4, temperature=0)
    key = (("authorization", "Bearer sk-one"),)

    async def ask(metadata: Any = key, **fields: Any) -> list[router_pb2.RouterGenerateResponse]:
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            request = router_pb2.RouterGenerateRequest(text="word " * 200, sampling=greedy, **fields)
            return [answer async for answer in router_pb2_grpc.RouterStub(channel).Generate(request, metadata=metadata)]

    assert (await ask(request_id="by-grpc", priority=-1, ttft_slo_s=60, itl_slo_s=60))[-1].usage.completion_tokens == 4
    async with httpx.AsyncClient(base_url=cluster.url, headers={"authorization": "Bearer sk-one"}) as http:
        assert (await http.get("/debug/routes/by-grpc")).status_code == 200
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(metadata=())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(ttft_slo_s=1e-6)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata() or ())
    assert int(trailing["grpc-retry-pushback-ms"]) >= 1
    with pytest.raises(grpc.aio.AioRpcError, match="above 0"):
        await ask(itl_slo_s=-1)
    with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
        await ask(stop=["x" * (17 << 20)])


def test_without_prefill_workers_prompts_are_computed_and_that_is_loud(cluster: RunningCluster) -> None:
    cluster.signal("prefill-0", signal.SIGSTOP)
    try:
        until(lambda: httpx.get(f"{cluster.url}/ready").json()["status"] == "degraded")
        ready = httpx.get(f"{cluster.url}/ready")
        assert ready.status_code == 200
        assert "no prefill worker is ready" in ready.json()["degraded"]
        assert metric(cluster, "degraded") == 1
        answer = post(cluster, prompt="Nobody computes this elsewhere. " * 30)
        assert answer.status_code == 200
        assert "prefill=local" in answer.headers["x-baton-route"]
        assert "degraded" in answer.headers["x-baton-route"]
    finally:
        cluster.signal("prefill-0", signal.SIGCONT)
    cluster.wait_ready()
    assert httpx.get(f"{cluster.url}/ready").json() == {"status": "ready", "problem": None, "degraded": None}
    assert metric(cluster, "degraded") == 0


def test_nobody_waits_for_workers_that_are_gone(cluster: RunningCluster) -> None:
    with Occupied(cluster):
        waiting = [in_background(lambda: post(cluster, "sk-two")) for _ in range(3)]
        until(lambda: metric(cluster, "num_requests_queued") == 3)
        for name in ("prefill-0", "decode-0"):
            cluster.signal(name, signal.SIGSTOP)
        try:
            for thread, answers in waiting:
                thread.join(30)
                assert answers
                error = answers[0].json()["error"]
                assert (answers[0].status_code, error["code"]) == (503, "no_workers")
                assert "start one" in error["message"]
                assert answers[0].headers["retry-after"] == "1"
        finally:
            for name in ("prefill-0", "decode-0"):
                cluster.signal(name, signal.SIGCONT)
    cluster.wait_ready()
    assert post(cluster).status_code == 200
    cluster.assert_clean()


# -- TLS and bodies


def test_https_and_a_bound_on_bodies(tiny_model: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    port = free_port()
    settings = [f"model={tiny_model}", f"http_port={port}", f"tls.cert={cert}", f"tls.key={key}", "max_body=1KiB"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*BATON, "serve", "router", *settings], stdout=log, stderr=log)
    try:
        trust = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=10) as http:
            deadline = time.monotonic() + 20
            while True:
                try:
                    assert http.get("/health").status_code == 200
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.1)
            huge = http.post("/v1/completions", json={"prompt": "x" * 2000})
            assert (huge.status_code, huge.json()["error"]["code"]) == (413, "request_too_large")
            assert "max_body" in huge.json()["error"]["message"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://127.0.0.1:{port}/health")  # nobody vouches for it
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_certificate_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    for settings, says in (
        ([f"tls.cert={cert}", f"tls.key={tmp_path / 'none'}"], "tls.key: there is no file"),
        ([f"tls.cert={key}", f"tls.key={cert}"], "are not a certificate and its unencrypted key"),
    ):
        ran = baton("serve", "router", f"model={tiny_model}", *settings)
        assert ran.returncode == 2
        assert says in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
