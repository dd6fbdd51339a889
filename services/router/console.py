"""The console: one page for the one who runs a fleet, and the figures that it asks for every two seconds.

The page is console.html with console.css and console.js put in, so that it comes whole or not at all, and the browser is told to run these
very bytes and nothing else. Figures are this router's own, and count from its start: the page takes the differences. Nobody's text is in
them, and of requests those of the tenant alone who asks. What it knows of a large fleet is told by pool, with the workers that most want
to be looked at.
"""

import base64
import hashlib
import heapq
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from baton.metrics import RouterMetrics
from baton.types import MemberState, Role
from services.router.explain import Record
from services.router.fleet import Worker

if TYPE_CHECKING:
    from services.router.app import Gateway

Json = dict[str, Any]
MOST_WORKERS = 32  # shown, of a pool
MOST_ROUTES = 30
_PROMPT = 1024  # tokens of the one that a worker's pace is told by
_COUNTERS = (
    "prompt_tokens",
    "cached_tokens",
    "generation_tokens",
    "migrations",
    "request_success",
    "request_failures",
    "requests_refused",
)
_HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds")


def mount(app: FastAPI, gateway: "Gateway") -> None:
    """/console, /console/state for it, and a way to it from where a browser begins."""
    page, headers = _page()
    since = secrets.token_hex(8)  # whose counters they are: with several routers, or a new one, differences would mean nothing

    @app.get("/")
    async def root() -> Response:
        return RedirectResponse("/console")

    @app.get("/console")
    async def console() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/console/state")
    async def state(request: Request) -> Response:
        latest = _routes(gateway, request.headers.get("authorization"))
        return JSONResponse({"since": since, **_fleet(gateway), **_figures(gateway.metrics), "routes": latest}, headers=_COMMON)


_COMMON = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _page() -> tuple[str, dict[str, str]]:
    """The page and its headers. With Trusted Types the browser refuses to read HTML out of a string, too."""
    html, style, script = (Path(__file__).with_suffix(suffix).read_text("utf-8") for suffix in (".html", ".css", ".js"))
    rules = {
        "default-src": "'none'",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    page = html.replace("<style></style>", f"<style>{style}</style>").replace("<script></script>", f"<script>{script}</script>")
    return page, {**_COMMON, "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items())}


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _fleet(gateway: "Gateway") -> Json:
    placer, workers = gateway.dispatcher.placer, gateway.dispatcher.workers
    problem, degraded, broken = gateway.not_ready(), placer.degraded(), frozenset(placer.breakers.open())
    by_role: dict[Role, list[Worker]] = {}
    for worker in workers.all():
        by_role.setdefault(worker.member.role, []).append(worker)
    if Role.UNIFIED not in by_role:  # neither can be missed
        by_role = {Role.PREFILL: [], Role.DECODE: [], **by_role}
    return {
        "model": gateway.model,
        "policy": gateway.dispatcher.policy_name,
        "keys": bool(gateway.tenants.by_key),
        "status": "not ready" if problem is not None else "degraded" if degraded else "ready",
        "why": problem or degraded or None,
        "queued": gateway.metrics.queued(),
        "pools": [_pool(role, by_role[role], broken) for role in Role if role in by_role],
        "others": Counter(str(member.role) for member in workers.others.values()),
    }


def _pool(role: Role, workers: Sequence[Worker], broken: frozenset[str]) -> Json:
    """All of it in sums, and some of its workers: those in trouble first, then the busiest, where there are too many for a page."""
    states = {worker.member.id: _state(worker) for worker in workers}

    def calm(worker: Worker) -> tuple[bool, float, int, str]:
        name, load = worker.member.id, worker.load
        return states[name] == MemberState.READY and name not in broken, -_used(worker), -load.num_running - load.num_waiting, name

    speaking = [worker.load for worker in workers if worker.state is not None]  # what the others said last is not so any more
    many = len(workers) > MOST_WORKERS
    shown = heapq.nsmallest(MOST_WORKERS, workers, key=calm) if many else sorted(workers, key=lambda worker: worker.member.id)
    return {
        "role": str(role),
        "states": Counter(states.values()),
        "breakers_open": sum(worker.member.id in broken for worker in workers),
        "versions": len({worker.member.fingerprint for worker in workers}),
        "running": sum(load.num_running for load in speaking),
        "waiting": sum(load.num_waiting for load in speaking),
        "blocks_total": sum(load.blocks_total for load in speaking),
        "blocks_free": sum(load.blocks_free for load in speaking),
        "shown": [_worker(worker, states[worker.member.id], worker.member.id in broken) for worker in shown],
        "left_out": len(workers) - len(shown),
    }


def _worker(worker: Worker, state: str, broken: bool) -> Json:
    """`prompt_tokens_per_s`, and `step_s` of a step with what runs now, as it has learned its pace; None: it has not met such work yet."""
    load, pace = worker.load, worker.load.pace.by_the_clock()
    prompt_s = pace.base_s + pace.prompt_s(_PROMPT)
    return {
        "id": worker.member.id,
        "state": state,
        "breaker": "open" if broken else "closed",
        "running": load.num_running,
        "waiting": load.num_waiting,
        "used": _used(worker),
        "blocks_total": load.blocks_total,
        "blocks_cached": load.blocks_cached,
        "prompt_tokens_per_s": _PROMPT / prompt_s if pace.token_s or pace.pair_s else None,
        "step_s": pace.base_s + pace.decode_s(load.num_running, load.num_context_tokens) if pace.row_s or pace.context_s else None,
        "version": worker.member.fingerprint[:8],
        "tensor_parallel_size": worker.member.tensor_parallel_size,
    }


def _state(worker: Worker) -> str:
    """As in /cluster."""
    if worker.state is None:
        return "lost"
    return str(MemberState.DRAINING if worker.member.state is MemberState.DRAINING else worker.state)


def _used(worker: Worker) -> float:
    """Share of its KV blocks that requests hold."""
    load = worker.load
    return 1 - load.blocks_free / load.blocks_total if load.blocks_total else 0.0


def _figures(metrics: RouterMetrics) -> Json:
    """Counters, and histograms as [upper bound, how many were no longer] (the last bound is none: None)."""
    families = {family.name.removeprefix("baton:"): family for family in metrics.families()}
    totals = {name: sum(s.value for s in families[name].samples if s.name.endswith("_total")) for name in _COUNTERS}
    histograms = {
        name: [
            (None if sample.labels["le"] == "+Inf" else float(sample.labels["le"]), sample.value)
            for sample in families[name].samples
            if sample.name.endswith("_bucket")
        ]
        for name in _HISTOGRAMS
    }
    return {"totals": totals, "histograms": histograms}


def _routes(gateway: "Gateway", authorization: str | None) -> list[Json] | None:
    """The latest requests of whoever asks; None: a key is needed for that. Raises Unauthorized for one that is not known."""
    if authorization is None and gateway.tenants.others is None:
        return None
    tenant = gateway.tenant(authorization)
    latest = gateway.generator.records.latest(tenant.name, MOST_ROUTES)
    return [_route(request_id, record) for request_id, record in latest if record.routes and record.routes[0].decisions]


def _route(request_id: str, record: Record) -> Json:
    """Its first sequence, as it was placed last where it goes on. Until the first token has come (`ttft_s`), `prefill` is the one that was
    chosen."""
    route, decisions = record.routes[0], record.routes[0].decisions
    decision = next((each for each in reversed(decisions) if each.placement.decode == route.decode), decisions[-1])  # not a hedge that lost
    prefill = route.prefill if decision.ttft_s is not None else "".join(decision.placement.prefills[:1])
    return {
        "request_id": request_id,
        "at": decision.at,
        "decode": route.decode,
        "prefill": prefill or "local",
        "reason": route.reason,
        "prompt_tokens": route.num_prompt_tokens,
        "cached_tokens": route.num_cached_tokens,
        "predicted_s": decision.placement.ttft_s,
        "ttft_s": decision.ttft_s,
        "queued_s": route.queued_s,
        "moves": len(route.moves),
        "hedged": route.hedged or None,
        "num_sequences": record.num_sequences,
        "degraded": bool(decision.degraded),
    }
