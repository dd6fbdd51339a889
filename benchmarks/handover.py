"""What handing a prompt over costs one request: time to the first token, from the first to the second, and of a decode step, for servers of
the same model side by side.

    baton up --unified 1 --kvstore 0 --http-port 8100 --grpc-port 9100 …                    # one worker
    baton up --prefill 1 --decode 1 --kvstore 0 --http-port 8200 --grpc-port 9200 …         # KV pushed from memory to memory
    python benchmarks/handover.py http://127.0.0.1:8100 http://127.0.0.1:8200 [--lengths 500 2000] [--rounds 5]
"""

import argparse
import itertools
import random
import statistics
import time

import httpx


def one(url: str, length: int, seed: int, vocab: int) -> tuple[float, float, float]:
    """Milliseconds of one request of random tokens, alone."""
    rng = random.Random(seed)
    body = {
        "prompt": [rng.randrange(4, vocab) for _ in range(length)], "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with httpx.Client(timeout=120) as client:  # to make one takes 20 ms, which are not the server's
        started, times = time.perf_counter(), list[float]()
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append((time.perf_counter() - started) * 1e3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return times[0], gaps[0], statistics.median(gaps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=2000, help="token ids below this are sent")
    arguments = parser.parse_args()
    print("| prompt | server | TTFT, ms | first to second token, ms | a step, ms |\n|---|---|---|---|---|")
    seed = time.time_ns()
    for length in arguments.lengths:
        found: dict[str, list[tuple[float, float, float]]] = {url: [] for url in arguments.urls}
        for round_number in range(arguments.rounds + 1):  # the first warms up
            for url, times in found.items():
                seed += 1
                measured = one(url, length, seed, arguments.vocab)
                if round_number:
                    times.append(measured)
        for url, times in found.items():
            ttft, gap, step = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {length:,} | {url} | {ttft:.0f} | {gap:.1f} | {step:.1f} |", flush=True)


if __name__ == "__main__":
    main()
