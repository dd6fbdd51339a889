"""Routing policies on simulated workers: the table of benchmarks/results/routing-simulated.md; and what a decision takes.

    python -m benchmarks.routing --trace conversation_trace.jsonl --rows FOLDER [--limit-s 110] [--out FILE]
    python -m benchmarks.routing --trace conversation_trace.jsonl --bound
    python -m benchmarks.routing --decision 1000 [--excluded 1] [--versions 2] [--tiers]

Rows that FOLDER has are not computed again; with --limit-s, it stops when so much time has gone by, and goes on in the next call.
"""

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from baton.cli.bench import Promise
from baton.cli.trace import Scaling, play, read_trace
from baton.config import POLICY_NAMES
from baton.types import BlocksStored, Load, Member, MemberState, Pace, Role, StateUpdate, Tier
from services.router.fleet import Fleet, Worker
from services.router.policies import POLICIES
from services.router.policy import Facts
from services.router.simulation.__main__ import DEFAULT_PACE, run
from services.router.simulation.cluster import Plan, everybodys
from services.router.simulation.engine import Shape
from services.router.simulation.workload import Agents, Ask, agents, asks_of

SEEDS = (0, 1, 2)
KV_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Setting:
    workload: str
    workers: int  # half of them for prefill
    loads: tuple[float, ...]
    seconds: float
    ttft_slo_s: float
    block_size: int

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.workers}"

    @property
    def copies(self) -> int:
        return self.workers // 16


SETTINGS = (
    Setting("conversation", 16, (0.7, 1.1, 1.5, 1.9), 600.0, 10.0, 512),
    Setting("agents", 16, (0.7, 1.2, 1.7, 2.2), 120.0, 2.0, 64),
    Setting("conversation", 256, (1.1, 1.5, 1.9, 2.5), 60.0, 10.0, 512),
    Setting("agents", 256, (0.7, 1.2, 1.7, 2.2), 24.0, 2.0, 256),
)
ITL_SLO_S = 0.1
NO_PROMISE = {"ttft_slo_s": None, "itl_slo_s": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in POLICY_NAMES},
    "predicted, refuses nobody": ("predicted", NO_PROMISE),
    "predicted, prompts at P only": ("predicted", {"local_prefill": False}),
    "mooncake, refuses nobody": ("mooncake", NO_PROMISE),
}
LARGE = ("predicted", "mooncake", "cache_aware", "dynamo", "llm_d")  # with 256 workers
PEERS = tuple(name for name in VARIANTS if not name.startswith("predicted"))


@cache
def workload(setting: Setting, trace: Path, load: float, seed: int) -> list[Ask]:
    if setting.workload == "agents":
        return agents(Agents(rate=load * setting.copies, seconds=setting.seconds), setting.block_size, seed)
    scaling = Scaling(seconds=setting.seconds, copies=setting.copies, speed=load)
    return asks_of(play(read_trace(trace), scaling, seed), scaling.block(), setting.block_size)


def measure(setting: Setting, trace: Path, load: float, seed: int, variant: str) -> dict[str, Any]:
    policy, changes = VARIANTS[variant]
    half = setting.workers // 2
    plan = Plan(
        prefill=half,
        decode=half,
        shape=Shape(num_blocks=KV_TOKENS // setting.block_size, block_size=setting.block_size),
        paces=everybodys(DEFAULT_PACE),
        ttft_slo_s=setting.ttft_slo_s,
        itl_slo_s=ITL_SLO_S,
    )
    promise = Promise(ttft_ms=1e3 * setting.ttft_slo_s, itl_ms=1e3 * ITL_SLO_S)
    row = run(dataclasses.replace(plan, **changes), policy, workload(setting, trace, load, seed), seed, promise)
    return row | {"setting": setting.name, "load": load, "seed": seed, "variant": variant}


def collect(
    folder: Path, trace: Path, limit_s: float, variants: Sequence[str], settings: Sequence[Setting], seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], bool]:
    """All rows that there are; whether those are all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, begun, whole = list[dict[str, Any]](), time.monotonic(), True
    for setting in settings:
        for load in setting.loads:
            for seed in seeds:
                for variant in (each for each in variants if setting.copies == 1 or each in LARGE):
                    path = folder / f"{setting.name}-{load:g}-{seed}-{variant.replace(', ', '_').replace(' ', '_')}.json"
                    if not path.exists():
                        if time.monotonic() - begun > limit_s:
                            whole = False
                            continue
                        path.write_text(json.dumps(measure(setting, trace, load, seed, variant)))
                    rows.append(json.loads(path.read_text()))
                workload.cache_clear()
    return rows, whole


def report(rows: Sequence[dict[str, Any]], command: str, settings: Sequence[Setting], seeds: Sequence[int]) -> str:
    """Means of the seeds; beside the share that was kept, the least and the most of them."""
    lines = [
        "# Routing policies on simulated workers",
        "",
        f"`{command}`; seeds {', '.join(map(str, seeds))}. How it is simulated, and with what settings:",
        "[simulation.md](../../docs/simulation.md). Half of the workers are for prefill. *Kept*: requests whose first token came in time",
        "(conversation 10 s, agents 2 s) and whose mean time between tokens was 100 ms at most, of all that were sent; in brackets the",
        "least and the most of the seeds. Refused ones are not kept, and are in no mean. *Prompts' work*: seconds of computing",
        "what was not cached (with `predicted`, of those it served), in a second, for each prefill worker.",
        "",
    ]
    for setting in settings:
        for load in setting.loads:
            found = {
                variant: [row for row in rows if (row["setting"], row["load"], row["variant"]) == (setting.name, load, variant)]
                for variant in VARIANTS
            }
            found = {variant: some for variant, some in found.items() if len(some) == len(seeds)}
            if not found:
                continue
            unit = "sessions/s" if setting.workload == "agents" else "of the trace's rate"
            per_16 = "" if setting.copies == 1 else f", {setting.copies} times"
            some = found.get("predicted") or next(iter(found.values()))
            requests, work = (statistics.mean(row[key] for row in some) for key in ("requests", "computing"))
            lines += [
                f"## {setting.workers} workers, {setting.workload}, {load:g} {unit}{per_16}",
                "",
                f"{requests:,.0f} requests; prompts' work {work / (setting.workers // 2):.2f}.",
                "",
                "| policy | TTFT mean, s | p95, s | ITL mean, ms | p95, ms | kept | goodput, requests/s | cache hits | refused |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for variant, some in sorted(found.items(), key=lambda item: -statistics.mean(row["met"] for row in item[1])):
                lines.append(line(variant, some))
            lines += ["", verdict(found), ""]
    return "\n".join(lines)


def line(variant: str, some: Sequence[dict[str, Any]]) -> str:
    mean = {key: statistics.mean(row[key] for row in some) for key in some[0] if isinstance(some[0][key], int | float)}
    least, most = min(row["met"] for row in some), max(row["met"] for row in some)
    name = f"**{variant}**" if variant == "predicted" else variant
    refused = mean["failures"] / mean["requests"]
    return (
        f"| {name} | {mean['ttft_mean_s']:.2f} | {mean['ttft_p95_s']:.2f} | {mean['itl_mean_ms']:.1f} | {mean['itl_p95_ms']:.1f} | "
        f"{mean['met']:.1%} ({least:.1%} to {most:.1%}) | {mean['goodput']:.2f} | {mean['hit_rate']:.1%} | {refused:.1%} |"
    )


def verdict(found: dict[str, list[dict[str, Any]]]) -> str:
    """`predicted` against the best peer, in each column that it is judged by."""

    def mean(variant: str, key: str) -> float:
        return statistics.mean(row[key] for row in found[variant])

    peers = [variant for variant in found if variant in PEERS]
    if "predicted" not in found or not peers:
        return ""
    fastest, keeper = min(peers, key=lambda name: mean(name, "ttft_mean_s")), max(peers, key=lambda name: mean(name, "met"))
    return (
        f"Mean TTFT ÷ the best peer's ({fastest}): {mean('predicted', 'ttft_mean_s') / mean(fastest, 'ttft_mean_s'):.2f}. "
        f"Kept, against the best peer ({keeper}): {100 * (mean('predicted', 'met') - mean(keeper, 'met')):+.1f} points."
    )


def bound(setting: Setting, asks: Sequence[Ask]) -> float:
    """Seconds to the first token that no policy can be below in the mean which refuses only what would be late anyhow: each prompt computed
    at once, alone on an idle worker that holds all that was ever sent before."""
    known, times, pace, shape = set[bytes](), list[float](), DEFAULT_PACE, Shape(block_size=setting.block_size)
    for ask in sorted(asks, key=lambda ask: ask.at):
        cached = 0
        while cached < len(ask.hashes) and ask.hashes[cached] in known:
            cached += 1
        matched = min(cached * setting.block_size, ask.num_prompt_tokens - 1)
        missing = ask.num_prompt_tokens - matched
        pairs = matched * missing + missing * (missing + 1) / 2
        steps = -(-missing // shape.max_num_batched_tokens)
        times.append(pace.base_s * steps + pace.token_s * missing + pace.pair_s * pairs)
        known.update(ask.hashes)
    return statistics.mean([seconds for seconds in times if seconds <= setting.ttft_slo_s] or [0.0])


def decision(workers: int, excluded: int, versions: int, *, tiers: bool, blocks: int = 256, rounds: int = 2000) -> None:
    """CPU milliseconds from a prompt's hashes to a placement: the match, the view and the policy, in a fleet whose loads change in
    between. `excluded`: workers that are left out, as while their breakers are open. `versions`: of the model, of which one is asked for.
    `tiers`: each worker holds as much in host memory and files as on its device, and the pool has half of the prompts."""
    rng = random.Random(0)
    fleet, shared = Fleet(), [rng.randbytes(16) for _ in range(blocks // 8)]
    prompts = [[*shared, *(rng.randbytes(16) for _ in range(blocks - len(shared)))] for _ in range(200)]
    pace = Pace(base_s=0.01, token_s=1e-4, pair_s=1e-9, row_s=1e-4, context_s=1e-8, push_token_s=1e-6)
    everybody, fetching = list[Worker](), tuple[tuple[Tier, float], ...]()
    for number in range(workers):
        role = Role.PREFILL if number < workers // 2 else Role.DECODE
        member = Member(id=f"w{number:05}", role=role, address="", fingerprint=f"f{number % versions}", block_size=16)
        everybody.append(fleet.add(member))
        held = tuple(key for prompt in rng.sample(prompts, 20) for key in prompt[: rng.randrange(blocks)])
        events = [BlocksStored(held)]
        if tiers:
            for tier in (Tier.HOST, Tier.FILES):
                some = (key for prompt in rng.sample(prompts, 20) for key in prompt[: rng.randrange(blocks)])
                events.append(BlocksStored(tuple(some), tier))
            if not number:
                events += [BlocksStored(tuple(prompt), Tier.POOL) for prompt in prompts[::2]]
            fetching = ((Tier.HOST, 1e-6), (Tier.POOL, 1e-5), (Tier.FILES, 2e-5))
        fleet.update(everybody[-1], update(rng, pace, fetching, *events))
    left_out = [worker.member.id for worker in everybody[:excluded]]
    told = f"{workers} workers of {versions} version{'s' if versions > 1 else ''}, {excluded} of them left out"
    print(f"| policy, {told}, {blocks} blocks | p50, ms | p99, ms |\n|---|---|---|")
    for name, policy in POLICIES.items():
        times: list[float] = []
        for number in range(rounds):
            prompt = rng.choice(prompts)
            fleet.routed(everybody[rng.randrange(workers // 2)].member.id, f"{name}-{number}", 1000, 10**6, prompt)
            fleet.update(rng.choice(everybody), update(rng, pace, fetching))
            begun = time.thread_time()
            view = fleet.view(lambda size, p=prompt: p, left_out).version("f0")
            policy(Facts(num_prompt_tokens=16 * blocks + 4, turn=number, num_output_tokens=128), view)
            times.append(time.thread_time() - begun)
        print(f"| {name} | {1e3 * np.percentile(times, 50):.2f} | {1e3 * np.percentile(times, 99):.2f} |", flush=True)


def update(rng: random.Random, pace: Pace, fetching: tuple[tuple[Tier, float], ...], *events: BlocksStored) -> StateUpdate:
    pending = rng.choice([0, rng.randrange(50_000)])
    load = Load(
        num_running=rng.randrange(30),
        num_waiting=rng.randrange(5),
        num_waiting_tokens=pending,
        num_waiting_pairs=5000 * pending,
        num_context_tokens=rng.randrange(200_000),
        fetch_token_s=fetching,
        pace=dataclasses.replace(pace, token_s=pace.token_s * rng.uniform(0.9, 1.1)),
    )
    return StateUpdate(sequence=0, state=MemberState.READY, load=load, events=events, snapshot=bool(events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--rows", type=Path, help="folder")
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--settings", nargs="*", default=[each.name for each in SETTINGS], choices=[each.name for each in SETTINGS])
    parser.add_argument("--loads", nargs="*", type=float, help="in place of the settings' own")
    parser.add_argument("--bound", action="store_true", help="the mean time to the first token without any waiting")
    parser.add_argument("--decision", type=int, metavar="WORKERS")
    parser.add_argument("--excluded", type=int, default=0, metavar="WORKERS", help="of --decision's, left out")
    parser.add_argument("--versions", type=int, default=1, help="of the model, with --decision: one of them is asked for")
    parser.add_argument("--tiers", action="store_true", help="with --decision: blocks in host memory, files and the pool, too")
    arguments = parser.parse_args()
    if arguments.decision:
        decision(arguments.decision, arguments.excluded, arguments.versions, tiers=arguments.tiers)
        return
    if arguments.trace is None or (arguments.rows is None and not arguments.bound):
        parser.error("give --trace and --rows, or --bound, or --decision")
    settings = [
        dataclasses.replace(each, loads=tuple(arguments.loads or each.loads)) for each in SETTINGS if each.name in arguments.settings
    ]
    if arguments.bound:
        for setting in settings:
            for load in setting.loads:
                least = statistics.mean(bound(setting, workload(setting, arguments.trace, load, seed)) for seed in arguments.seeds)
                print(f"{setting.name} at {load:g}: no less than {least:.2f} s", flush=True)
        return
    assert arguments.rows is not None
    rows, whole = collect(arguments.rows, arguments.trace, arguments.limit_s, arguments.variants, settings, arguments.seeds)
    if arguments.out is not None:
        command = "python -m benchmarks.routing --trace conversation_trace.jsonl --rows FOLDER"
        arguments.out.write_text(report(rows, command, settings, arguments.seeds))
    print(f"{len(rows)} rows{'' if whole else ', more to do'}")
    sys.exit(0 if whole else 3)


if __name__ == "__main__":
    main()
