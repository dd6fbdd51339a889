"""How well the router foresees a request's time to the first token: predicted when it was placed, against what it took.

    python -m benchmarks.prediction --model DIR [--layouts unified 1P1D] [--concurrency 1 4 8] [--requests 120] [--length 480]

Random prompts of 64 to 900 tokens (or of `--length`), nothing of them cached, each answered with 16 to 64; so many at a time, the next
when one has ended. Workers learn from a first part that is not counted. Both times are the router's own, from `/debug/routes/{id}`.
"""

import argparse
import asyncio
import datetime
import os
import platform
import random
import statistics

import httpx

from benchmarks.serving import cluster

LAYOUTS = {
    "unified": ["--unified", "1", "--kvstore", "0"],
    "2 unified": ["--unified", "2", "--kvstore", "0"],
    "1P1D": ["--prefill", "1", "--decode", "1", "--kvstore", "0"],
}
LENGTHS, OUTPUTS, LEARNING = (64, 900), (16, 64), 60  # tokens; tokens; requests


async def one(client: httpx.AsyncClient, rng: random.Random, length: int | None) -> tuple[float, float]:
    """Seconds to the first token: predicted, actual."""
    prompt = [rng.randrange(10, 2000) for _ in range(length or rng.randint(*LENGTHS))]
    body = {"prompt": prompt, "max_tokens": rng.randint(*OUTPUTS), "ignore_eos": True, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        name = answer.headers["x-request-id"]
        async for _ in answer.aiter_raw():
            pass
    told = (await client.get(f"/debug/routes/{name}")).raise_for_status().json()["sequences"][0]["decisions"][0]["ttft_s"]
    return told["predicted"], told["actual"]


async def drive(url: str, requests: int, concurrency: int, seed: int, length: int | None = None) -> list[tuple[float, float]]:
    rng, left = random.Random(seed), iter(range(requests))
    found: list[tuple[float, float]] = []

    async def lane(client: httpx.AsyncClient) -> None:
        for _ in left:
            found.append(await one(client, rng, length))

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(lane(client) for _ in range(concurrency)))
    return found


def row(layout: str, concurrency: int, found: list[tuple[float, float]]) -> str:
    errors = sorted(abs(predicted - actual) / actual for predicted, actual in found)
    bias = statistics.median(predicted / actual for predicted, actual in found)
    actual = statistics.median(actual for _, actual in found)
    cells = [
        layout,
        str(concurrency),
        f"{actual * 1e3:.0f}",
        f"**{statistics.median(errors):.1%}**",
        f"{errors[int(0.9 * len(errors))]:.0%}",
        f"{bias:.2f}",
        f"{statistics.median(abs(each - actual) / each for _, each in found):.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["unified", "1P1D"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--length", type=int, help="of all prompts: then the last column is what no prediction can know, one at a time")
    given = parser.parse_args()
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    print(f"{datetime.date.today()}, {machine}, load average {os.getloadavg()[0]:.1f}\n")
    print(
        "| layout | at a time | TTFT, ms: median | error, median | 9 of 10 below | predicted ÷ actual, median | "
        "actual from their median, median |"
        "\n|---|---|---|---|---|---|---|"
    )
    for layout in given.layouts:
        with cluster(["--model", given.model, "--etcd", "none", *LAYOUTS[layout]]) as url:
            asyncio.run(drive(url, LEARNING, 4, 0))
            for concurrency in given.concurrency:
                print(row(layout, concurrency, asyncio.run(drive(url, given.requests, concurrency, concurrency, given.length))), flush=True)
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
