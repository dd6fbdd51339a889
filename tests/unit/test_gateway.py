"""What the router's pages ask of its parts, and on which thread."""

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.cluster.membership import InMemoryMembership
from baton.config import RouterConfig
from baton.rpc.channel import Channels
from baton.types import BlocksStored, Load, Member, MemberState, Role, StateUpdate
from services.router.__main__ import build
from services.router.app import Gateway, describe, make_app
from services.router.policy import Facts, Placement
from services.router.view import WorkerView
from services.router.workers import HashesBySize, Workers

NOTHING = HashesBySize((), "")


def gateway(model: Path, *roles: Role) -> Gateway:
    """Of a router whose workers are known, and never asked anything."""
    channels = Channels(1.0)
    workers = Workers(InMemoryMembership(), channels, lease_s=1.0)
    for role in roles:
        join(workers, role)
    return build(RouterConfig(model=str(model)), workers, channels)


def join(workers: Workers, role: Role, instance: str = "") -> None:
    worker = workers._fleet.add(Member(id=str(role), role=role, address="", instance=instance, fingerprint="f", block_size=16))
    workers._fleet.update(worker, StateUpdate(sequence=0, state=MemberState.READY, load=Load(), snapshot=True))


async def test_an_explanation_does_not_hold_up_the_event_loop(demo_model: Path) -> None:
    made, going_on = gateway(demo_model, Role.UNIFIED), threading.Event()
    placer, records = made.dispatcher.placer, made.generator.records
    record = records.start("why", "")
    for _ in range(20):
        route = made.dispatcher.route()
        records.add(record, route)
        route.on_decision(placer.decide(placer.facts(100, 10), NOTHING))
    placed, heard = placer.policy, list[bool]()

    def policy(facts: Facts, view: Sequence[WorkerView]) -> Placement:
        heard.append(going_on.wait(5))  # what the loop does meanwhile
        return placed(facts, view)

    placer.policy = policy
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(made)), base_url="http://router") as client:
        asked = asyncio.create_task(client.get("/debug/routes/why"))
        while not (heard or asked.done() or going_on.is_set()):
            await asyncio.sleep(0.01)
            if record.routes[0].decisions:
                going_on.set()
        page = (await asked).json()
    assert heard
    assert all(heard)
    assert (page["num_sequences"], len(page["sequences"])) == (20, 8)
    assert page["sequences"][0]["decisions"][0]["chosen"]["decode"] == "unified"


async def test_gauges_run_none_of_the_routers_code_on_other_threads(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gateway(demo_model, Role.DECODE)
    view, threads = made.dispatcher.workers.view, set[threading.Thread]()

    def watched(*arguments: Any, **more: Any) -> Any:
        threads.add(threading.current_thread())
        return view(*arguments, **more)

    monkeypatch.setattr(made.dispatcher.workers, "view", watched)
    for _ in range(3):
        made.dispatcher.placer.breakers.failed("decode", "")
    keeping = asyncio.create_task(made.keep_gauges())
    await asyncio.sleep(0)
    page = (await asyncio.to_thread(made.metrics.exposition)).decode()
    keeping.cancel()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in page.splitlines() if line.startswith("baton:")}
    assert (values["baton:degraded"], values["baton:breakers_open"], values["baton:num_requests_queued"]) == (1.0, 1.0, 0.0)
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize(("num_tokens", "missing"), [(15, 15), (16, 16), (17, 1), (32, 16), (33, 1)])
def test_the_last_token_of_a_prompt_is_computed_again_and_so_is_the_block_that_it_ends(
    demo_model: Path, num_tokens: int, missing: int
) -> None:
    placer, workers = (dispatcher := gateway(demo_model, Role.UNIFIED).dispatcher).placer, dispatcher.workers
    hashes = HashesBySize(range(num_tokens), "")
    workers._fleet.index.apply("unified", [BlocksStored(tuple(hashes(16)))])
    assert placer.decide(placer.facts(num_tokens, 10), hashes).placement.missing_tokens == missing


def client(made: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(made)), base_url="http://router")


async def test_what_is_refused_has_an_id_a_line_in_the_log_and_a_count(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    caplog.set_level(logging.INFO)
    async with client(made) as http:
        for body, code in [(b"{", "invalid_request_error"), (b'{"prompt": "x", "model": "y"}', "model_not_found")]:
            answer = await http.post("/v1/completions", content=body, headers={"x-request-id": f"mine-{code}"})
            assert (answer.headers["x-request-id"], answer.json()["error"]["code"]) == (f"mine-{code}", code)
            assert f'failures_total{{code="{code}",model_name="demo-model",worker="router"}} 1.0' in made.metrics.exposition().decode()
        assert [record.__dict__["request_id"] for record in caplog.records if record.name == "services.router.edge"] == [
            "mine-invalid_request_error",
            "mine-model_not_found",
        ]
        assert (await http.get("/nowhere")).headers["x-request-id"].startswith("req-")


async def test_models_have_cards_that_clients_can_read(demo_model: Path) -> None:
    async with client(gateway(demo_model)) as http:
        (card,) = (await http.get("/v1/models")).json()["data"]
        assert card | {"id": "demo-model", "root": "demo-model", "parent": None, "permission": []} == card
        assert card["created"] > 1_700_000_000
        assert (await http.get("/v1/models/demo-model")).json() == card
        assert (await http.get("/v1/models/")).json()["data"] == [card]
        assert (await http.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("origins", [(), ("https://chat.example",)])
async def test_pages_of_other_origins_may_call_where_they_are_named(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, origins: tuple[str, ...]
) -> None:
    made = gateway(demo_model)
    made.allowed_origins = origins
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with client(made) as http:
        preflight = await http.options("/v1/chat/completions", headers=asks)
        assert (preflight.status_code, preflight.headers.get("access-control-allow-origin")) == (
            (200, "https://chat.example") if origins else (405, None)
        )
        refused = await http.post("/v1/chat/completions", content=b"{", headers={"origin": "https://chat.example"})
        assert ("x-request-id" in refused.headers.get("access-control-expose-headers", "")) is bool(origins)
        other = await http.options("/v1/chat/completions", headers={**asks, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        monkeypatch.setattr(made.tokenizer, "encode", lambda *arguments, **more: 1 / 0)
        bug = await http.post("/tokenize", json={"prompt": "x"}, headers={"origin": "https://chat.example"})
        assert (bug.status_code, "access-control-allow-origin" in bug.headers) == (500, bool(origins))


async def test_health_tells_but_does_not_depend_on_the_workers(demo_model: Path) -> None:
    async with client(gateway(demo_model)) as http:
        answer = await http.get("/health")
    assert (answer.status_code, answer.json()["ready"]) == (200, False)
    assert answer.json()["problem"]


@pytest.mark.parametrize(("size", "beside"), [(10, False), (100_000, True)])
async def test_a_large_body_is_read_beside_the_streams(demo_model: Path, monkeypatch: pytest.MonkeyPatch, size: int, beside: bool) -> None:
    made, threads = gateway(demo_model), list[threading.Thread]()
    encode = made.tokenizer.encode

    def watched(text: str, **more: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, **more)

    monkeypatch.setattr(made.tokenizer, "encode", watched)
    async with client(made) as http:
        assert (await http.post("/tokenize", json={"prompt": "a" * size})).json()["count"]
    assert [thread is not threading.current_thread() for thread in threads] == [beside]


async def test_the_successor_of_a_worker_that_is_left_alone_is_asked_at_once(demo_model: Path) -> None:
    made = gateway(demo_model, Role.PREFILL, Role.DECODE)
    placer, workers = made.dispatcher.placer, made.dispatcher.workers
    for _ in range(3):
        placer.breakers.failed("prefill", "")
    assert "prefill: left alone" in placer.degraded()
    workers._fleet.remove(workers._fleet.workers["prefill"])
    assert placer.breakers.open() == []
    join(workers, Role.PREFILL, "successor")
    assert placer.degraded() == ""
    assert {worker["breaker"] for worker in describe(made)["workers"]} == {"closed"}
