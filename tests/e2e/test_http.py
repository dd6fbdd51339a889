"""The official `openai` client and plain HTTP against a running cluster."""

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest

from baton.tokenizer import Tokenizer
from tests.cluster import RunningCluster

LONG = "Tell me about the router. " * 40
USER = [{"role": "user", "content": "What is Baton?"}]


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(cluster: RunningCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=60) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo-model", messages=USER, temperature=0, max_completion_tokens=200)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "stop"
    assert "Baton" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_is_the_same_text_and_starts_with_the_first_token(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo-model", messages=USER, temperature=0)  # type: ignore[arg-type]
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="demo-model", messages=USER, temperature=0, stream=True, stream_options=options)  # type: ignore[arg-type]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})  # type: ignore[union-attr]
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_seed_gives_the_same_text_and_n_gives_different_ones(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(model="demo-model", prompt="Once", max_tokens=20, temperature=1.0, seed=7, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo-model", messages=USER, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)  # type: ignore[arg-type]
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo-model", prompt="The router is", echo=True, max_tokens=1, logprobs=1, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.choices[0].text.startswith("The router is")
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs) == answer.usage.total_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 2, "n": 2, "temperature": 1.0},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0, "return_token_ids": True},
        {"logprobs": 0, "stop": ["e"], "ignore_eos": True},
        {"prompt": ["The router is", "Workers of a fleet. " * 9], "echo": True, "logprobs": 0},
    ],
    ids=str,
)
def test_a_stream_joined_is_the_whole_answer(http: httpx.Client, body: dict[str, Any]) -> None:
    sent = {"prompt": "The router is", "max_tokens": 12, "temperature": 0, "seed": 1, **body}
    answer = http.post("/v1/completions", json=sent).text  # sequences of other steps may have other last digits
    whole = json.loads(answer, parse_float=lambda digits: pytest.approx(float(digits), abs=1e-3))
    streaming = {**sent, "stream": True, "stream_options": {"include_usage": True}}
    *events, usage, _, _ = http.post("/v1/completions", json=streaming).text.split("\n\n")
    joined: dict[int, dict[str, Any]] = {}
    for event in events:
        (piece,) = json.loads(event.removeprefix("data: "))["choices"]
        choice = joined.setdefault(piece["index"], piece)
        if choice is not piece:
            choice |= {"text": choice["text"] + piece["text"], **{key: piece.get(key) for key in ("finish_reason", "stop_reason")}}
            for of, more in ((choice, piece), (choice["logprobs"] or {}, piece["logprobs"] or {})):
                for key in more.keys() & {"token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset"}:
                    of[key] += more[key]
    assert [joined[index] for index in sorted(joined)] == whole["choices"]
    counts = json.loads(usage.removeprefix("data: "))["usage"]
    assert [counts[key] for key in ("prompt_tokens", "completion_tokens")] == [
        whole["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    ]


def test_logprobs_of_the_prompt_are_not_streamed(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "prompt_logprobs": 1, "stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_stop_strings_and_token_ids(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 30, "ignore_eos": True, "return_token_ids": True}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]
    assert len(whole["token_ids"]) == 30
    stop = whole["text"][8:11]
    cut = http.post("/v1/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


def test_several_prompts_in_one_request(http: httpx.Client) -> None:
    body: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    prompts = ["One", "Two", "Three"]
    together = http.post("/v1/completions", json={**body, "prompt": prompts}).json()["choices"]
    alone = [http.post("/v1/completions", json={**body, "prompt": prompt}).json()["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in together] == alone


def test_a_long_prompt_goes_to_the_prefill_worker_and_comes_from_cache_the_second_time(cluster: RunningCluster, http: httpx.Client) -> None:
    body = {"prompt": LONG, "max_tokens": 8, "temperature": 0, "model": "demo-model"}
    cluster.wait_ready()  # beside a decode worker that has something to do on the same cores, it may compute the prompt itself
    cold, warm = (http.post("/v1/completions", json=body) for _ in range(2))
    assert "prefill=prefill-0" in cold.headers["x-baton-route"]
    assert "prefill=local" in warm.headers["x-baton-route"]
    assert cold.json()["choices"] == warm.json()["choices"]
    usage = warm.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 32


def test_cache_salt_separates_tenants(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": LONG + " Please.", "max_tokens": 4, "temperature": 0, "cache_salt": "tenant-a"}
    http.post("/v1/completions", json=body)
    other = http.post("/v1/completions", json={**body, "cache_salt": "tenant-b"}).json()
    again = http.post("/v1/completions", json=body).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert other["choices"] == again["choices"]


def test_sse_framing_and_request_id(http: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 3, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"] == "mine"
        assert "decode=decode-0" in response.headers["x-baton-route"]
        blocks = "".join(response.iter_text()).split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "decode=decode-0" in chunks[-1]["baton"]["route"]


def test_models_tokenize_and_detokenize(http: httpx.Client, client: openai.OpenAI, demo_model: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo-model"]
    ids = Tokenizer(demo_model).encode("Hello, world")
    answer = http.post("/tokenize", json={"prompt": "Hello, world"}).json()
    assert (answer["tokens"], answer["count"]) == (ids, len(ids))
    assert http.post("/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": "Hello, world"}
    assert http.post("/tokenize", json={"messages": USER}).json()["count"] > 5


def test_operators_pages(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json()["status"] == "ready"
    page = http.get("/metrics").text
    for name in ("baton:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_bucket", "vllm:request_success_total"):
        assert name in page
    workers = http.get("/cluster").json()["workers"]
    assert {(w["id"], w["role"], w["state"]) for w in workers} == {("prefill-0", "prefill", "ready"), ("decode-0", "decode", "ready")}
    for worker in workers:
        assert worker["blocks_total"] >= worker["blocks_free"] >= 0
        own = httpx.get(f"http://{worker['metrics']}/metrics").text
        assert "vllm:num_requests_running" in own
        assert "baton:kv_pool_saved_blocks_total" in own


def test_an_idle_connection_is_left_to_the_client_to_close(http: httpx.Client) -> None:
    """httpx takes one again that was idle for up to 5 s: one that the router closed then would lose what is sent meanwhile."""
    connection = HTTPConnection(http.base_url.host, http.base_url.port, timeout=60)
    with closing(connection):
        for wait_s in (6, 0):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            assert select.select([connection.sock], [], [], wait_s)[0] == []


def test_a_client_that_goes_away_in_its_request_is_no_news(cluster: RunningCluster, http: httpx.Client) -> None:
    log = cluster.logs / "router.log"
    before = len(log.read_text())
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.3)
    time.sleep(0.3)
    assert http.get("/health").status_code == 200
    assert "ERROR" not in log.read_text()[before:]


def test_a_client_that_goes_away_frees_everything(cluster: RunningCluster) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=cluster.url) as client:
            for stream in (True, False):
                body = {"prompt": LONG, "max_tokens": 3800, "n": 16, "ignore_eos": True, "stream": stream}  # a minute
                task = asyncio.create_task(client.post("/v1/completions", json=body, timeout=30))
                await asyncio.sleep(0.5)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    cluster.wait_ready(20)
    cluster.assert_clean(20)


# -- what goes wrong


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
    [
        ("/v1/completions", {"prompt": "x", "model": "gpt-4"}, 404, "model_not_found", "demo-model"),
        ("/v1/completions", {"prompt": "word " * 5000}, 400, "context_length_exceeded", "4096"),
        ("/v1/completions", {"prompt": [1, 2, 99999]}, 400, "invalid_request_error", "99999"),
        ("/v1/completions", {"prompt": [-1]}, 400, "invalid_request_error", "-1"),
        ("/v1/completions", {"prompt": []}, 400, "invalid_request_error", "empty"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "ten"}, 400, "invalid_request_error", "max_tokens"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "invalid_request_error", "logit_bias"),
        ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(range(1025), 1)}, 400, "invalid_request_error", "at most 1024"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_request_error", "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "invalid_request_error", "role"),
        ("/v1/chat/completions", {"messages": USER, "temperature": 9e9, "top_logprobs": 2}, 400, "invalid_request_error", "top_logprobs"),
        ("/v1/completions", {"prompt": [1] * 96, "max_tokens": 4001}, 400, "context_length_exceeded", "ask for at most 4000"),
        ("/v1/chat/completions", {"messages": USER, "max_completion_tokens": 4096}, 400, "context_length_exceeded", "4096"),
        ("/v1/completions", {"prompt": "x", "min_tokens": 3, "max_tokens": 2}, 400, "invalid_request_error", "min_tokens"),
        ("/nowhere", {}, 404, "not_found", "POST /v1/completions"),
        ("/v1/models", {}, 405, "method_not_allowed", "GET /v1/models"),
    ],
)
def test_bad_requests_get_openais_error_object(http: httpx.Client, path: str, body: Any, status: int, code: str, says: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_browser_that_begins_at_the_root_comes_to_the_console(http: httpx.Client) -> None:
    assert (http.get("/").status_code, http.get("/").headers["location"]) == (307, "/console")


def test_broken_json_and_huge_bodies(http: httpx.Client) -> None:
    broken = http.post("/v1/completions", content=b'{"prompt": ')
    assert (broken.status_code, "not valid JSON" in broken.json()["error"]["message"]) == (400, True)
    huge = http.post("/v1/completions", content=b'{"prompt": "' + b"x" * (17 << 20) + b'"}')
    assert huge.status_code == 413
    assert http.post("/v1/completions", json={"prompt": "still there?", "max_tokens": 1}).status_code == 200


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="empty") as caught:
        client.completions.create(model="demo-model", prompt=[], extra_headers={"x-request-id": "mine"})
    assert caught.value.request_id == "mine"
