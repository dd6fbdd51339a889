"""One request's spans, from the client's header to the prefill worker, at a collector that speaks OTLP."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.cluster.membership import InMemoryMembership
from baton.config import ClusterConfig, RouterConfig, TracingConfig
from baton.rpc.channel import Channels
from baton.tracing import OFF, Tracer, make_tracer
from baton.types import Member, Role
from services.router.__main__ import build
from services.router.app import make_app
from services.router.events import front
from services.router.workers import Workers
from tests.cluster import running_cluster
from tests.otlp import Told, collector
from tests.properties.toy import BLOCK_SIZE
from tests.workers import BLOCK_BYTES, NUM_BLOCKS, PATIENT_S, Pool, Worker, until, worker

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": "demo-model", "prompt": [(7 * i) % 50 for i in range(60)], "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def client(demo_model: Path, tracer: Tracer, *members: tuple[str, Role, Worker]) -> AsyncIterator[httpx.AsyncClient]:
    """Of a router in front of these workers."""
    hub = {
        name: Member(id=name, role=role, address=w.address, fingerprint="f", block_size=BLOCK_SIZE, max_model_len=NUM_BLOCKS * BLOCK_SIZE)
        for name, role, w in members
    }
    channels = Channels(PATIENT_S)
    workers = Workers(InMemoryMembership(hub), channels, lease_s=PATIENT_S)
    workers.start()
    config = RouterConfig(
        model=str(demo_model), served_model_name="demo-model", policy="prefix_aware", cluster=ClusterConfig(lease_s=PATIENT_S)
    )
    gateway = build(config, workers, channels, tracer)
    try:
        await until(lambda: sum(each.usable for each in workers.all()) == len(hub))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front(make_app(gateway))), base_url="http://router") as made:
            yield made
    finally:
        await workers.close()
        await channels.close()


def tracers(url: str, *services: str, sample: float = 1.0) -> list[Tracer]:
    return [make_tracer(TracingConfig(endpoint=url, interval_s=0.1, sample=sample), service, f"{service}-0") for service in services]


async def closed(made: list[Tracer]) -> None:
    for tracer in made:
        await asyncio.to_thread(tracer.close)


def by_name(spans: list[Told]) -> dict[str, Told]:
    return {span.name: span for span in spans}


async def test_a_request_is_one_tree_of_spans_over_all_processes(demo_model: Path) -> None:
    pool: Pool = {}
    with collector() as spans:
        made = tracers(spans.url, "router", "decode", "prefill")
        async with (
            worker(Role.PREFILL, pool, name="p", tracer=made[2]) as p,
            worker(Role.DECODE, pool, name="d", tracer=made[1], lease_s=PATIENT_S) as d,
        ):
            async with client(demo_model, made[0], ("p", Role.PREFILL, p), ("d", Role.DECODE, d)) as http:
                answer = await http.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
                assert answer.status_code == 200, answer.text
            await asyncio.gather(p.is_idle(), d.is_idle())
        await closed(made)
        told = spans.wait(7)
        found = by_name(told)
    assert {span.trace for span in found.values()} == {TRACE}
    ways = {"text_completion demo-model": CALLER}
    for child, parent in (
        ("generate d", "text_completion demo-model"),
        ("decode", "generate d"),
        ("kv lookup", "decode"),
        ("kv fetch", "decode"),
        ("prefill p", "decode"),
        ("prefill", "prefill p"),
    ):
        ways[child] = found[parent].id
    assert {name: span.parent for name, span in found.items()} == ways
    assert {name: span.service for name, span in found.items()} == {
        "text_completion demo-model": "baton-router",
        "generate d": "baton-router",
        "decode": "baton-decode",
        "kv lookup": "baton-decode",
        "kv fetch": "baton-decode",
        "prefill p": "baton-decode",
        "prefill": "baton-prefill",
    }
    whole, route = found["text_completion demo-model"].values, found["generate d"].values
    assert whole["gen_ai.operation.name"] == "text_completion"
    assert (whole["gen_ai.usage.input_tokens"], whole["gen_ai.usage.output_tokens"]) == (60, 5)
    assert whole["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < whole["gen_ai.response.time_to_first_chunk"] <= found["text_completion demo-model"].seconds
    assert (route["baton.route.decode"], route["baton.route.prefill"], route["baton.route.candidates"]) == ("d", "p", ["p"])
    assert route["baton.route.reason"]
    assert route["baton.route.num_workers"] == 2
    assert route["baton.route.outcome"].startswith(route["baton.route.reason"])
    assert found["decode"].values["baton.prefill"] == "p"
    assert found["prefill"].values["baton.kv.computed_tokens"] == 60
    fetched = [span.values for span in told if span.name == "kv fetch"]
    assert sum(each["baton.kv.blocks"] for each in fetched) == 60 // BLOCK_SIZE
    assert {(each["baton.kv.tier"], each["baton.kv.bytes"] // each["baton.kv.blocks"]) for each in fetched} == {("pool", BLOCK_BYTES)}
    assert not any(span.failed for span in found.values())


async def test_a_lost_worker_leaves_a_failed_span_and_the_next_one_beside_it(demo_model: Path) -> None:
    with collector() as spans:
        (tracer,) = made = tracers(spans.url, "router")
        async with (
            worker(Role.UNIFIED, {}, name="a") as a,
            worker(Role.UNIFIED, {}, name="b") as b,
            client(demo_model, tracer, ("a", Role.UNIFIED, a), ("b", Role.UNIFIED, b)) as http,
        ):
            a.intake.draining = True
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        await closed(made)
        found = by_name(spans.wait(3))
    assert found["generate a"].failed
    assert found["generate a"].values["error.type"] == "draining"
    assert found["generate a"].parent == found["generate b"].parent == found["text_completion demo-model"].id
    assert found["text_completion demo-model"].values["baton.moves"] == 1


async def test_what_a_caller_does_not_sample_is_nowhere_recorded(demo_model: Path) -> None:
    with collector() as spans:
        made = tracers(spans.url, "router", "unified")
        async with worker(Role.UNIFIED, {}, name="u", tracer=made[1]) as u, client(demo_model, made[0], ("u", Role.UNIFIED, u)) as http:
            for flag in ("00", "01"):
                headers = {"traceparent": f"00-{TRACE}-{CALLER}-{flag}"}
                assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
            assert (await http.post("/v1/completions", json=BODY, headers={"traceparent": "nonsense"})).status_code == 200
        await closed(made)
        found = spans.wait(6)
    assert len(found) == 6
    assert [span.trace == TRACE for span in found].count(True) == 3


async def test_a_collector_that_is_away_costs_a_request_nothing(demo_model: Path) -> None:
    made = tracers("http://127.0.0.1:9/v1/traces", "unified")
    async with worker(Role.UNIFIED, {}, name="u", tracer=made[0]) as u, client(demo_model, made[0], ("u", Role.UNIFIED, u)) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    await closed(made)


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert make_tracer(TracingConfig(), "router", "r") is OFF


@pytest.mark.parametrize(("service", "kind"), [("router", "Router"), ("prefill", "Worker"), ("decode", "Worker")])
def test_without_the_packages_there_is_a_clear_error_before_a_model_is_loaded(service: str, kind: str) -> None:
    program = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        f"from services.{service}.__main__ import serve, run_service, {kind}Config\n"
        f"run_service('{service}', {kind}Config, serve)"
    )
    settings = ["model=/there/is/none", "tracing.endpoint=http://127.0.0.1:4318/v1/traces"]
    settings += [f"role={service}"] if kind == "Worker" else ["http_port=0"]
    ended: Any = subprocess.run([sys.executable, "-c", program, *settings], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "pip install 'baton[otel]'" in ended.stderr


@pytest.mark.parametrize("wrong", ["localhost:4318", "grpc://collector:4317"])
def test_an_endpoint_that_is_no_url_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        TracingConfig(endpoint=wrong)


@pytest.mark.slow
def test_in_a_real_cluster_the_push_of_the_kv_is_a_span_with_its_bytes(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as spans:
        monkeypatch.setenv("BATON_TRACING__ENDPOINT", spans.url)
        with running_cluster(model=demo_model, prefill=1, decode=1) as running:
            body = {"model": "demo-model", "messages": [{"role": "user", "content": "count to ten " * 60}], "max_tokens": 4}
            assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        found = by_name(spans.spans)  # a process that ends has sent its own
    push, prefill = found["kv push"], found["prefill"].values
    assert push.parent == found["prefill prefill-0"].id
    assert push.values["baton.kv.blocks"] == prefill["baton.kv.pushed_blocks"] > 0
    assert push.values["baton.kv.bytes"] == prefill["baton.kv.pushed_bytes"] == push.values["baton.kv.blocks"] * 6 * 2 * 2 * 32 * 16 * 4
    assert found["chat demo-model"].values["gen_ai.operation.name"] == "chat"
