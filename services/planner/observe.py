"""Observations: what routers count and what they know of the workers, over HTTP, as a `Load` and `Rates`.

Each round asks one router for the cluster, and every router for its counters: clients are spread over them. Counters become increments at
once, so that a router may come, go or start again; `History` keeps those of ten minutes.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from baton.errors import ConfigError, Unavailable
from baton.metrics import TOKEN_BUCKETS
from baton.types import Pace, Role
from services.planner.plan import Load, Rates

logger = logging.getLogger(__name__)
KEPT_S = 600.0  # of which lengths and hits are known: the long tail of prompts needs many
RATE_S = 60.0  # of which the rate is
_CHANCE = 2.0  # standard deviations of Poisson arrivals that a growth must exceed, to be one
_ARRIVED, _QUEUED = "baton:arrived_prompt_tokens", "baton:num_requests_queued"
_TOTALS = {
    "baton:prompt_tokens_total": 0,
    "baton:cached_tokens_total": 1,
    "baton:generation_tokens_total": 2,
    "baton:inter_token_latency_seconds_sum": 3,
    "baton:inter_token_latency_seconds_count": 4,
}
_FINISHED, _SUM, _FIRST = 5, 6, 7  # places in a vector; then a count for each bucket
_PLACES = {le: _FIRST + place for place, le in enumerate((*map(float, TOKEN_BUCKETS), math.inf))}
_OF_A_WORKER = {
    "id", "role", "address", "state", "running", "waiting", "waiting_tokens", "waiting_pairs", "blocks_total", "blocks_cached",
    "block_size", "max_num_batched_tokens", "pace", "fingerprint",
}  # fmt: skip
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One round: counters of each router by its address, and `/cluster`."""

    at: float  # seconds of a clock that does not jump
    counters: Mapping[str, Vector]
    num_queued: float
    cluster: Mapping[str, Any]


def counters_of(text: str, where: str) -> tuple[Vector, float]:
    """Of Prometheus's text: what grows, and the requests queued. Raises ConfigError where it is no router's."""
    found, queued, known = np.zeros(_FIRST + len(_PLACES)), 0.0, False
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name.startswith("baton:") else ():
                if sample.name in _TOTALS:
                    found[_TOTALS[sample.name]] += sample.value
                elif sample.name == "baton:request_success_total":
                    found[_FINISHED] += sample.value
                elif sample.name == _QUEUED:
                    queued += sample.value
                elif sample.name == f"{_ARRIVED}_sum":
                    found[_SUM] += sample.value
                    known = True
                elif sample.name == f"{_ARRIVED}_bucket":
                    found[_PLACES[float(sample.labels["le"])]] += sample.value
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}/metrics cannot be understood ({error}): routers and planner must be of one version") from error
    if not known:
        raise ConfigError(f"{where}/metrics has no {_ARRIVED}: is it a router of this version?")
    found[_FIRST:] = np.diff(found[_FIRST:], prepend=0.0)  # Prometheus's buckets hold those below them
    return found, queued


class Observer:
    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        self._url, self._http = url.rstrip("/"), httpx.AsyncClient(timeout=timeout_s)

    async def close(self) -> None:
        await self._http.aclose()

    async def look(self, at: float) -> Seen:
        """Raises Unavailable where nobody answers, ConfigError where somebody else does."""
        try:
            cluster = (await self._get(f"{self._url}/cluster")).json()
            routers = [other["metrics"] for other in cluster["others"] if other["role"] == Role.ROUTER and other["metrics"]]
            missing = _OF_A_WORKER - set(cluster["workers"][0] if cluster["workers"] else _OF_A_WORKER)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{self._url} is no router of Baton: /cluster answers something else") from error
        if missing:
            raise ConfigError(f"{self._url}/cluster says nothing of {min(missing)}: routers and planner must be of one version")
        counters: dict[str, Vector] = {}
        queued = 0.0
        for address in [f"http://{each}" for each in routers] or [self._url]:
            try:
                counters[address], waiting = counters_of((await self._get(f"{address}/metrics")).text, address)
                queued += waiting
            except Unavailable as error:  # one of several may just have gone
                logger.warning("%s", error.message)
        if not counters:
            raise Unavailable(f"no router lets its metrics be read ({', '.join(routers) or self._url}): may the planner reach their ports?")
        return Seen(at=at, counters=counters, num_queued=queued, cluster=cluster)

    async def _get(self, url: str) -> httpx.Response:
        try:
            return (await self._http.get(url)).raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ConfigError(f"{url} answers {error.response.status_code}: give the URL of a router's HTTP port") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{url} does not answer ({error or type(error).__name__}): is the router there, and reachable?") from error


class History:
    def __init__(self, horizon_s: float) -> None:
        """`horizon_s`: how far ahead a growing load is looked at: what a worker takes to start."""
        self._horizon_s = horizon_s
        self._last: Seen | None = None
        self._known: dict[str, Vector] = {}
        self._steps: deque[tuple[float, float, Vector]] = deque()  # when, over how many seconds, increments

    def add(self, seen: Seen) -> None:
        """What came while nobody looked for longer than a rate is of is not counted: fewer may have come than wanted to."""
        if self._last is not None and seen.at - self._last.at <= RATE_S:
            grown = np.zeros(_FIRST + len(_PLACES))
            for address, now in seen.counters.items():
                before = self._known.get(address, now)
                grown += now - before if (now >= before).all() else now  # it has started again
            self._steps.append((seen.at, seen.at - self._last.at, grown))
        self._last = seen
        self._known |= seen.counters
        while self._steps and self._steps[0][0] <= seen.at - KEPT_S:
            self._steps.popleft()

    @property
    def last(self) -> Seen:
        """There must be one."""
        assert self._last is not None
        return self._last

    def load(self) -> Load:
        """What is asked for, as soon as a new worker would be there."""
        now, cluster = self.last.at, self.last.cluster
        total, lately = self._grown(now - KEPT_S), self._grown(now - RATE_S)
        workers = [worker for worker in cluster["workers"] if worker["state"] != "lost"]
        decodes = [worker for worker in workers if worker["role"] == Role.DECODE]
        prompt, cached, generated, _, _, finished = total[:_SUM].tolist()
        gap_s, gaps = lately[3:5].tolist()
        return Load(
            rate=self._rate(now),
            prompts=_lengths(total[_FIRST:], float(total[_SUM])),
            cached=min(cached / prompt, 1.0) if prompt else 0.0,
            output_tokens=generated / finished if finished else 0.0,
            waiting_tokens=sum(worker["waiting_tokens"] for worker in workers if worker["role"] == Role.PREFILL),
            waiting_pairs=sum(worker["waiting_pairs"] for worker in workers if worker["role"] == Role.PREFILL),
            num_prefilling=sum(worker["role"] == Role.PREFILL for worker in workers),
            num_queued=self.last.num_queued,
            num_running=sum(worker["running"] for worker in decodes),
            num_decoding=sum(worker["running"] > 0 for worker in decodes),
            itl_s=gap_s / gaps if gaps else 0.0,
        )

    def _grown(self, since: float) -> Vector:
        return sum((grown for at, _, grown in self._steps if at > since), start=np.zeros(_FIRST + len(_PLACES)))

    def _rate(self, now: float) -> float:
        came, seconds = self._arrivals(now - RATE_S, now)
        came_before, seconds_before = self._arrivals(now - 2 * RATE_S, now - RATE_S)
        if not seconds:
            return 0.0
        rate = came / seconds
        if seconds < 0.9 * RATE_S or seconds_before < 0.9 * RATE_S:
            return rate
        growth = rate - came_before / seconds_before
        chance = _CHANCE * math.sqrt(came / seconds**2 + came_before / seconds_before**2)
        return rate + growth / RATE_S * (self._horizon_s + RATE_S / 2) if growth > chance else rate

    def _arrivals(self, since: float, until: float) -> tuple[float, float]:
        steps = [(seconds, grown[_FIRST:].sum()) for at, seconds, grown in self._steps if since < at <= until]
        return float(sum(came for _, came in steps)), sum(seconds for seconds, _ in steps)


def _lengths(counts: Vector, tokens: float) -> tuple[tuple[float, float], ...]:
    """Share and tokens of each bucket that somebody is in; tokens are the middle of it, scaled so that all together are `tokens`."""
    edges = [0.0, *map(float, TOKEN_BUCKETS), 2.0 * TOKEN_BUCKETS[-1]]
    middles = np.array([(low + high) / 2 for low, high in pairwise(edges)])
    guessed, total = float(counts @ middles), float(counts.sum())
    if not guessed:
        return ()
    used = np.flatnonzero(counts)
    return tuple((float(counts[each] / total), float(middles[each] * tokens / guessed)) for each in used)


def rates_of(cluster: Mapping[str, Any]) -> Rates:
    """Means over the workers that have learned; a pool that has not, or is empty, is taken for the other."""
    workers = [worker for worker in cluster["workers"] if worker["state"] == "ready"]
    prefills = [worker for worker in workers if worker["role"] == Role.PREFILL]
    decodes = [worker for worker in workers if worker["role"] == Role.DECODE]

    def mean(values: list[float]) -> float:
        known = [value for value in values if value]
        return sum(known) / len(known) if known else 0.0

    def pace(those: list[Any]) -> Pace:
        known = [Pace(**worker["pace"]).by_the_clock() for worker in those]
        return Pace(**{field.name: mean([getattr(each, field.name) for each in known]) for field in fields(Pace)})

    prefill, decode = pace(prefills), pace(decodes)
    return Rates(
        prefill=prefill if prefill.token_s else decode,
        decode=decode if decode.row_s or decode.context_s else prefill,
        batched_tokens=int(mean([worker["max_num_batched_tokens"] for worker in prefills])),
        kv_tokens=int(mean([worker["blocks_total"] * worker["block_size"] for worker in decodes])),
    )


def check_pools(cluster: Mapping[str, Any]) -> None:
    """Raises ConfigError where there is what is not planned for."""
    unified = [worker["id"] for worker in cluster["workers"] if worker["role"] == Role.UNIFIED]
    if unified:
        raise ConfigError(f"{unified[0]} is a unified worker: the planner is for pools of prefill and decode workers")
    prints = {worker["fingerprint"] for worker in cluster["workers"] if worker["state"] == "ready"}
    if len(prints) > 1:
        raise Unavailable("workers of two versions are there, which do not pair: their pools are planned when one is left")
