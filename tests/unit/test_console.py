"""What the console is told, and what the browser is told of its page."""

import base64
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.types import Load, Member, MemberState, Pace, Role, StateUpdate
from services.router.app import Gateway, make_app
from services.router.console import MOST_ROUTES, MOST_WORKERS
from services.router.tenants import Tenant, Tenants, _digest
from tests.unit.test_gateway import NOTHING, gateway


def join(made: Gateway, name: str, role: Role, load: Load, *, lost: bool = False, fingerprint: str = "f") -> None:
    fleet = made.dispatcher.workers._fleet
    worker = fleet.add(Member(id=name, role=role, address="", fingerprint=fingerprint, block_size=16))
    fleet.update(worker, StateUpdate(sequence=0, state=MemberState.READY, load=load, snapshot=True))
    if lost:
        fleet.silent(worker)


def routed(made: Gateway, request_id: str, tenant: str = "", **known: Any) -> None:
    """A request that was placed, with what became known of its route."""
    records, placer = made.generator.records, made.dispatcher.placer
    route = dataclasses.replace(made.dispatcher.route(), **known)
    records.add(records.start(request_id, tenant), route)
    route.on_decision(placer.decide(placer.facts(100, 10), NOTHING))


async def get(made: Gateway, path: str = "/console/state", key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(made)), base_url="http://router") as client:
        return await client.get(path, headers=headers)


async def test_the_page_comes_whole_and_the_browser_may_run_nothing_else(demo_model: Path) -> None:
    answer = await get(gateway(demo_model, Role.UNIFIED), "/console")
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert (rules["default-src"], rules["connect-src"], rules["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{element}>(.+?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "://" not in answer.text, "nothing is fetched from elsewhere"
    assert not re.search(r"""\s(style|on\w+)=["']""", answer.text), "the rules would forbid it"


async def test_a_fleet_of_a_thousand_is_told_in_sums_and_its_trouble_by_name(demo_model: Path) -> None:
    made = gateway(demo_model)
    for i in range(999):
        join(made, f"decode-{i:03}", Role.DECODE, Load(num_running=i % 7, blocks_total=100, blocks_free=100 - i % 50))
    join(made, "decode-999", Role.DECODE, Load(num_running=5, blocks_total=100, blocks_free=50), lost=True)
    for _ in range(3):
        made.dispatcher.placer.breakers.failed("decode-000", "")
    answer = await get(made)
    state = answer.json()
    prefill, decode = state["pools"]
    assert (prefill["role"], prefill["states"], prefill["shown"]) == ("prefill", {}, [])
    assert (decode["states"], decode["breakers_open"], decode["left_out"]) == ({"ready": 999, "lost": 1}, 1, 1000 - MOST_WORKERS)
    assert decode["running"] == sum(i % 7 for i in range(999)), "of the lost one nobody knows"
    names = [worker["id"] for worker in decode["shown"]]
    assert set(names[:2]) == {"decode-000", "decode-999"}
    assert [worker["used"] for worker in decode["shown"][2:]] == [pytest.approx(0.49)] * 19 + [pytest.approx(0.48)] * 11
    assert state["status"] == "degraded"
    assert "prefill" in state["why"]
    assert len(answer.content) < 20_000


async def test_few_workers_keep_their_places(demo_model: Path) -> None:
    made = gateway(demo_model)
    pace = Pace(base_s=0.01, token_s=1e-5, row_s=1e-3)
    join(made, "b", Role.UNIFIED, Load(num_running=4, blocks_total=10, blocks_free=1, pace=pace), fingerprint="new")
    join(made, "a", Role.UNIFIED, Load(blocks_total=10, blocks_free=10))
    (pool,) = (await get(made)).json()["pools"]
    a, b = pool["shown"]
    assert (a["id"], a["prompt_tokens_per_s"], a["step_s"]) == ("a", None, None), "it has met no work"
    assert (b["id"], b["used"], b["step_s"]) == ("b", pytest.approx(0.9), pytest.approx(0.014))
    assert b["prompt_tokens_per_s"] == pytest.approx(1024 / (0.01 + 1024e-5))
    assert (pool["versions"], pool["left_out"]) == (2, 0)


async def test_the_figures_are_those_of_the_metrics(demo_model: Path) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    metrics = made.metrics
    metrics.prompt_tokens.inc(10)
    metrics.cached_tokens.inc(4)
    metrics.success("stop")
    metrics.success("length")
    for seconds in (0.02, 0.04, 1000.0):
        metrics.time_to_first_token.observe(seconds)
    state = (await get(made)).json()
    assert state["totals"] | {"prompt_tokens": 10, "cached_tokens": 4, "request_success": 2, "request_failures": 0} == state["totals"]
    buckets = dict(map(tuple, state["histograms"]["time_to_first_token_seconds"]))
    assert (buckets[0.01], buckets[0.025], buckets[0.05], buckets[120], buckets[None]) == (0, 1, 2, 2, 3)


async def test_the_latest_routes_come_with_their_reasons(demo_model: Path) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    for i in range(MOST_ROUTES + 5):
        routed(made, f"request-{i}", decode="unified", reason="<b>free</b>", num_prompt_tokens=100, num_cached_tokens=i, moves=["gone"])
    routes = (await get(made)).json()["routes"]
    assert [route["request_id"] for route in routes] == [f"request-{i}" for i in range(MOST_ROUTES + 4, 4, -1)]
    told = {
        name: routes[0][name] for name in ("decode", "prefill", "reason", "prompt_tokens", "cached_tokens", "ttft_s", "moves", "degraded")
    }
    assert told == {
        "decode": "unified",
        "prefill": "local",
        "reason": "<b>free</b>",
        "prompt_tokens": 100,
        "cached_tokens": MOST_ROUTES + 4,
        "ttft_s": None,
        "moves": 1,
        "degraded": False,
    }


async def test_a_tenant_sees_its_own_routes_alone(demo_model: Path) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    made.tenants = Tenants({_digest("sk-one"): Tenant(name="one"), _digest("sk-two"): Tenant(name="two")}, others=None)
    routed(made, "ours", "one", decode="unified")
    routed(made, "theirs", "two", decode="unified")
    without = (await get(made)).json()
    assert (without["routes"], without["keys"], without["status"]) == (None, True, "ready"), "the fleet is as open as /cluster"
    assert [route["request_id"] for route in (await get(made, key="sk-one")).json()["routes"]] == ["ours"]
    wrong = await get(made, key="sk-none")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    for text in (str(without), (await get(made, key="sk-one")).text):
        assert "theirs" not in text
        assert "sk-" not in text
