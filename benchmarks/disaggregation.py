"""Prefill and decode apart, beside unified workers of the same model on as many devices: what a request's hand-over costs, what load does
to both, and what a hit in the KV pool is worth.

    python -m benchmarks.disaggregation --shape llama-3.1-8b --lengths 8192 --rates 2 4 6 8 --load 4096 256      # two GPUs
    python -m benchmarks.disaggregation --model DIR --lengths 1000 --rates 0.5 1 --load 256 32 --seconds 12      # anywhere

`--shape`: random weights; only config.json is needed, which is made. One cluster at a time has the devices. Tables for benchmarks/results/.
"""

import argparse
import asyncio
import json
import math
import random
import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from baton.cli.bench import Load, drive, summarise
from benchmarks.engine import MODELS
from benchmarks.handover import one
from benchmarks.serving import cluster

TOKENIZER = Path(__file__).parent.parent / "examples" / "demo-model"
VOCAB = 2000  # of the tokenizer above: ids below are sent
FAILED: list[str] = []
UNIFIED, APART = ("--unified", "2", "--kvstore", "0"), ("--prefill", "1", "--decode", "1", "--kvstore", "0")


@contextmanager
def running(model: Path, options: Sequence[str]) -> Iterator[str]:
    """Its URL; in the end, how long it took to start, which path the KV took, and what its processes warned of."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as logs:
        try:
            with cluster(["--etcd", "none", "--model", str(model), "--log-dir", logs, *options]) as url:
                print(f"<!-- {' '.join(options[:4])}: ready after {time.monotonic() - started:.0f} s -->", flush=True)
                yield url
        finally:
            for log in sorted(Path(logs).glob("*.log")):
                lines = log.read_text(errors="replace").splitlines()
                told = [line[24:] for line in lines if "push to" in line]
                told += [line[24:] for line in lines if re.search(r" (WARNING|ERROR|CRITICAL) |Error: ", line)][-8:]
                print(*(f"<!-- {log.stem}: {line[:300]} -->" for line in told), sep="\n", end="\n" * bool(told), flush=True)


@contextmanager
def part(name: str) -> Iterator[None]:
    """One that fails leaves the others their turn."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        print(f"<!-- {name}: failed -->", flush=True)
        FAILED.append(name)


def shape(name: str) -> Path:
    """A folder with the model's config.json, and a tokenizer that has a word for each of its ids: a chunk without text is not sent."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"w{number}": number for number in range(len(words), MODELS[name]["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def alone(url: str, length: int) -> tuple[float, float, float, float]:
    """Milliseconds of a request that finds every device as idle: to the first token, to the second, of a step, and of the prompt's."""
    time.sleep(0.5)
    count, seconds = steps_of(url)
    ttft, gap, step = one(url, length, time.time_ns(), VOCAB)
    later, total = steps_of(url)
    return ttft, gap, step, (total - seconds) * 1e3 - (later - count - 1) * step


def steps_of(url: str) -> tuple[float, float]:
    """How many steps all workers have made, and their seconds."""
    found = [0.0, 0.0]
    for worker in httpx.get(f"{url}/cluster", timeout=10).json()["workers"]:
        page = httpx.get(f"http://{worker['metrics']}/metrics", timeout=10).text
        for place, part in enumerate(("count", "sum")):
            found[place] += sum(map(float, re.findall(rf"^baton:step_seconds_{part}{{[^}}]*}} (\S+)$", page, re.MULTILINE)))
    return found[0], found[1]


def requests_alone(model: Path, options: Sequence[str], lengths: Sequence[int], rounds: int, layouts: Sequence[str]) -> None:
    """TTFT, first to second token, a step: of one request at a time."""
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    for name, layout in (("unified", UNIFIED), ("1P1D", APART)):
        if name not in layouts:
            continue
        with part(f"{name}, alone"), running(model, [*layout, *options]) as url:
            for length in lengths:
                times = [alone(url, length) for _ in range(rounds + 2)][2:]
                found[name, length] = tuple(statistics.median(column) for column in zip(*times, strict=True))
    print(
        "\n| prompt | | TTFT, ms | the prompt's step | first to second token, ms | a step, ms | TTFT ÷ unified | steps to the second |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for (name, length), (ttft, gap, step, computed) in found.items():
        ratio = ttft / found.get(("unified", length), (math.nan,))[0]
        print(
            f"| {length:,} | {name} | {ttft:.1f} | {computed:.1f} | {gap:.2f} | {step:.2f} | {ratio:.3f} | {gap / step:.2f} |", flush=True
        )


def under_load(
    model: Path,
    options: Sequence[str],
    load: Sequence[int],
    rates: Sequence[float],
    seconds: float,
    slo: Sequence[float],
    layouts: Sequence[str],
) -> None:
    """Poisson arrivals; refusals and failures count as misses."""
    print(
        f"\n{load[0]} in / {load[1]} out, goodput: TTFT ≤ {slo[0]:g} ms and a request's mean ITL ≤ {slo[1]:g} ms\n\n"
        "| requests/s | | TTFT p50 / p99, ms | ITL p50 / p99, ms | goodput, requests/s | met | output tok/s |\n"
        "|---|---|---|---|---|---|---|"
    )
    strict = ("--set", "router.local_prefill=false")
    for name, layout, more in (("2 unified", UNIFIED, ()), ("1P1D", APART, ()), ("1P1D, prompts at P only", APART, strict)):
        if not any(wanted in name for wanted in layouts):
            continue
        with part(f"{name}, load"), running(model, [*layout, *options, *more]) as url:
            for number, rate in enumerate((rates[0], *rates)):  # the first warms up
                sent = Load(
                    num_requests=max(int(rate * seconds), 8), concurrency=1, rate=rate, input_len=(load[0], load[0]),
                    output_len=(load[1], load[1]), shared_prefix=0, repeat_prompts=1, seed=time.time_ns() % 2**31,
                    ttft_slo_ms=slo[0], itl_slo_ms=slo[1],
                )  # fmt: skip
                result = summarise(*asyncio.run(drive(url, sent)), sent)
                if not number:
                    continue
                ttft, itl = result["ttft_ms"], result["itl_ms"]
                print(
                    f"| {rate:g} | {name} | {ttft['p50']:.0f} / {ttft['p99']:.0f} | {itl['p50']:.1f} / {itl['p99']:.1f} | "
                    f"{result['goodput_requests_per_s']:.2f} | {result['slo_met']:.0%} | {result['output_tokens_per_s']:.0f} |",
                    flush=True,
                )


def pool_hits(model: Path, options: Sequence[str], lengths: Sequence[int], rounds: int) -> None:
    """The same prompt to one worker, which computes it, then to the other, which finds it in the pool (two workers take turns)."""
    print("\n| prompt | TTFT computed, ms | from the pool, ms | ÷ |\n|---|---|---|---|")
    with part("pool"), running(model, ["--unified", "2", "--kvstore", "1", "--policy", "round_robin", *options]) as url:
        for length in lengths:
            times: dict[str, list[float]] = {"computed": [], "pool": []}
            for number in range(rounds + 1):
                seed = random.Random(time.time_ns()).randrange(2**31)
                for way in times:
                    ttft, _, _ = one(url, length, seed, VOCAB)
                    time.sleep(1.0)  # its blocks are saved in the background
                    if number:
                        times[way].append(ttft)
            computed, pool = (statistics.median(values) for values in times.values())
            print(f"| {length:,} | {computed:.1f} | {pool:.1f} | {pool / computed:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--shape", choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=int, nargs=2, default=[4096, 256], metavar=("IN", "OUT"))
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals at each rate")
    parser.add_argument("--slo", type=float, nargs=2, default=[1000.0, 25.0], metavar=("TTFT_MS", "ITL_MS"))
    parser.add_argument("--only", nargs="*", default=["alone", "load", "pool"], choices=["alone", "load", "pool"])
    parser.add_argument("--layouts", nargs="+", default=["unified", "1P1D"], choices=["unified", "1P1D"])
    parser.add_argument("--set", action="append", default=[], help="as baton up takes it")
    arguments = parser.parse_args()
    options = [part for setting in arguments.set for part in ("--set", setting)]
    model = arguments.model
    if arguments.shape:
        model = shape(arguments.shape)
        options += ["--set", "prefill.engine.load_format=dummy", "--set", "decode.engine.load_format=dummy"]
    if "alone" in arguments.only:
        requests_alone(model, options, arguments.lengths, arguments.rounds, arguments.layouts)
    if "load" in arguments.only and arguments.rates:
        under_load(model, options, arguments.load, arguments.rates, arguments.seconds, arguments.slo, arguments.layouts)
    if "pool" in arguments.only:
        pool_hits(model, options, arguments.lengths, arguments.rounds)
    if FAILED:
        raise SystemExit(f"failed: {'; '.join(FAILED)}")


if __name__ == "__main__":
    main()
