"""Random requests, cancels, kills and stops for a while: no wrong token, no block that differs from what was computed or stays taken, no
wait over lease + 2 s.

    python -m tests.faults.chaos --requests 10000 --minutes 30 [--seed 0] [--masters 2]
    python -m tests.faults.chaos --requests 1000000 --minutes 30 --routers 2 --prefill 3 --decode 3 --every 20

Greedy tokens are compared with transformers' `generate`. Prompts share prefixes; their salts make some of them new to every cache and leave
others for the prefix caches and the pool, which are small, so that blocks are evicted all the time. Workers run with push.verify and
pool.verify. Workers, and beside them the processes of the pool, are killed (the supervisor starts them again) or stopped for a while,
shorter or longer than a lease: one worker and one of the pool's at a time; the next fault comes when all are there again.

With `--every`, something is killed each so many seconds: a worker, one of the pool's, or a router, where there are several. Clients go to
the routers in turn, and not to one that is gone until it is ready, as behind a load balancer. A request whose own router was killed is the
client's to send again, to another one; those are counted apart. Every other one must end by itself: with all of its tokens, in order, one
finish reason and one end; and the workers must not have generated more tokens than were delivered or given up.
"""

import argparse
import asyncio
import collections
import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
CLUSTER: dict[str, Any] = {"prefill": 2, "decode": 2, "routers": 1, "kvstore": 2, "options": OPTIONS}


@dataclass(frozen=True)
class Case:
    token_ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass
class Report:
    finished: int = 0
    cancelled: int = 0
    resent: int = 0  # their router was killed under them
    turned_away: int = 0  # of those, before it had answered
    tokens: int = 0  # delivered
    given_up: int = 0  # tokens, at most, of what was cancelled or sent again
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    totals: collections.Counter[str] = field(default_factory=collections.Counter)
    unusual: list[str] = field(default_factory=list)  # lines of the logs
    router_kills: dict[str, float] = field(default_factory=dict[str, float])  # when each URL's was last killed

    @property
    def duplicated(self) -> float:
        """Tokens that the workers have generated more than anybody asked for. Those that a request has lost by moving, its worker counts no
        more, but up to a second's worth that was read before."""
        allowed = self.tokens + self.given_up + MAX_TOKENS * self.totals["migrations"]
        return max(0.0, self.totals["generation_tokens"] - allowed)

    @property
    def good(self) -> bool:
        return not (self.wrong or self.errors or self.slow or self.duplicated)

    def __str__(self) -> str:
        asked = self.finished + self.cancelled + len(self.errors)
        rows = [
            f"{asked} requests in {self.seconds:.0f} s: {self.finished} finished, {self.cancelled} cancelled, {len(self.errors)} failed, "
            f"{len(self.wrong)} with other tokens; slowest wait {self.slowest:.1f} s",
            f"sent again, because their own router was killed: {self.resent} ({self.turned_away} before it had answered)",
            f"tokens: {self.tokens} delivered, at most {self.given_up} given up, {self.duplicated:.0f} generated twice",
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


class Balancer:
    """What stands before several routers: takes in turn those that are there."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self._turns, self._away = urls, itertools.count(), set[str]()

    async def pick(self) -> str:
        while True:
            for _ in self._urls:
                url = self._urls[next(self._turns) % len(self._urls)]
                if url not in self._away:
                    return url
            await asyncio.sleep(0.05)

    def lost(self, url: str) -> None:
        self._away.add(url)

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=2) as client:
            while True:
                await asyncio.sleep(0.2)
                for url in list(self._away):
                    with suppress(httpx.HTTPError):
                        if (await client.get(f"{url}/ready")).status_code == 200:
                            self._away.discard(url)


class Traffic:
    def __init__(self, urls: Sequence[str], cases: Sequence[Case], report: Report, *, requests: int, until: float, seed: int) -> None:
        self.balancer, self._cases, self._report, self._until = Balancer(urls), cases, report, until
        self._rng, self._left, self._number = random.Random(seed), requests, 0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=httpx.Timeout(120), limits=limits) as client:
            await asyncio.gather(*(self._client(client) for _ in range(CONCURRENCY)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        rng = self._rng
        while self._left > 0 and time.monotonic() < self._until:
            self._left -= 1
            self._number += 1
            case = rng.choice(self._cases)
            salt = str(self._number if rng.random() < 0.4 else rng.randrange(self._number // 40, self._number // 40 + 3))
            prompt = Prompt(case.token_ids, rng.randrange(1, MAX_TOKENS + 1), 0.0, 0, salt)
            task = asyncio.create_task(self._ask(client, prompt))
            if rng.random() < CANCELLED:
                await asyncio.sleep(rng.random() ** 2 / 2)
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    self._report.cancelled += 1
                    self._report.given_up += prompt.max_tokens
                    continue
            self._judge(await task, prompt, case)

    async def _ask(self, client: httpx.AsyncClient, prompt: Prompt) -> Outcome:
        """Sends it again for as long as its router is killed under it."""
        while True:
            began, url = time.monotonic(), await self.balancer.pick()
            outcome = await stream(client, prompt, url=url)
            connecting = outcome.error is not None and outcome.error.startswith("Connect")
            if not outcome.broken or not (connecting or self._report.router_kills.get(url, 0.0) > began - 1):
                return outcome
            self.balancer.lost(url)
            self._report.resent += 1
            self._report.turned_away += connecting
            self._report.given_up += 0 if connecting else prompt.max_tokens

    def _judge(self, outcome: Outcome, prompt: Prompt, case: Case) -> None:
        report, what = self._report, f"{len(prompt.token_ids)} + {prompt.max_tokens} tokens, salt {prompt.salt}"
        report.tokens += len(outcome.token_ids)
        if outcome.error is not None:
            report.errors.append(f"{time.strftime('%X')} {what}: {outcome.error}")
            return
        report.finished += 1
        report.slowest = max(report.slowest, outcome.slowest)
        if outcome.slowest > LIMIT_S:
            report.slow.append(f"{time.strftime('%X')} {what}: waited {outcome.slowest:.1f} s")
        if tuple(outcome.token_ids) != case.expected[: prompt.max_tokens]:
            report.wrong.append(f"{time.strftime('%X')} {what}: {outcome.token_ids} instead of {case.expected[: prompt.max_tokens]}")
        if outcome.ends != 2:
            report.wrong.append(f"{time.strftime('%X')} {what}: {outcome.ends} ends, where a finish reason and [DONE] are due, once each")


class Faults:
    """To processes of these groups of roles, one at a time, until cancelled; `mend` undoes what is under way. `every`: kills alone, so many
    seconds from one to the next; else stops, too, at random."""

    def __init__(
        self, cluster: RunningCluster, report: Report, seed: int, groups: Sequence[Sequence[str]], every: float | None = None
    ) -> None:
        self._cluster, self._report, self._rng, self._groups, self._every = cluster, report, random.Random(seed), groups, every
        self._roles = [role for group in groups for role in group]
        self._stopped: psutil.Process | None = None

    async def run(self) -> None:
        rng, due = self._rng, time.monotonic()
        while True:
            due += self._every or 0.0
            await asyncio.sleep(rng.uniform(0.5, 3) if self._every is None else max(0.0, due - time.monotonic()))
            children, roles = self._cluster.children(), rng.choice(self._groups)
            name = rng.choice(sorted(name for name in children if _role(name) in roles))
            victim, kind = children[name], _role(name)
            if self._every is not None or rng.random() < 0.6:
                self._report.faults[f"kill {kind}"] += 1
                if kind == "router":
                    self._report.router_kills[self._cluster.url_of(name)] = time.monotonic()
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
            with suppress(httpx.HTTPError):
                views = [self._cluster.status(url)["workers"] for url in self._cluster.urls]
                ready = [{worker["id"] for worker in view if worker["state"] == "ready"} for view in views]
                if all(each >= expected for each in ready) and set(self._cluster.children()) >= names:
                    return
        raise TimeoutError(f"the cluster is not whole again after {timeout_s:g} s:\n{self._cluster.tail(40)}")


def _role(name: str) -> str:
    return re.sub(r"-\d+$", "", name)


class Counting:
    """Adds up what the workers and the routers count, whatever becomes of them."""

    def __init__(self, cluster: RunningCluster, report: Report) -> None:
        self._cluster, self._report = cluster, report
        self._seen: dict[tuple[str, str], float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(1)
            await asyncio.to_thread(self.count)

    def count(self) -> None:
        workers: list[dict[str, Any]] = []
        with suppress(httpx.HTTPError):
            workers = self._cluster.workers()
        pages = {f"http://{worker['metrics']}": r"kv_(?:push|pool)_\w*blocks|kv_push_failures|generation_tokens" for worker in workers}
        for url, names in {**pages, **dict.fromkeys(self._cluster.urls, "migrations|router_index_\\w+")}.items():
            with suppress(httpx.HTTPError):
                self._add(url, names, httpx.get(f"{url}/metrics", timeout=2).text)

    def _add(self, url: str, names: str, page: str) -> None:
        """A process that was started again counts from zero."""
        for name, labels, value in re.findall(rf"^baton:({names})_total({{[^}}]*}}) (\S+)$", page, re.MULTILINE):
            now, before = float(value), self._seen.get((url, name + labels), 0.0)
            self._report.totals[name] += now - before if now >= before else now
            self._seen[url, name + labels] = now


async def _drive(traffic: Traffic, faults: Sequence[Faults], counting: Counting) -> None:
    working = asyncio.create_task(traffic.run())
    beside = [asyncio.create_task(each.run()) for each in (*faults, counting, traffic.balancer)]
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
    model: Path,
    *,
    requests: int,
    seconds: float,
    seed: int,
    num_cases: int = 48,
    counts: Mapping[str, int] | None = None,
    every: float | None = None,
    logs: Path | None = None,
) -> Report:
    """Raises AssertionError where a block stays taken. `counts`: processes, by role; `every`: see Faults; `logs`: a folder that gets the
    processes' logs."""
    report = Report()
    cases = make_cases(model, num_cases, seed)
    with running_cluster(model=model, **{**CLUSTER, **(counts or {})}) as cluster:
        cluster.wait_ready()
        began = time.monotonic()
        traffic = Traffic(cluster.urls, cases, report, requests=requests, until=began + seconds, seed=seed)
        groups = (WORKER_ROLES, POOL_ROLES, *([("router",)] if len(cluster.urls) > 1 else []))
        kinds = [(group,) for group in groups] if every is None else [groups]
        faults = [Faults(cluster, report, seed, kind, every) for kind in kinds]
        counting = Counting(cluster, report)
        asyncio.run(_drive(traffic, faults, counting))
        report.seconds = time.monotonic() - began
        cluster.wait_ready()
        counting.count()
        report.unusual = _unusual(cluster.logs)
        print(report, flush=True)
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            for log in cluster.logs.glob("*.log"):  # sockets lie beside them
                shutil.copy(log, logs)
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
    for role in ("prefill", "decode", "routers"):
        parser.add_argument(f"--{role}", type=int, default=CLUSTER[role])
    parser.add_argument("--every", type=float, help="seconds between kills; left out: kills and stops at random")
    parser.add_argument("--logs", type=Path, help="a folder that gets the processes' logs")
    given = parser.parse_args()
    counts = {"kvstore_masters": given.masters, "prefill": given.prefill, "decode": given.decode, "routers": given.routers}
    report = chaos(
        given.model,
        requests=given.requests,
        seconds=60 * given.minutes,
        seed=given.seed,
        counts=counts,
        every=given.every,
        logs=given.logs,
    )
    raise SystemExit(not report.good)


if __name__ == "__main__":
    main()
