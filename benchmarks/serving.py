"""Cold against cached prompts, and disaggregated against unified, on this machine.

    python benchmarks/serving.py [--model DIR] [--rounds 3] [--out benchmarks/results/serving-cpu.md]

Every layout gets the same prompts. Rounds alternate between the layouts, and the median round is reported, because machines drift.
Ratios are within this run; absolute times are this machine's.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from baton import __version__
from baton.cli.bench import Load, run_bench

LAYOUTS = {
    "unified ×1": ["--unified", "1", "--kvstore", "0"],
    "1P1D": ["--prefill", "1", "--decode", "1", "--kvstore", "1"],
    "unified ×2": ["--unified", "2", "--kvstore", "0"],
    "2P2D": ["--prefill", "2", "--decode", "2", "--kvstore", "1"],
}
BATON = [sys.executable, "-c", "from baton.cli import main; main()", "up", "--http-port", "0", "--grpc-port", "0"]


@contextmanager
def cluster(options: Sequence[str], *, patience_s: float = 240.0) -> Iterator[str]:
    """Its URL. A cluster that is not ready in time, or ends, says the last lines of each of its logs."""
    with tempfile.TemporaryDirectory() as folder:
        ready, logs = Path(folder) / "ready.json", Path(folder) / "logs"
        mine = [] if "--log-dir" in options else ["--log-dir", str(logs)]
        if not mine:
            logs = Path(options[list(options).index("--log-dir") + 1])
        process = subprocess.Popen([*BATON, "--ready-file", str(ready), *mine, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + patience_s
        try:
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    show_logs(logs)
                    raise RuntimeError(f"the cluster did not start (exit code {process.poll()}): {' '.join(options)}")
                time.sleep(0.1)
            yield json.loads(ready.read_text())["http"]
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def show_logs(folder: Path, lines: int = 30) -> None:
    for log in sorted(folder.glob("*.log")):
        tail = log.read_text(errors="replace").splitlines()[-lines:]
        print(f"--- {log.name}, its last {len(tail)} lines", *tail, sep="\n", file=sys.stderr, flush=True)


def load(seed: int, **changes: Any) -> Load:
    fields: dict[str, Any] = {
        "num_requests": 32,
        "concurrency": 4,
        "rate": None,
        "input_len": (512, 512),
        "output_len": (64, 64),
        "shared_prefix": 0,
        "repeat_prompts": 1,
        "seed": seed,
    }
    return Load(**{**fields, **changes})


def measure(options: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """One cluster: cold prompts one at a time, the same again, then load."""
    results: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": [], "loaded": []}
    with cluster(options) as url:
        run_bench(url, load(999, num_requests=4))  # warms up
        for i in range(rounds):
            single = load(i, num_requests=8, concurrency=1, input_len=(1024, 1024), output_len=(16, 16))
            results["cold"].append(run_bench(url, single))
            results["cached"].append(run_bench(url, single))
            results["loaded"].append(run_bench(url, load(100 + i)))
    return results


def median(results: list[dict[str, Any]], *path: str) -> float:
    def value(result: Any) -> float:
        for key in path:
            result = result[key]
        return float(result)

    return statistics.median(value(result) for result in results)


def report(measured: dict[str, dict[str, list[dict[str, Any]]]], command: str, rounds: int) -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    lines = [
        "# Serving on a CPU: cold, cached, disaggregated",
        "",
        f"`{command}`, {datetime.date.today()}, {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, baton {__version__}, demo model (2.8 M parameters, fp32). Medians of {rounds} rounds.",
        "",
        "One request at a time, 1,024 tokens in, 16 out; `cached` is the same prompts again:",
        "",
        "| layout | TTFT cold, p50 | TTFT cached, p50 | cached ÷ cold | cache hits | failures |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in measured.items():
        cold, cached = median(results["cold"], "ttft_ms", "p50"), median(results["cached"], "ttft_ms", "p50")
        hits, failed = median(results["cached"], "cache_hit_rate"), sum(r["failures"] for rs in results.values() for r in rs)
        lines.append(f"| {name} | {cold:.0f} ms | {cached:.0f} ms | {cached / cold:.2f} | {hits:.0%} | {failed} |")
    lines += [
        "",
        "Four requests at a time, 512 tokens in, 64 out, nothing cached:",
        "",
        "| layout | output tok/s | against unified of the same size | TTFT p50 | ITL p50 | ITL p99 |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in measured.items():
        base = "unified ×1" if name in ("unified ×1", "1P1D") else "unified ×2"
        speed, of = median(results["loaded"], "output_tokens_per_s"), median(measured[base]["loaded"], "output_tokens_per_s")
        ttft, itl, tail = (median(results["loaded"], *p) for p in (("ttft_ms", "p50"), ("itl_ms", "p50"), ("itl_ms", "p99")))
        lines.append(f"| {name} | {speed:.0f} | {speed / of:.2f} | {ttft:.0f} ms | {itl:.1f} ms | {tail:.1f} ms |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = ["--model", str(arguments.model)] if arguments.model else []
    measured = {name: measure([*options, *model], arguments.rounds) for name, options in LAYOUTS.items()}
    text = report(measured, "python benchmarks/serving.py " + " ".join(sys.argv[1:]), arguments.rounds)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
