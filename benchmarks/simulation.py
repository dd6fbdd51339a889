"""The simulator beside a real cluster on this machine: the same trace, workers, policy; both in the same columns.

    python -m benchmarks.simulation --trace conversation_trace.jsonl [--loads 0.5 0.8] [--seconds 45] [--out FILE]

The pace is what the real workers have learned when they were measured, and what it lacks, the time between two steps and the messages' way,
is taken from a request alone. The model is small and random. The first seconds only warm up: a pace that was learned from few prompts is
a bad one.
"""

import argparse
import asyncio
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from baton.cli.bench import FIRST_ID, Promise, Sample, columns, send
from baton.cli.replay import run_replay
from baton.cli.trace import Line, Scaling, play, read_trace
from baton.models.create import create_model
from baton.types import Pace
from benchmarks.serving import cluster
from services.router.policies import POLICIES
from services.router.simulation.__main__ import parse_pace
from services.router.simulation.cluster import Plan, SimulatedCluster
from services.router.simulation.engine import Shape
from services.router.simulation.workload import asks_of

TOKENIZER = Path(__file__).parent.parent / "examples" / "demo-model"
BLOCK_SIZE, NUM_BLOCKS, BATCHED_TOKENS, MAX_SEQS = 16, 4096, 512, 64
LAYOUTS = {"2 unified": (0, 0, 2), "1P1D": (1, 1, 0)}
PROMISE = Promise(ttft_ms=2000, itl_ms=200)


async def alone(url: str) -> tuple[float, float]:
    """Seconds to the first token, and between tokens, of 16 new tokens of prompt with nothing beside them; medians."""
    samples = [Sample() for _ in range(9)]
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for sample in samples:
            await send(client, ([random.randrange(FIRST_ID, 200) for _ in range(16)], 32), sample)
    return statistics.median(s.ttft_s for s in samples), statistics.median(s.mean_itl_s for s in samples)


def simulated(counts: tuple[int, int, int], pace: Pace, hop_s: float, lines: Sequence[Line], block: int) -> dict[str, Any]:
    shape = Shape(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_batched_tokens=BATCHED_TOKENS, max_num_seqs=MAX_SEQS)
    prefill, decode, unified = counts
    plan = Plan(prefill=prefill, decode=decode, unified=unified, shape=shape, pace=pace, hop_s=hop_s)
    samples = SimulatedCluster(plan, POLICIES["predicted"]).run(asks_of(lines, block, BLOCK_SIZE))
    return columns(samples, lines[-1].at, PROMISE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8])
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of real time at each load")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        f"`python -m benchmarks.simulation {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores.",
        "",
        "| layout, load | | TTFT mean, s | p95, s | ITL mean, ms | p95, ms | cache hits |",
        "|---|---|---|---|---|---|---|",
    ]
    trace = read_trace(arguments.trace)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        create_model(
            model,
            "llama",
            hidden_size=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=4,
            max_len=4096,
            dtype="float32",
            tokenizer=TOKENIZER,
            seed=0,
        )
        for name in arguments.layouts:
            prefill, decode, unified = LAYOUTS[name]
            options = ["--model", str(model), "--etcd", "none", "--kvstore", "0", "--prefill", str(prefill), "--decode", str(decode)]
            options += ["--unified", str(unified)]
            for role in ("unified",) if unified else ("prefill", "decode"):
                options += ["--set", f"{role}.engine.num_blocks={NUM_BLOCKS}", "--set", f"{role}.engine.num_threads=1"]
            with cluster(options) as url:
                for number, load in enumerate((1.0, *arguments.loads)):  # the first warms up
                    seconds = arguments.seconds
                    scaling = Scaling(length=0.03125, seconds=seconds * load, speed=load, longest=2000)
                    seed = time.time_ns() % 1000
                    lines = [_renamed(line, number) for line in play(trace, scaling, seed)]
                    first_s, step_s = asyncio.run(alone(url))
                    found = run_replay(url, lines, scaling.block(), seed, PROMISE)
                    pace = parse_pace(url)
                    between = max(step_s - pace.base_s - pace.decode_s(1, 32), 0.0)
                    pace = dataclasses.replace(pace, base_s=pace.base_s + between)
                    hops = 4 if unified else 6
                    hop_s = max(first_s - pace.base_s - pace.prompt_s(16), 0.0) / hops
                    twin = simulated(LAYOUTS[name], pace, hop_s, lines, scaling.block())
                    print(load, pace, f"hop {hop_s:.5f}, between {between:.5f}", found, twin, sep="\n", flush=True)
                    if number:
                        rows += compared(f"{name}, {load:g}", found, twin)
    print("\n".join(rows))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(["# The simulator beside a real cluster", "", *rows, ""]))


def _renamed(line: Line, number: int) -> Line:
    """About something else: a real worker still has what it was sent before."""
    return dataclasses.replace(line, ids=tuple(each + (number << 32) for each in line.ids))


def compared(name: str, found: dict[str, Any], twin: dict[str, Any]) -> list[str]:
    keys = ("ttft_mean_s", "ttft_p95_s", "itl_mean_ms", "itl_p95_ms")

    def cells(row: dict[str, Any]) -> str:
        return " | ".join([*(f"{row[key]:.3f}" if key.endswith("_s") else f"{row[key]:.1f}" for key in keys), f"{row['hit_rate']:.1%}"])

    ratios = " | ".join(f"{twin[key] / found[key]:.2f}" for key in keys)
    return [f"| {name} | real | {cells(found)} |", f"| | simulated | {cells(twin)} |", f"| | ÷ | {ratios} | |"]


if __name__ == "__main__":
    main()
