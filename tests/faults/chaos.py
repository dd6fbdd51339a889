"""Random requests, cancels, kills and stops for a while: no wrong token, no block that differs from what was computed or stays taken, no
wait over lease + 2 s.

    python -m tests.faults.chaos --requests 10000 --minutes 30 [--seed 0] [--masters 2]

Greedy tokens are compared with transformers' `generate`. Prompts share prefixes; their salts make some of them new to every cache and leave
others for the prefix caches and the pool, which are small, so that blocks are evicted all the time. Workers run with push.verify and
pool.verify. Workers, and beside them the processes of the pool, are killed (the supervisor starts them again) or stopped for a while,
shorter or longer than a lease: one worker and one of the pool's at a time; the next fault comes when all are there again.
"""

import argparse
import asyncio
import collections
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.cluster import WORKER_ROLES, RunningCluster, running_cluster
from tests.faults.traffic import Outcome, Prompt, stream

LEASE_S = 5.0
LIMIT_S = LEASE_S + 2.0
MAX_TOKENS = 32
CONCURRENCY = 6
CANCELLED = 0.1  # share of the requests
LENGTHS = (3, 40, 70, 120, 200, 333, 520, 900)
POOL_ROLES = ("kvstore", "kvstore-master", "mooncake_master")
SETTINGS = (
    f"all.cluster.lease_s={LEASE_S:g}", "prefill.push.verify=true", "decode.push.verify=true", "prefill.pool.verify=true",
    "decode.pool.verify=true", "prefill.engine.num_blocks=400", "decode.engine.num_blocks=600", "kvstore.memory=48MiB",
    "router.max_migrations=10",
)  # fmt: skip
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]
CLUSTER: dict[str, Any] = {"prefill": 2, "decode": 2, "kvstore": 2, "options": OPTIONS}


@dataclass(frozen=True)
class Case:
    token_ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass
class Report:
    finished: int = 0
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    totals: collections.Counter[str] = field(default_factory=collections.Counter)
    unusual: list[str] = field(default_factory=list)  # lines of the logs

    def __str__(self) -> str:
        asked = self.finished + self.cancelled + len(self.errors)
        rows = [
            f"{asked} requests in {self.seconds:.0f} s: {self.finished} finished, {self.cancelled} cancelled, {len(self.errors)} failed, "
            f"{len(self.wrong)} with other tokens; slowest wait {self.slowest:.1f} s",
            "faults: " + ", ".join(f"{count} × {name}" for name, count in sorted(self.faults.items())),
            "counted by the workers: " + ", ".join(f"{name} {count:.0f}" for name, count in sorted(self.totals.items())),
        ]
        return "\n".join([*rows, *self.wrong[:10], *self.errors[:10], *self.slow[:20], *self.unusual[:30]])


def make_cases(model: Path, count: int, seed: int) -> list[Case]:
    """With transformers' greedy tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    rng = random.Random(seed)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    families = [[rng.randrange(4, 2000) for _ in range(max(LENGTHS))] for _ in range(4)]
    cases = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)] + rng.randrange(-2, 3)
        shared = rng.randrange(length + 1)
        prompt = rng.choice(families)[:shared] + [rng.randrange(4, 2000) for _ in range(length - shared)]
        with torch.inference_mode():
            inputs = torch.tensor([prompt])
            mask = torch.ones_like(inputs)
            tokens = network.generate(inputs, attention_mask=mask, do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=None)
        cases.append(Case(tuple(prompt), tuple(tokens[0, length:].tolist())))
    return cases


class Traffic:
    def __init__(self, cluster: RunningCluster, cases: Sequence[Case], report: Report, *, requests: int, until: float, seed: int) -> None:
        self._cluster, self._cases, self._report, self._until = cluster, cases, report, until
        self._rng, self._left, self._number = random.Random(seed), requests, 0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._cluster.url, timeout=httpx.Timeout(120), limits=limits) as client:
            await asyncio.gather(*(self._client(client) for _ in range(CONCURRENCY)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        rng = self._rng
        while self._left > 0 and time.monotonic() < self._until:
            self._left -= 1
            self._number += 1
            case = rng.choice(self._cases)
            salt = str(self._number if rng.random() < 0.4 else rng.randrange(self._number // 40, self._number // 40 + 3))
            prompt = Prompt(case.token_ids, rng.randrange(1, MAX_TOKENS + 1), 0.0, 0, salt)
            task = asyncio.create_task(stream(client, prompt))
            if rng.random() < CANCELLED:
                await asyncio.sleep(rng.random() ** 2 / 2)
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    self._report.cancelled += 1
                    continue
            self._judge(await task, prompt, case)

    def _judge(self, outcome: Outcome, prompt: Prompt, case: Case) -> None:
        report, what = self._report, f"{len(prompt.token_ids)} + {prompt.max_tokens} tokens, salt {prompt.salt}"
        if outcome.error is not None:
            report.errors.append(f"{time.strftime('%X')} {what}: {outcome.error}")
            return
        report.finished += 1
        report.slowest = max(report.slowest, outcome.slowest)
        if outcome.slowest > LIMIT_S:
            report.slow.append(f"{time.strftime('%X')} {what}: waited {outcome.slowest:.1f} s")
        if tuple(outcome.token_ids) != case.expected[: prompt.max_tokens]:
            report.wrong.append(f"{time.strftime('%X')} {what}: {outcome.token_ids} instead of {case.expected[: prompt.max_tokens]}")


class Faults:
    """To processes of these roles, one at a time, until cancelled; `mend` undoes what is under way."""

    def __init__(self, cluster: RunningCluster, report: Report, seed: int, roles: Sequence[str]) -> None:
        self._cluster, self._report, self._rng, self._roles = cluster, report, random.Random(seed), roles
        self._stopped: psutil.Process | None = None

    async def run(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.uniform(0.5, 3))
            children = self._cluster.children()
            name = rng.choice(sorted(name for name in children if _role(name) in self._roles))
            victim, kind = children[name], _role(name)
            if rng.random() < 0.6:
                self._report.faults[f"kill {kind}"] += 1
                victim.send_signal(signal.SIGKILL)
            else:
                self._report.faults[f"stop {kind}"] += 1
                self._stopped = victim
                victim.send_signal(signal.SIGSTOP)
                await asyncio.sleep(rng.choice((rng.uniform(0.1, 2), rng.uniform(LEASE_S - 2, LEASE_S + 3))))
                self.mend()
            await asyncio.to_thread(self._whole_again, {name for name in children if _role(name) in self._roles})

    def mend(self) -> None:
        if self._stopped is not None and self._stopped.is_running():
            self._stopped.send_signal(signal.SIGCONT)
        self._stopped = None

    def _whole_again(self, names: set[str], timeout_s: float = 60) -> None:
        expected = {name for name in names if _role(name) in WORKER_ROLES}
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            time.sleep(0.2)
            ready = {worker["id"] for worker in self._cluster.workers() if worker["state"] == "ready"}
            if ready >= expected and set(self._cluster.children()) >= names:
                return
        raise TimeoutError(f"the cluster is not whole again after {timeout_s:g} s:\n{self._cluster.tail(40)}")


def _role(name: str) -> str:
    return re.sub(r"-\d+$", "", name)


class Counting:
    """Adds up what the workers count, whatever becomes of them."""

    def __init__(self, cluster: RunningCluster, report: Report) -> None:
        self._cluster, self._report = cluster, report
        self._seen: dict[tuple[str, str, int], float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(1)
            await asyncio.to_thread(self.count)

    def count(self) -> None:
        for worker in self._cluster.workers():
            try:
                page = httpx.get(f"http://{worker['metrics']}/metrics", timeout=2).text
            except httpx.HTTPError:
                continue
            for name, value in re.findall(r"^baton:(kv_(?:push|pool)_\w*blocks|kv_push_failures)_total{[^}]*} (\S+)$", page, re.MULTILINE):
                key = (name, worker["id"], worker["pid"])
                self._report.totals[name] += float(value) - self._seen.get(key, 0.0)
                self._seen[key] = float(value)


async def _drive(traffic: Traffic, faults: Sequence[Faults], counting: Counting) -> None:
    working = asyncio.create_task(traffic.run())
    beside = [asyncio.create_task(each.run()) for each in (*faults, counting)]
    try:
        await asyncio.wait({working, *beside}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, *beside):
            task.cancel()
        for each in faults:
            each.mend()
        results = await asyncio.gather(working, *beside, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


def chaos(
    model: Path, *, requests: int, seconds: float, seed: int, num_cases: int = 48, masters: int = 1, logs: Path | None = None
) -> Report:
    """Raises AssertionError where a block stays taken. `masters` of the pool; `logs`: a folder that gets the processes' logs."""
    report = Report()
    cases = make_cases(model, num_cases, seed)
    with running_cluster(model=model, **{**CLUSTER, "options": [*OPTIONS, "--kvstore-masters", str(masters)]}) as cluster:
        cluster.wait_ready()
        began = time.monotonic()
        traffic = Traffic(cluster, cases, report, requests=requests, until=began + seconds, seed=seed)
        faults = [Faults(cluster, report, seed, roles) for roles in (WORKER_ROLES, POOL_ROLES)]
        counting = Counting(cluster, report)
        asyncio.run(_drive(traffic, faults, counting))
        report.seconds = time.monotonic() - began
        cluster.wait_ready()
        counting.count()
        report.unusual = _unusual(cluster.logs)
        print(report, flush=True)
        if logs is not None:
            shutil.copytree(cluster.logs, logs, dirs_exist_ok=True)
        cluster.assert_clean(3 * LEASE_S)
    return report


def _unusual(logs: Path) -> list[str]:
    """What nobody expects even when things die."""
    lines = []
    for log in sorted(logs.glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if re.search(r"\b(ERROR|CRITICAL)\b|Traceback|^\w*Error\b", line):
                lines.append(f"{log.name}: {line[:300]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[2] / "examples" / "demo-model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masters", type=int, default=1, help="of the KV pool; of two, one leads")
    parser.add_argument("--logs", type=Path, help="a folder that gets the processes' logs")
    given = parser.parse_args()
    report = chaos(
        given.model, requests=given.requests, seconds=60 * given.minutes, seed=given.seed, masters=given.masters, logs=given.logs
    )
    raise SystemExit(bool(report.wrong or report.errors or report.slow))


if __name__ == "__main__":
    main()
