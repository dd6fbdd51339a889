"""The simulator beside a real cluster on this machine: the same trace, workers, policy; both in the same columns.

    python -m benchmarks.simulation --trace conversation_trace.jsonl [--layouts "2 unified"] [--loads 0.3 0.5] [--seconds 45] [--out FILE]

Each load is played twice, with the same requests about other things: what two runs of the same cluster differ by, no simulator can know.
The pace is the mean of what the real workers announced meanwhile, each role's for itself; what it lacks, the time between two steps and
the messages' way, is taken from requests alone, before. The model is small and random, each worker has one thread. Outputs are 32 tokens
longer than the scaled trace's: of four tokens, one prompt that comes between them decides the mean, and whether it does is chance.
"""

import argparse
import asyncio
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from baton.cli.bench import FIRST_ID, Promise, Sample, columns, send
from baton.cli.replay import run_replay
from baton.cli.trace import Line, Scaling, play, read_trace
from baton.models.create import create_model
from baton.types import Pace, Role
from benchmarks.serving import cluster
from services.router.policies import POLICIES
from services.router.simulation.__main__ import paces_of
from services.router.simulation.cluster import Plan, SimulatedCluster
from services.router.simulation.engine import Shape
from services.router.simulation.workload import asks_of

TOKENIZER = Path(__file__).parent.parent / "examples" / "demo-model"
BLOCK_SIZE, NUM_BLOCKS, BATCHED_TOKENS, MAX_SEQS = 16, 4096, 512, 64
LAYOUTS = {"1 unified": (0, 0, 1), "2 unified": (0, 0, 2), "1P1D": (1, 1, 0)}
PROMISE = Promise(ttft_ms=2000, itl_ms=200)
SCALING = Scaling(length=0.03125, longest=2000)
MORE_OUTPUT = 32  # tokens, than the scaled trace has
ALONE = (128, 32)  # tokens of prompt, more than a decode worker computes itself, and of output
KEYS = ("ttft_mean_s", "ttft_p95_s", "itl_mean_ms", "itl_p95_ms")

Paces = dict[Role, Pace]


async def alone(url: str) -> tuple[float, float]:
    """Seconds to the first token, and between tokens, with nothing beside; medians."""
    samples = [Sample() for _ in range(9)]
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for sample in samples:
            await send(client, ([random.randrange(FIRST_ID, 200) for _ in range(ALONE[0])], ALONE[1]), sample)
    return statistics.median(s.ttft_s for s in samples), statistics.median(s.mean_itl_s for s in samples)


@contextmanager
def listening(url: str, heard: list[Paces]) -> Iterator[None]:
    """Each second's paces."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(1.0):
            heard.append(paces_of(url))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def mean(heard: Sequence[Paces]) -> Paces:
    names = [field.name for field in dataclasses.fields(Pace)]
    return {role: Pace(**{name: statistics.mean(getattr(paces[role], name) for paces in heard) for name in names}) for role in heard[0]}


def simulated(counts: tuple[int, int, int], paces: Paces, hop_s: float, lines: Sequence[Line]) -> dict[str, Any]:
    shape = Shape(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_batched_tokens=BATCHED_TOKENS, max_num_seqs=MAX_SEQS)
    prefill, decode, unified = counts
    plan = Plan(prefill=prefill, decode=decode, unified=unified, shape=shape, paces=paces, hop_s=hop_s)
    samples = SimulatedCluster(plan, POLICIES["predicted"]).run(asks_of(lines, SCALING.block(), BLOCK_SIZE))
    return columns(samples, lines[-1].at, PROMISE)


def lines_of(trace: Sequence[Line], load: float, seconds: float, seed: int) -> list[Line]:
    lines = play(trace, dataclasses.replace(SCALING, seconds=seconds * load, speed=load), seed)
    return [dataclasses.replace(line, num_output_tokens=MORE_OUTPUT + line.num_output_tokens) for line in lines]


def about(lines: Sequence[Line], number: int) -> list[Line]:
    """About something else: a real worker still has what it was sent before."""
    return [dataclasses.replace(line, ids=tuple(each + (number << 32) for each in line.ids)) for line in lines]


def measure(url: str, name: str, trace: Sequence[Line], loads: Sequence[float], seconds: float, seed: int) -> list[str]:
    """Rows of one layout."""
    counts, block, rows = LAYOUTS[name], SCALING.block(), list[str]()
    run_replay(url, about(lines_of(trace, loads[0], 20.0, seed), 1), block, 1, PROMISE)  # warms up
    first_s, step_s = asyncio.run(alone(url))
    quiet = paces_of(url)
    computes, decodes = (Role.PREFILL, Role.DECODE) if counts[0] else (Role.UNIFIED, Role.UNIFIED)
    between = max(step_s - quiet[decodes].base_s - quiet[decodes].decode_s(1, sum(ALONE) - ALONE[1] / 2), 0.0)
    prompt_s = between + quiet[computes].base_s + quiet[computes].prompt_s(ALONE[0])
    hop_s = max(first_s - prompt_s, 0.0) / (6 if counts[0] else 4)
    print(f"alone {first_s:.4f} {step_s:.4f}, hop {hop_s:.5f}, between {between:.5f}", quiet, sep="\n", flush=True)
    for place, load in enumerate(loads):
        lines, heard, found = lines_of(trace, load, seconds, seed + 1), list[Paces](), list[dict[str, Any]]()
        with listening(url, heard):
            for number in (2 * place + 2, 2 * place + 3):
                found.append(run_replay(url, about(lines, number), block, number, PROMISE))
        paces = {role: dataclasses.replace(pace, base_s=pace.base_s + between) for role, pace in mean(heard).items()}
        twin = simulated(counts, paces, hop_s, lines)
        print(load, paces, *found, twin, sep="\n", flush=True)
        rows += compared(f"{name}, {load:g}", found, twin)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.3, 0.5])
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--seconds", type=float, default=45.0, help="of real time at each load, twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [f"`python -m benchmarks.simulation {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}.", "", *HEAD]
    trace = read_trace(arguments.trace)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        create_model(
            model,
            "llama",
            hidden_size=768,
            num_layers=10,
            num_heads=12,
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
                rows += measure(url, name, trace, arguments.loads, arguments.seconds, arguments.seed)
    print("\n".join(rows))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(["# The simulator beside a real cluster", "", *rows, ""]))


HEAD = ("| load | | requests | TTFT mean, s | p95, s | ITL mean, ms | p95, ms | cache hits |", "|---|---|---|---|---|---|---|---|")


def compared(name: str, found: Sequence[dict[str, Any]], twin: dict[str, Any]) -> list[str]:
    """Rows of the real runs, of the simulated one, and of the ratios: simulated ÷ the real ones' mean, and one real run ÷ the other."""

    def cells(row: dict[str, Any]) -> str:
        figures = [f"{row[key]:.3f}" if key.endswith("_s") else f"{row[key]:.1f}" for key in KEYS]
        return " | ".join([str(row["requests"]), *figures, f"{row['hit_rate']:.1%}"])

    def ratios(upper: dict[str, Any], *lower: dict[str, Any]) -> str:
        return " | ".join(f"{upper[key] / statistics.mean(row[key] for row in lower):.2f}" for key in KEYS)

    rows = [f"| {name if not number else ''} | real | {cells(row)} |" for number, row in enumerate(found)]
    rows += [f"| | simulated | {cells(twin)} |", f"| | simulated ÷ real | | {ratios(twin, *found)} | |"]
    return [*rows, *(f"| | real ÷ real | | {ratios(other, found[0])} | |" for other in found[1:])]


if __name__ == "__main__":
    main()
