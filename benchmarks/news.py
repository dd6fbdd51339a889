"""How long it takes until all routers know of a worker's load: two of them before one unified worker with the demo model, on this machine.

    python -m benchmarks.news [--requests 200]

A prompt is sent through one router; the time is taken from there until `GET /cluster` of each says that the worker has a request. So it
holds the request's own way to the worker, the news' way back, and the time of asking, each 5 ms: more often, and asking takes the cores.
"""

import argparse
import asyncio
import random
import statistics
import time
from pathlib import Path

import httpx

from tests.cluster import running_cluster
from tests.faults.traffic import Prompt, stream

MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo-model"


async def known_after(client: httpx.AsyncClient, url: str, sent: float) -> float:
    while time.monotonic() < sent + 10:
        [worker] = (await client.get(f"{url}/cluster")).json()["workers"]
        if worker["running"] + worker["waiting"]:
            return time.monotonic() - sent
        await asyncio.sleep(0.005)
    raise TimeoutError(f"{url} has not heard of a request after 10 s")


async def idle(client: httpx.AsyncClient, urls: list[str]) -> None:
    for url in urls:
        while any(w["running"] + w["waiting"] for w in (await client.get(f"{url}/cluster")).json()["workers"]):
            await asyncio.sleep(0.005)


async def measure(urls: list[str], requests: int) -> list[list[float]]:
    """Seconds, by request: at the router that sent it, and at the other."""
    rng, found = random.Random(0), list[list[float]]()
    async with httpx.AsyncClient(timeout=30) as client:
        for number in range(requests):
            await idle(client, urls)
            await asyncio.sleep(rng.random() / 10)
            sender, other = urls[number % 2], urls[1 - number % 2]
            prompt = Prompt(tuple(rng.randrange(4, 2000) for _ in range(200)), 300, 0.0, 0)
            sent = time.monotonic()
            answer = asyncio.create_task(stream(client, prompt, url=sender))
            found.append(list(await asyncio.gather(*(known_after(client, url, sent) for url in (sender, other)))))
            assert (await answer).error is None
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    with running_cluster(model=MODEL, unified=1, routers=2, kvstore=0) as cluster:
        found = asyncio.run(measure(list(cluster.urls), given.requests))
    print("| known to | p50, ms | p95, ms | most, ms | within 50 ms |\n|---|---|---|---|---|")
    for name, times in zip(("the router that sent it", "the other"), zip(*found, strict=True), strict=True):
        cuts, within = statistics.quantiles(times, n=20), sum(each <= 0.05 for each in times) / len(times)
        print(f"| {name} | {1e3 * cuts[9]:.0f} | {1e3 * cuts[18]:.0f} | {1e3 * max(times):.0f} | {within:.0%} |")


if __name__ == "__main__":
    main()
