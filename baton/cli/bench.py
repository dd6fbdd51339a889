"""`baton bench`: load for any OpenAI-compatible server, and what it did to it.

Prompts are token ids, so that lengths are exact; TTFT ends with the first chunk that has a choice, ITL is the time between two chunks of a
stream that carry tokens. A failed request counts as a failure and in no latency.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from baton.cli.stream import connect, message_of, stream_events
from baton.errors import BatonError, ConfigError

FIRST_ID = 10  # below lie special tokens
_COLUMNS = (  # of simulations and replays: heading, key, format
    ("requests", "requests", "d"),
    ("failed", "failures", "d"),
    ("TTFT mean", "ttft_mean_s", ".3f"),
    ("p95, s", "ttft_p95_s", ".3f"),
    ("ITL mean", "itl_mean_ms", ".1f"),
    ("p95, ms", "itl_p95_ms", ".1f"),
    ("met", "met", ".1%"),
    ("goodput/s", "goodput", ".2f"),
    ("hits", "hit_rate", ".1%"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_requests: int
    concurrency: int
    rate: float | None  # requests per second, Poisson; None: closed loop
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_prefix: int
    repeat_prompts: int
    seed: int
    ttft_slo_ms: float | None = None  # goodput counts requests within these; a failed or refused one never is
    itl_slo_ms: float | None = None  # of a request's mean


@dataclass(slots=True)
class Sample:
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list[float])
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def mean_itl_s(self) -> float:
        """By token: a chunk may bring several."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def parse_range(text: str) -> tuple[int, int]:
    """`128` or `64-256`."""
    low, dash, high = text.partition("-")
    try:
        bounds = (int(low), int(high if dash else low))
    except ValueError as error:
        raise ConfigError(f"{text!r} must be a number of tokens, or a range such as 64-256") from error
    if not 0 < bounds[0] <= bounds[1]:
        raise ConfigError(f"{text!r} must be a range of positive numbers, the lower one first")
    return bounds


def run_bench(url: str, load: Load, api_key: str = "") -> dict[str, Any]:
    """Drives the server and prints a table; the result is ready for JSON. Raises BatonError where no server answers, or refuses to."""
    samples, seconds = asyncio.run(drive(url, load, api_key))
    result = summarise(samples, seconds, load)
    _print(result)
    return result


async def drive(url: str, load: Load, api_key: str = "") -> tuple[list[Sample], float]:
    async with connect(url, api_key, timeout_s=600) as client:
        vocab = await vocab_size(client)
        rng = random.Random(load.seed)
        prompts = make_prompts(load, vocab, rng)
        samples = [Sample() for _ in prompts]
        started = time.monotonic()
        if load.rate is None:
            work = iter(list(zip(prompts, samples, strict=True)))

            async def worker() -> None:
                for prompt, sample in work:
                    await send(client, prompt, sample)

            await asyncio.gather(*(worker() for _ in range(load.concurrency)))
        else:
            tasks: list[asyncio.Task[None]] = []
            for prompt, sample in zip(prompts, samples, strict=True):
                tasks.append(asyncio.create_task(send(client, prompt, sample)))
                await asyncio.sleep(rng.expovariate(load.rate))
            await asyncio.gather(*tasks)
        return samples, time.monotonic() - started


def make_prompts(load: Load, vocab: int, rng: random.Random) -> list[tuple[list[int], int]]:
    """(token ids, output tokens) for each request, in sending order: all prompts once, then again."""
    shared = [rng.randrange(FIRST_ID, vocab) for _ in range(load.shared_prefix)]
    distinct = -(-load.num_requests // load.repeat_prompts)
    prompts: list[tuple[list[int], int]] = []
    for _ in range(distinct):
        length = max(rng.randint(*load.input_len), load.shared_prefix + 1)
        own = [rng.randrange(FIRST_ID, vocab) for _ in range(length - load.shared_prefix)]
        prompts.append((shared + own, rng.randint(*load.output_len)))
    return (prompts * load.repeat_prompts)[: load.num_requests]


async def vocab_size(client: httpx.AsyncClient) -> int:
    """Ids below this are safe to send: the largest id that the tokenizer gives for plain text."""
    try:
        text = "".join(chr(code) for code in range(33, 0x250)) + " the of and to in is that for with on as are this be"
        answer = (await client.post("/tokenize", json={"prompt": text})).raise_for_status().json()
    except httpx.HTTPStatusError as error:
        raise BatonError(f"{client.base_url} refuses: {message_of(error.response)}") from error
    except httpx.HTTPError as error:
        raise ConfigError(f"no server answers at {client.base_url} ({error}); start one with `baton up`, or give --url") from error
    return max(max(answer["tokens"]), 256)


async def send(client: httpx.AsyncClient, prompt: tuple[list[int], int], sample: Sample) -> None:
    """One request, its token ids and the number of tokens wanted; fills the sample in."""
    token_ids, max_tokens = prompt
    body = {
        "prompt": token_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    started = last = time.monotonic()
    try:
        async for chunk in stream_events(client, "/v1/completions", body, {}):
            now = time.monotonic()
            if chunk["choices"]:
                if sample.ttft_s:
                    sample.itl_s.append(now - last)
                else:
                    sample.ttft_s = now - started
                last = now
            elif usage := chunk.get("usage"):
                sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        sample.e2e_s = last - started
        if sample.output_tokens != max_tokens:
            sample.error = f"{sample.output_tokens} tokens instead of {max_tokens}"
    except BatonError as error:
        sample.error = error.message


def summarise(samples: Sequence[Sample], seconds: float, load: Load) -> dict[str, Any]:
    good = [sample for sample in samples if sample.error is None]
    promise = Promise(ttft_ms=load.ttft_slo_ms, itl_ms=load.itl_slo_ms)
    met = [sample for sample in good if promise.kept(sample)]
    output, prompt = sum(s.output_tokens for s in good), sum(s.prompt_tokens for s in good)
    return {
        "load": asdict(load),
        "requests": len(samples),
        "failures": len(samples) - len(good),
        "errors": sorted({s.error for s in samples if s.error is not None})[:5],
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "goodput_requests_per_s": len(met) / seconds,
        "slo_met": len(met) / len(samples) if samples else 0.0,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + prompt) / seconds,
        "cache_hit_rate": sum(s.cached_tokens for s in good) / prompt if prompt else 0.0,
        "ttft_ms": _spread([s.ttft_s for s in good]),
        "itl_ms": _spread([gap for s in good for gap in s.itl_s]),
        "e2e_ms": _spread([s.e2e_s for s in good]),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What goodput counts. A failed or refused request never keeps it."""

    ttft_ms: float | None = None
    itl_ms: float | None = None  # of a request's mean

    def kept(self, sample: Sample) -> bool:
        ttft, itl = self.ttft_ms or float("inf"), self.itl_ms or float("inf")
        return sample.error is None and 1e3 * sample.ttft_s <= ttft and 1e3 * sample.mean_itl_s <= itl


def columns(samples: Sequence[Sample], seconds: float, promise: Promise) -> dict[str, Any]:
    """What simulations and replays report, in seconds and milliseconds. ITL is each request's mean; `seconds` is how long requests came."""
    good = [sample for sample in samples if sample.error is None]
    kept, prompt = sum(promise.kept(sample) for sample in samples), sum(sample.prompt_tokens for sample in good)
    ttft, itl = _spread([s.ttft_s for s in good]), _spread([s.mean_itl_s for s in good if s.output_tokens > 1])
    return {
        "requests": len(samples),
        "failures": len(samples) - len(good),
        "ttft_mean_s": ttft.get("mean", 0.0) / 1e3,
        "ttft_p95_s": ttft.get("p95", 0.0) / 1e3,
        "itl_mean_ms": itl.get("mean", 0.0),
        "itl_p95_ms": itl.get("p95", 0.0),
        "met": kept / len(samples) if samples else 0.0,
        "goodput": kept / seconds if seconds else 0.0,
        "hit_rate": sum(s.cached_tokens for s in good) / prompt if prompt else 0.0,
    }


def print_rows(rows: Sequence[Mapping[str, Any]], promise: Promise, *first: str, title: str | None = None) -> None:
    """A line for each of the rows that `columns` made, behind its values of `first`; what was met only where something was promised."""
    shown = [each for each in _COLUMNS if promise != Promise() or each[1] not in ("met", "goodput")]
    table = Table(*first, *(heading for heading, _, _ in shown), title=title)
    for row in rows:
        table.add_row(*(f"{row[name]}" for name in first), *(f"{row[key]:{form}}" for _, key, form in shown))
    console = Console()
    console.width = max(console.width, 130)  # a narrow terminal wraps lines, which beats cutting off figures
    console.print(table)


def _spread(values: list[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    spread = {f"p{p}": 1e3 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 90, 95, 99)}
    return {"mean": 1e3 * sum(ordered) / len(ordered), **spread}


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{result['requests']} requests in {result['seconds']:.1f} s, {result['failures']} failed")
    for column in ("ms", "mean", "p50", "p90", "p95", "p99"):
        table.add_column(column, justify="right")
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        table.add_row(name.removesuffix("_ms").upper(), *(f"{value:.1f}" for value in result[name].values()))
    console.print(table)
    console.print(
        f"{result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:.1f} output tok/s, "
        f"{result['total_tokens_per_s']:.1f} total tok/s, cache hit rate {result['cache_hit_rate']:.1%}"
    )
    if result["load"]["ttft_slo_ms"] or result["load"]["itl_slo_ms"]:
        console.print(f"goodput {result['goodput_requests_per_s']:.2f} requests/s: {result['slo_met']:.1%} met what was promised")
    for error in result["errors"]:
        console.print(f"failed: {error}", style="red", markup=False)
