"""KV goes from prefill to decode workers without a pool: the tokens are right, only what is missing is sent, and whatever becomes of a
worker, nothing stays reserved."""

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import RunningCluster, running_cluster

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[RunningCluster]:
    options = ["--set", "all.cluster.lease_s=3", "--set", "router.local_prefill=false"]
    with running_cluster(model=demo_model, prefill=1, decode=1, kvstore=0, options=options) as running:
        yield running


def complete(cluster: RunningCluster, prompt: list[int], max_tokens: int = 24) -> tuple[list[int], str]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
    return answer.json()["choices"][0]["token_ids"], answer.headers["x-baton-route"]


def pushed(cluster: RunningCluster) -> float:
    """Bytes so far."""
    worker = next(worker for worker in cluster.workers() if worker["id"] == "prefill-0")
    text = httpx.get(f"http://{worker['metrics']}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("baton:kv_push_bytes_total{"))


def make_prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 2000) for _ in range(length)]


def test_turns_of_a_conversation_send_what_is_new(cluster: RunningCluster) -> None:
    """Each turn sends the blocks that the decode worker lacks, and no byte more."""
    block_bytes, conversation, known = 0.0, make_prompt(1, 100), 0
    for turn in range(8):
        before = pushed(cluster)
        tokens, route = complete(cluster, conversation)
        assert "prefill=prefill-0" in route
        sent = -(-len(conversation) // BLOCK_SIZE) - known // BLOCK_SIZE
        block_bytes = block_bytes or (pushed(cluster) - before) / sent
        assert pushed(cluster) - before == sent * block_bytes
        known = len(conversation) + len(tokens) - 1  # the last token's KV nobody has computed
        conversation = [*conversation, *tokens, *make_prompt(turn + 2, 90)]
    cluster.assert_clean()


@pytest.mark.parametrize("length", [65, 80, 81, 100, 512, 700])
def test_tokens_are_those_of_one_worker(cluster: RunningCluster, length: int) -> None:
    """The second time the prompt is cached, so the decode worker has computed none of the first answer's KV itself but its last token's."""
    prompt = make_prompt(100 + length, length)
    first, route = complete(cluster, prompt)
    assert "prefill=prefill-0" in route
    again, route = complete(cluster, prompt)
    assert "computed here" in route
    assert first == again
    assert complete(cluster, [*prompt, *first[:10]], 14)[0] == first[10:]


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_client_that_goes_away(cluster: RunningCluster, delay_s: float) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            body = {"prompt": make_prompt(int(delay_s * 1000), 900), "max_tokens": 50, "stream": True}
            task = asyncio.create_task(client.post(f"{cluster.url}/v1/completions", json=body))
            await asyncio.sleep(delay_s)
            task.cancel()

    asyncio.run(leave())
    cluster.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_prefill_worker_that_stops_or_dies(cluster: RunningCluster, number: signal.Signals) -> None:
    """In the middle of prompts: they are computed where they wait, no block stays reserved; a stopped one that goes on writes nowhere."""
    prompts = [make_prompt(1000 + number * 10 + i, 800) for i in range(4)]
    victim = cluster.children()["prefill-0"]

    async def run() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=60) as client:

            async def one(name: str, prompt: list[int]) -> list[int]:
                body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
                asked = client.post(f"{cluster.url}/v1/completions", json=body, headers={"x-request-id": name})
                return (await asked).raise_for_status().json()["choices"][0]["token_ids"]

            async def placed(name: str) -> None:
                """Before, it would wait for a prefill worker: for a lease, in which none may have started again."""
                page: dict[str, Any] = {}
                while not any(sequence["decisions"] for sequence in page.get("sequences", ())):
                    page = (await client.get(f"{cluster.url}/debug/routes/{name}")).json()

            names = [f"{number.name}-{i}" for i in range(len(prompts))]
            tasks = [asyncio.create_task(one(*each)) for each in zip(names, prompts, strict=True)]
            async with asyncio.timeout(60):
                await asyncio.gather(*map(placed, names))
            victim.send_signal(number)
            try:
                return await asyncio.gather(*tasks)
            finally:
                if number == signal.SIGSTOP:
                    victim.send_signal(signal.SIGCONT)

    found = asyncio.run(run())
    cluster.wait_ready()
    cluster.assert_clean()
    assert found == [complete(cluster, prompt, 16)[0] for prompt in prompts]
    routes = (complete(cluster, make_prompt(5000 + number + i, 300))[1] for i in range(100) if not time.sleep(0.1))
    assert any("prefill=prefill-0" in route for route in routes), "it is asked no more"
