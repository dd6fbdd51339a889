"""Streams under way while something dies, and what became of each: tokens, errors, the longest silence."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    salt: str = ""  # of another salt nothing is cached

    def body(self) -> dict[str, object]:
        return {
            "prompt": list(self.token_ids),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": self.salt,
        }


@dataclass
class Outcome:
    """What one stream gave. `slowest` is the longest wait between two tokens, the first one's included, in seconds."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: str | None = None
    route: str = ""  # which workers
    broken: bool = False  # the error is the connection's: the router is gone
    ends: int = 0  # finish reasons, and ends of the stream, each counted: two of a whole answer
    slowest: float = 0.0


def make_prompts(count: int, *, seed: int, vocab_size: int, length: int = 120, max_tokens: int = 160) -> list[Prompt]:
    """Every other one is greedy; the rest sample with a seed of their own. A third of the prompts share their first half."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, vocab_size) for _ in range(length // 2)]
    prompts = []
    for i in range(count):
        own = [rng.randrange(3, vocab_size) for _ in range(length)]
        token_ids = shared + own[length // 2 :] if i % 3 == 0 else own
        prompts.append(Prompt(tuple(token_ids), max_tokens, 0.0 if i % 2 else 0.8, rng.randrange(2**31)))
    return prompts


async def stream(client: httpx.AsyncClient, prompt: Prompt, started: asyncio.Event | None = None, *, url: str = "") -> Outcome:
    """Runs one stream to its end, at `url` or the client's own. Never raises for what the server does: that is the outcome."""
    outcome = Outcome()
    last = time.monotonic()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=prompt.body()) as response:
            outcome.route = response.headers.get("x-baton-route", "")
            if response.status_code != 200:
                outcome.error = f"HTTP {response.status_code}: {(await response.aread()).decode()}"
                return outcome
            async for line in response.aiter_lines():
                outcome.ends += line == "data: [DONE]"
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    outcome.error = json.dumps(chunk["error"])
                    break
                for choice in chunk["choices"]:
                    now = time.monotonic()
                    outcome.slowest = max(outcome.slowest, now - last)
                    last = now
                    outcome.ends += choice.get("finish_reason") is not None
                    outcome.token_ids += choice.get("token_ids") or []
                    outcome.text += choice["text"]
                    if started is not None:
                        started.set()
    except httpx.HTTPError as error:
        outcome.error, outcome.broken = f"{type(error).__name__}: {error}", isinstance(error, httpx.NetworkError | httpx.ProtocolError)
    outcome.slowest = max(outcome.slowest, time.monotonic() - last)
    return outcome


async def run_streams(url: str, prompts: Sequence[Prompt], on_started: "asyncio.Future[None] | None" = None) -> list[Outcome]:
    """All prompts at once. `on_started` is resolved when a quarter of them have their first token."""
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(120), limits=httpx.Limits(max_connections=None)) as client:
        events = [asyncio.Event() for _ in prompts]
        tasks = [asyncio.create_task(stream(client, prompt, event)) for prompt, event in zip(prompts, events, strict=True)]
        while on_started is not None and not on_started.done():
            if sum(event.is_set() for event in events) >= len(prompts) // 4 or all(task.done() for task in tasks):
                on_started.set_result(None)
            else:
                await asyncio.sleep(0.005)
        return list(await asyncio.gather(*tasks))
