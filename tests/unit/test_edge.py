"""What is known of requests that fail: by which id, how often, and in the log."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.errors import WorkerLost
from baton.types import GenerateOutput, OutputToken, Role
from services.router.app import Gateway, make_app
from services.router.tenants import Tenants
from tests.unit.test_gateway import gateway

HELLO: dict[str, Any] = {"prompt": "hello", "max_tokens": 4}
LABELS = {"model_name": "demo-model", "worker": "router"}


async def ask(made: Gateway, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(made)), base_url="http://router") as client:
        return await client.request(method, path, headers=headers, **more)


def counted(made: Gateway, name: str, label: str) -> dict[str, float]:
    samples = [sample for family in made.metrics.families() for sample in family.samples if sample.name == f"baton:{name}_total"]
    return {sample.labels[label]: sample.value for sample in samples}


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "code"),
    [
        ("POST", "/v1/completions", {"content": b'{"prompt": '}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"json": {**HELLO, "temperature": -1}}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"json": {**HELLO, "max_tokens": 100_000}}, 400, "context_length_exceeded"),
        ("POST", "/v1/chat/completions", {"json": {"model": "x\ny" * 1000, "messages": []}}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"json": {**HELLO, "model": "x\ny" * 1000}}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"content": b"x" * (17 << 20)}, 413, "request_too_large"),
        ("POST", "/tokenize", {"json": {}}, 400, "invalid_request_error"),
        ("POST", "/v1/nothing%0Ahere", {"json": {}}, 404, "not_found"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", {"json": HELLO}, 503, "no_workers"),
        ("POST", "/v1/completions", {"json": {**HELLO, "stream": True}}, 503, "no_workers"),
    ],
)
async def test_what_fails_is_counted_and_logged_once(
    demo_model: Path, caplog: pytest.LogCaptureFixture, method: str, path: str, more: dict[str, Any], status: int, code: str
) -> None:
    caplog.set_level(logging.INFO)
    made = gateway(demo_model)
    answer = await ask(made, method, path, {"x-request-id": "mine"}, **more)
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["x-request-id"]) == (status, code, "mine")
    assert counted(made, "request_failures", "code") == {code: 1.0}
    (record,) = [record for record in caplog.records if record.name.startswith("services.router")]
    assert record.levelno == (logging.WARNING if status >= 500 else logging.INFO)
    assert record.__dict__["request_id"] == "mine"
    line = record.getMessage()
    assert line.startswith(f"mine: {method} /")
    assert f": {status} {code}: " in line
    assert line.isprintable()
    assert len(line) < 500


async def test_what_is_not_there_is_answered_with_what_is_for_clients(demo_model: Path) -> None:
    made = gateway(demo_model)
    for method, path in [("GET", "/v1/nothing"), ("PUT", "/metrics")]:
        message = (await ask(made, method, path)).json()["error"]["message"]
        listed = message.partition("; there is ")[2].split(", ")
        assert {"GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions"} <= {*listed}
        assert all(each.split(" ")[1].startswith("/v1/") for each in listed)


@pytest.mark.parametrize("path", ["/console", "/", "/health", "/v1/models"])
async def test_head_is_answered_where_get_is(demo_model: Path, path: str) -> None:
    made = gateway(demo_model)
    head, get = [await ask(made, method, path) for method in ("HEAD", "GET")]
    assert head.status_code == get.status_code < 400
    assert head.headers.get("content-type") == get.headers.get("content-type")


@pytest.mark.parametrize("text", [False, True], ids=["tokens", "characters"])
async def test_a_prompt_that_is_too_long_names_the_field_that_it_came_in(demo_model: Path, text: bool) -> None:
    made, content = gateway(demo_model), "word " * (100_000 if text else 5000)
    for path, body, field in [
        ("/v1/completions", {"prompt": content}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}, "messages"),
    ]:
        error = (await ask(made, "POST", path, json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)


async def test_who_names_no_request_is_told_one(demo_model: Path) -> None:
    made = gateway(demo_model)
    for method, path, prefix in [
        ("POST", "/v1/completions", "cmpl-"),
        ("POST", "/v1/chat/completions", "chatcmpl-"),
        ("GET", "/v1/models", "req-"),
        ("GET", "/v1/nothing", "req-"),
    ]:
        answers = [await ask(made, method, path) for _ in range(2)]
        names = {answer.headers["x-request-id"] for answer in answers}
        assert len(names) == 2
        assert all(name.startswith(prefix) for name in names)
    long = await ask(made, "GET", "/v1/models", {"x-request-id": "x" * 200})
    assert (long.status_code, long.headers["x-request-id"]) == (200, "x" * 128)


async def test_what_is_refused_is_no_failure_as_well(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = gateway(demo_model)
    made.tenants = Tenants({}, others=None)
    answer = await ask(made, "POST", "/v1/completions", json=HELLO)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert counted(made, "requests_refused", "reason") == {"key": 1.0}
    assert counted(made, "request_failures", "code") == {}
    assert [record.__dict__.get("request_id") for record in caplog.records if record.name.startswith("services.router")] == [
        answer.headers["x-request-id"]
    ]


async def test_a_bug_is_one_too_and_leaves_its_trace(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = gateway(demo_model)
    monkeypatch.setattr(made.tokenizer, "encode", lambda *arguments, **more: 1 / 0)
    answer = await ask(made, "POST", "/v1/completions", {"x-request-id": "mine"}, json=HELLO)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.json()["error"]["code"] == "internal_error"
    assert counted(made, "request_failures", "code") == {"internal_error": 1.0}
    (record,) = caplog.records
    assert (record.levelno, record.__dict__["request_id"], bool(record.exc_info)) == (logging.ERROR, "mine", True)


async def test_a_stream_that_breaks_off_is_one_too(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = gateway(demo_model, Role.UNIFIED)

    async def lost(*arguments: Any) -> AsyncGenerator[GenerateOutput]:
        yield GenerateOutput(tokens=(OutputToken(100),))
        raise WorkerLost("it is gone")

    monkeypatch.setattr(made.dispatcher, "generate", lost)
    answer = await ask(made, "POST", "/v1/completions", {"x-request-id": "mine"}, json={**HELLO, "stream": True})
    *_, error, end = answer.text.removesuffix("\n\n").split("\n\n")
    assert (answer.status_code, end) == (200, "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert counted(made, "request_failures", "code") == {"worker_lost": 1.0}
    (record,) = caplog.records
    assert (record.levelno, record.__dict__["request_id"]) == (logging.WARNING, "mine")


async def going_on(*arguments: Any) -> AsyncGenerator[GenerateOutput]:
    yield GenerateOutput(tokens=(OutputToken(100),))
    await asyncio.Event().wait()


async def two_begun(made: Gateway, monkeypatch: pytest.MonkeyPatch, body: Mapping[str, Any]) -> "asyncio.Task[httpx.Response]":
    """A request for two answers, which have their first tokens and go on."""
    monkeypatch.setattr(made.dispatcher, "generate", going_on)
    asked = asyncio.create_task(ask(made, "POST", "/v1/completions", json={**body, "n": 2}))
    async with asyncio.timeout(30):
        while made.metrics.registry.get_sample_value("baton:time_to_first_token_seconds_count", LABELS) != 2:
            await asyncio.sleep(0.01)
    return asked


@pytest.mark.parametrize("stream", [False, True])
async def test_who_is_told_to_go_elsewhere_is_one_too_and_has_not_left(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    asked = await two_begun(made, monkeypatch, {**HELLO, "stream": stream})
    made.generator.grace.end()
    assert '"code":"draining"' in (await asked).text
    late = await ask(made, "POST", "/v1/completions", json=HELLO)
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    assert counted(made, "request_failures", "code") == {"draining": 2.0}
    assert counted(made, "request_success", "finished_reason") == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_client_leaves_is_counted_as_aborted_with_its_tokens(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    made = gateway(demo_model, Role.UNIFIED)
    asked = await two_begun(made, monkeypatch, {"prompt": [1, 2, 3], "stream": stream})
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert counted(made, "request_success", "finished_reason") == {"abort": 2.0}
    page = made.metrics.exposition().decode()
    for prefix in ("baton", "vllm"):
        assert f'{prefix}:request_success_total{{finished_reason="abort",model_name="demo-model",worker="router"}} 2.0' in page
        assert f'{prefix}:prompt_tokens_total{{model_name="demo-model",worker="router"}} 6.0' in page
        assert f'{prefix}:generation_tokens_total{{model_name="demo-model",worker="router"}} 2.0' in page
    assert counted(made, "request_failures", "code") == {}
    assert not caplog.records
