"""Two OpenAI-compatible servers of the same model on one machine, in alternating runs: medians, and the first one's ÷ the second one's.

baton up --model small-qwen2 --unified 1 --kvstore 0 --etcd none --http-port 8000          # one
vllm serve small-qwen2 --port 8111 …                                                       # the other
python benchmarks/serving_peer.py http://127.0.0.1:8000 http://127.0.0.1:8111 [--rounds 5] [--quick]
"""

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator

import psutil

from baton.cli.bench import Load, drive, summarise

LOADS = ((512, 64, 1, 8), (512, 64, 8, 24), (512, 64, 32, 64), (32, 256, 1, 3), (32, 256, 8, 16), (32, 256, 32, 64), (1000, 1, 1, 6))


def measure(url: str, load: Load) -> tuple[float, float]:
    """Output tokens per second, and the median TTFT in ms."""
    samples, seconds = asyncio.run(drive(url, load))
    result = summarise(samples, seconds, load)
    assert not result["failures"], result["errors"]
    return result["output_tokens_per_s"], result["ttft_ms"]["p50"]


@contextlib.contextmanager
def paused(pid: int | None) -> Iterator[None]:
    """Stops a process and all that it started."""
    processes = [] if pid is None else [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours")
    parser.add_argument("peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peer-pid", type=int, help="the second one's first process: it is stopped while the first is measured, for idle servers that spin"
    )
    parser.add_argument("--quick", action="store_true", help="half of the requests")
    parser.add_argument("--only", nargs="*", default=[], metavar="IN/OUT/CONCURRENCY", help="some of the loads")
    arguments = parser.parse_args()
    print("| in / out, concurrency | ours tok/s, TTFT ms | peer tok/s, TTFT ms | tok/s ÷ | TTFT ÷ |\n|---|---|---|---|---|")
    seed = time.time_ns() % 2**31  # servers keep what they have seen
    for length, output, concurrency, requests in LOADS:
        if arguments.only and f"{length}/{output}/{concurrency}" not in arguments.only:
            continue
        seen: dict[str, list[tuple[float, float]]] = {arguments.ours: [], arguments.peer: []}
        for _ in range(arguments.rounds):
            for url, results in seen.items():
                seed += 1
                load = Load(
                    num_requests=max(requests // (1 + arguments.quick), concurrency),
                    concurrency=concurrency,
                    rate=None,
                    input_len=(length, length),
                    output_len=(output, output),
                    shared_prefix=0,
                    repeat_prompts=1,
                    seed=seed,
                )
                with paused(arguments.peer_pid if url == arguments.ours else None):
                    results.append(measure(url, load))
        (rate, ttft), (peer_rate, peer_ttft) = (
            tuple(statistics.median(column) for column in zip(*results, strict=True)) for results in seen.values()
        )
        print(
            f"| {length} / {output}, {concurrency} | {rate:.1f}, {ttft:.0f} | {peer_rate:.1f}, {peer_ttft:.0f} "
            f"| {rate / peer_rate:.2f} | {ttft / peer_ttft:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
