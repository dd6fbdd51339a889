"""Streams that go on while something happens to the cluster, each compared with what it gave when nothing happened."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.faults.traffic import Outcome, Prompt, make_prompts, run_streams, stream


@dataclass
class Load:
    expected: dict[Prompt, list[int]]
    outcomes: list[tuple[Prompt, Outcome]] = field(default_factory=list)

    def lost(self) -> list[str]:
        """What went wrong; nothing, if no request was lost."""
        return [outcome.error for _, outcome in self.outcomes if outcome.error is not None]

    def different(self) -> int:
        return sum(outcome.token_ids != self.expected[prompt] for prompt, outcome in self.outcomes)

    def short(self) -> int:
        return sum(len(outcome.token_ids) != prompt.max_tokens for prompt, outcome in self.outcomes)


def quiet(url: str, *, count: int = 12) -> dict[Prompt, list[int]]:
    """Prompts and their tokens."""
    prompts = make_prompts(count, seed=7, vocab_size=2000, length=120, max_tokens=48)
    outcomes = asyncio.run(run_streams(url, prompts))
    assert [outcome.error for outcome in outcomes] == [None] * count, outcomes
    return {prompt: outcome.token_ids for prompt, outcome in zip(prompts, outcomes, strict=True)}


@contextmanager
def under_load(url: Callable[[], str], expected: dict[Prompt, list[int]], *, concurrency: int = 4) -> Iterator[Load]:
    """While inside, `concurrency` streams are under way, each over a connection of its own to where `url` points as it begins; each that
    ends is followed by the next. On leaving, all have ended."""
    load, stop = Load(expected), threading.Event()
    prompts = itertools.cycle(expected)

    async def client() -> None:
        while not stop.is_set():
            prompt = next(prompts)
            async with httpx.AsyncClient(base_url=url(), timeout=httpx.Timeout(120)) as http:
                load.outcomes.append((prompt, await stream(http, prompt)))

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(concurrency)))

    thread = threading.Thread(target=lambda: asyncio.run(clients()), name="load")
    thread.start()
    try:
        yield load
    finally:
        stop.set()
        thread.join()
