"""The planner on a recorded load, in virtual time: replicas against the load, promises missed, worker-hours; beside Kubernetes' own scaler.

    python -m benchmarks.planner --trace conversation_trace.jsonl --load day [--out FILE]

Workers are simulated (services/router/simulation), the router's code and the planner's are real: it reads the text of a router's metrics
and what `/cluster` would say. A worker that is added serves after --startup seconds; one that is taken away gets nothing new and is gone
when it is empty, with every scaler. Worker-hours count from the order to the end.

`busy share` is a HorizontalPodAutoscaler (v2, its defaults) on the share of seconds in which a worker computes: what CPU or GPU utilisation
is. `queue and memory` is one on what the chart scales by: requests waiting for each prefill worker, KV memory in use. `fixed` has as many
as the planner had at most.
"""

import argparse
import dataclasses
import math
import os
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from baton.cli.bench import Promise, Sample
from baton.cli.trace import Line, Scaling, play, read_trace
from baton.metrics import RouterMetrics
from baton.types import MemberState, Role
from services.planner.observe import History, Seen, counters_of, rates_of
from services.planner.plan import Bounds, Slo, plan
from services.planner.steady import Steady
from services.router.policies import POLICIES
from services.router.simulation.__main__ import DEFAULT_PACE
from services.router.simulation.cluster import Plan, SimulatedCluster, everybodys
from services.router.simulation.workload import Ask, asks_of

POOLS = (Role.PREFILL, Role.DECODE)
EVERY_S, SAMPLE_S, WINDOW_S = 15.0, 0.5, 300.0
FIRST = (5, 2)  # workers, with every scaler
DAY = ((0, 0.25), (480, 0.25), (1320, 1.0), (1920, 1.0), (2520, 0.3), (2880, 0.3), (2910, 0.9), (3150, 0.9), (3180, 0.3), (3600, 0.3))
"""Seconds, and the share of the requests that is kept: a rise of 14 minutes, a plateau, a fall, and a burst that comes in half a minute."""


class Elastic(SimulatedCluster):
    """Whose workers come and go. Its router counts as a real one does."""

    def __init__(self, layout: Plan, startup_s: float) -> None:
        super().__init__(layout, POLICIES["predicted"])
        (self.fleet,) = self.fleets
        self.metrics = RouterMetrics("simulated")
        self._startup_s, self._number = startup_s, 0
        self.starting: dict[Role, list[float]] = {role: [] for role in POOLS}  # when each was ordered
        self.leaving: set[str] = set()
        self.since = dict.fromkeys(self.fleet.workers, 0.0)
        self.worker_s = 0.0
        self._ended_tokens = self._told_tokens = 0

    def serving(self, role: Role) -> list[str]:
        return [name for name, worker in self.fleet.workers.items() if worker.member.role is role and name not in self.leaving]

    def replicas(self, role: Role) -> int:
        return len(self.serving(role)) + len(self.starting[role])

    def scale(self, role: Role, count: int) -> None:
        for _ in range(count - self.replicas(role)):
            ordered = self.clock.now
            self.starting[role].append(ordered)
            self.clock.after(self._startup_s, partial(self._started, role, ordered))
        while self.replicas(role) > count and self.starting[role]:
            self.worker_s += self.clock.now - self.starting[role].pop()
        idlest = sorted(self.serving(role), key=lambda name: sum(self._holds(name)))
        for name in idlest[: max(self.replicas(role) - count, 0)]:
            self.leaving.add(name)
            worker = self.fleet.workers[name]
            self.fleet.is_member(worker, dataclasses.replace(worker.member, state=MemberState.DRAINING))
            self._leave(name)

    def _started(self, role: Role, ordered: float) -> None:
        if ordered in self.starting[role]:
            self.starting[role].remove(ordered)
            self._number += 1
            self._add(role, name := f"{role}-new-{self._number:04}")
            self.since[name] = ordered

    def _leave(self, name: str) -> None:
        if any(self._holds(name)):
            self.clock.after(SAMPLE_S, lambda: self._leave(name))
            return
        self.fleet.remove(self.fleet.workers[name])
        self.worker_s += self.clock.now - self.since.pop(name)

    def _holds(self, name: str) -> tuple[int, int]:
        load = self.engines[name].load()
        return load.num_running + load.num_waiting, len(self.fleet.workers[name].routed)

    def _arrived(self, number: int, ask: Ask, sample: Sample) -> None:
        self.metrics.arrived_prompt_tokens.observe(ask.num_prompt_tokens)
        super()._arrived(number, ask, sample)

    def _ended(self, journey: Any) -> None:
        super()._ended(journey)
        self.metrics.prompt_tokens.inc(journey.ask.num_prompt_tokens)
        self.metrics.cached_tokens.inc(journey.sample.cached_tokens)
        self.metrics.generation_tokens.inc(journey.ask.num_output_tokens)
        self._ended_tokens += journey.ask.num_output_tokens
        self.metrics.success("length")

    def sample(self, seconds: float) -> None:
        """The time between tokens, as a router's histogram has it of streams that have not ended: its sum and its count."""
        streams = [r for name in self.serving(Role.DECODE) for r in self.engines[name].scheduler.running if r.num_output_tokens]
        tokens = self._ended_tokens + sum(request.num_output_tokens for request in streams)
        histogram: Any = self.metrics.inter_token_latency
        histogram._sum.inc(len(streams) * seconds)
        histogram._buckets[-1].inc(max(tokens - self._told_tokens, 0))
        self._told_tokens = max(tokens, self._told_tokens)

    def described(self) -> dict[str, Any]:
        """As `/cluster`."""
        return {
            "workers": [
                {
                    "id": name,
                    "role": str(worker.member.role),
                    "state": "draining" if name in self.leaving else "ready",
                    "running": worker.load.num_running,
                    "waiting": worker.load.num_waiting,
                    "waiting_tokens": worker.load.num_waiting_tokens,
                    "waiting_pairs": worker.load.num_waiting_pairs,
                    "blocks_total": worker.load.blocks_total,
                    "block_size": worker.member.block_size,
                    "max_num_batched_tokens": worker.member.max_num_batched_tokens,
                    "pace": dataclasses.asdict(worker.load.pace),
                }
                for name, worker in self.fleet.workers.items()
            ]
        }


class ByPlan:
    def __init__(self, cluster: Elastic, slo: Slo, bounds: Bounds, startup_s: float) -> None:
        self._cluster, self._slo, self._bounds = cluster, slo, bounds
        self._history, self._steady = History(startup_s), Steady(WINDOW_S)

    def __call__(self) -> None:
        cluster = self._cluster
        counters, queued = counters_of(cluster.metrics.exposition().decode(), "the simulated router")
        seen = Seen(at=cluster.clock.now, counters={"": counters}, num_queued=queued, cluster=cluster.described())
        self._history.add(seen)
        planned = plan(self._history.load(), rates_of(seen.cluster), self._slo, dict.fromkeys(POOLS, self._bounds))
        for role in POOLS:
            needed = planned[role].workers
            if needed is not None:
                cluster.scale(role, self._steady.advise(cluster.clock.now, role, cluster.replicas(role), needed))


class ByMetric:
    """A HorizontalPodAutoscaler for each pool: ceil(replicas · metric / target), a tolerance of a tenth, pods that are not ready count as
    idle when it scales out; out at most to twice as many or four more in a round, in by the most of five minutes."""

    def __init__(self, cluster: Elastic, targets: dict[Role, float], metrics: dict[Role, Callable[[str], float]], bounds: Bounds) -> None:
        self._cluster, self._targets, self._metrics, self._bounds = cluster, targets, metrics, bounds
        self._steady = Steady(WINDOW_S)

    def __call__(self) -> None:
        cluster = self._cluster
        for role in POOLS:
            replicas, values = cluster.replicas(role), [self._metrics[role](name) for name in cluster.serving(role)]
            ratio = sum(values) / len(values) / self._targets[role]
            if ratio > 1:
                ratio = max(sum(values) / replicas / self._targets[role], 1.0)
            desired = replicas if abs(ratio - 1) <= 0.1 else math.ceil(ratio * (replicas if ratio > 1 else len(values)))
            desired = min(max(desired, self._bounds.at_least), self._bounds.at_most, max(2 * replicas, replicas + 4))
            cluster.scale(role, self._steady.advise(cluster.clock.now, role, replicas, desired))


class Busy:
    """The share of the last seconds in which each worker computed."""

    def __init__(self, cluster: Elastic) -> None:
        self._cluster = cluster
        self._seen: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=int(EVERY_S / SAMPLE_S)))

    def sample(self) -> None:
        for name in self._cluster.fleet.workers:
            self._seen[name].append(self._cluster.engines[name]._busy)

    def __call__(self, name: str) -> float:
        seen = self._seen[name]
        return sum(seen) / len(seen) if seen else 0.0


def simulate(asks: Sequence[Ask], scaler: str, first: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    slo = Slo(ttft_s=arguments.slo_ttft, itl_s=arguments.slo_itl)
    cluster = Elastic(Plan(prefill=first[0], decode=first[1], paces=everybodys(DEFAULT_PACE)), arguments.startup)
    bounds, busy = Bounds(1, arguments.at_most), Busy(cluster)
    last = asks[-1].at

    def waiting(name: str) -> float:
        return cluster.fleet.workers[name].load.num_waiting

    def memory(name: str) -> float:
        load = cluster.fleet.workers[name].load
        return 1 - load.blocks_free / load.blocks_total

    act: Callable[[], None] = {
        "planner": lambda: ByPlan(cluster, slo, bounds, arguments.startup),
        "busy share, 70 %": lambda: ByMetric(cluster, dict.fromkeys(POOLS, 0.7), dict.fromkeys(POOLS, busy), bounds),
        "queue and memory": lambda: ByMetric(
            cluster, {Role.PREFILL: 2.0, Role.DECODE: 0.7}, {Role.PREFILL: waiting, Role.DECODE: memory}, bounds
        ),
    }.get(scaler, lambda: lambda: None)()
    curve: list[tuple[float, int, int]] = []

    def every(seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            if cluster.clock.now + seconds < last:
                cluster.clock.after(seconds, again)

        cluster.clock.after(seconds, again)

    every(SAMPLE_S, busy.sample)
    every(SAMPLE_S, lambda: cluster.sample(SAMPLE_S))

    def planned() -> None:
        act()
        prefill, decode = map(cluster.replicas, POOLS)
        curve.append((cluster.clock.now, prefill, decode))

    every(EVERY_S, planned)
    samples = cluster.run(asks)
    cluster.worker_s += sum(max(last - begun, 0.0) for begun in cluster.since.values())
    return {"scaler": scaler, "curve": curve, "samples": samples, "hours": cluster.worker_s / 3600}


def thinned(lines: Sequence[Line], seed: int) -> list[Line]:
    """By DAY."""
    rng = random.Random(seed)

    def kept(at: float) -> float:
        (left, low), (right, high) = next(pair for pair in pairwise(DAY) if at <= pair[1][0])
        return low + (high - low) * (at - left) / (right - left)

    return [line for line in lines if line.at <= DAY[-1][0] and rng.random() < kept(line.at)]


def report(name: str, asks: Sequence[Ask], found: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    ttft, itl = 1e3 * arguments.slo_ttft, 1e3 * arguments.slo_itl
    alone = [DEFAULT_PACE.prompt_s(ask.num_prompt_tokens) + arguments.slo_itl > arguments.slo_ttft for ask in asks]
    columns = (
        "scaler",
        "first token late",
        "tokens late",
        "promise missed",
        "in the worst 5 minutes",
        "in the others",
        "worker-hours",
        "most prefill",
        "decode",
    )
    rows = [
        f"## {name}",
        "",
        f"{len(asks)} requests in {asks[-1].at / 60:.0f} minutes; {sum(alone) / len(asks):.1%} are too long to be in time unless cached.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in found:
        samples, curve = row["samples"], row["curve"]
        missed = [not Promise(ttft_ms=ttft, itl_ms=itl).kept(sample) for sample in samples]
        late = [not Promise(ttft_ms=ttft).kept(sample) for sample in samples]
        slow = [not Promise(itl_ms=itl).kept(sample) for sample in samples]
        parts: dict[int, list[bool]] = defaultdict(list)
        for ask, miss in zip(asks, missed, strict=True):
            parts[int(ask.at // 300)].append(miss)
        worst = max((part for part in parts.values() if len(part) > 20), key=lambda part: sum(part) / len(part))
        others = (sum(missed) - sum(worst)) / max(len(missed) - len(worst), 1)
        most = [max(point[place] for point in curve) for place in (1, 2)]
        shares = " | ".join(f"{sum(each) / len(each):.1%}" for each in (late, slow, missed))
        rows.append(
            f"| {row['scaler']} | {shares} | {sum(worst) / len(worst):.1%} | {others:.1%} | {row['hours']:.2f} | {most[0]} | {most[1]} |"
        )
    rows += ["", "Replicas, prefill + decode, by the minute:", ""]
    minutes = range(0, int(asks[-1].at / 60) + 1, 3)
    rows += ["| minute | " + " | ".join(map(str, minutes)) + " |", "|---" * (len(minutes) + 1) + "|"]
    counts = [sum(60 * minute <= ask.at < 60 * minute + 180 for ask in asks) / 180 for minute in minutes]
    rows.append("| requests/s | " + " | ".join(f"{count:.1f}" for count in counts) + " |")
    for row in found:
        points = [min(row["curve"], key=lambda point, at=60 * minute + 90: abs(point[0] - at)) for minute in minutes]
        rows.append(f"| {row['scaler']} | " + " | ".join(f"{point[1]}+{point[2]}" for point in points) + " |")
    return [*rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--load", choices=["day", "hour"], required=True, help="thinned to a day's curve, or the hour as it was recorded")
    parser.add_argument("--fixed", nargs="*", metavar="P+D", help="these pools, and no scaler")
    parser.add_argument("--copies", type=int, default=2, help="of the trace at once")
    parser.add_argument("--startup", type=float, default=60.0, help="seconds that a worker takes to start")
    parser.add_argument("--slo-ttft", type=float, default=10.0)
    parser.add_argument("--slo-itl", type=float, default=0.1)
    parser.add_argument("--at-most", type=int, default=24, help="workers of a pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines, scaling = read_trace(arguments.trace), Scaling(copies=arguments.copies)
    played = play(lines, scaling, arguments.seed)
    chosen = thinned(played, arguments.seed) if arguments.load == "day" else played
    asks = asks_of(chosen, scaling.block(), 512)
    scalers = () if arguments.fixed else ("planner", "busy share, 70 %", "queue and memory")
    found = [simulate(asks, scaler, FIRST, arguments) for scaler in scalers]
    for pools in arguments.fixed or ["+".join(str(max(point[place] for point in found[0]["curve"])) for place in (1, 2))]:
        prefill, _, decode = pools.partition("+")
        found.append(simulate(asks, f"fixed, {pools}", (int(prefill), int(decode)), arguments))
    command = f"`python -m benchmarks.planner {' '.join(sys.argv[1:])}`, in virtual time; {os.cpu_count()} cores."
    name = "A day's curve" if arguments.load == "day" else "The hour as recorded"
    text = [command, "", *report(name, asks, found, arguments)]
    print("\n".join(text), flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(["# The planner under a recorded load", "", *text]))


if __name__ == "__main__":
    main()
