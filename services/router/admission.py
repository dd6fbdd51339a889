"""Admission: whether a request is taken at all, and when it goes to the workers.

    arrives ─▶ its tenant's rates ─▶ can it be in time? ─▶ room at the workers? ─▶ goes ─▶ first token ─▶ ends
                     │ 429                │ 429                 │ no
                     ▼                    ▼                     ▼
                                                            FairQueue ─▶ its turn: can it still be in time?
                                                 no room for it, waited too long: 429; nobody to serve it for a lease: 503

There is room while this router has fewer than `max_running` sequences at the workers and the next one would wait there for at most
`backlog_s` until its own prompt is computed (whoever would be the only one always goes). So queues at the workers, which know no
priorities, stay short, and who is next is decided here. Nothing configured: there is always room. While no worker can serve, the queue
stands still.

How long the queue takes is learned: tokens per second that left it, lately. What workers take is told by the policy (`Forecast`).
"""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from baton.config import AdmissionConfig
from baton.errors import BatonError, NoWorkers, Overloaded
from baton.metrics import RouterMetrics
from services.router.fairqueue import FairQueue, Waiting
from services.router.tenants import EVERYBODY, Tenant

_TICK_S = 0.05  # how often a queue looks at what nobody tells it: other routers' load, workers that are gone
_KEPT = 0.95  # of what was learned, with each request that leaves the queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of a request that went to the workers now. None: not known."""

    ttft_s: float | None = None
    waits_s: float = 0.0  # of that: until its own prompt would be computed
    itl_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a request asks for."""

    tenant: Tenant = EVERYBODY
    priority: int | None = None  # lower is served earlier; None: the tenant's
    ttft_slo_s: float | None = None  # None: what is configured
    itl_slo_s: float | None = None
    deadline_s: float | None = None  # of a caller who is gone then: a first token after that is worth nothing


@dataclass(frozen=True, slots=True)
class Promised:
    """What a request that is let in was promised; None: nothing."""

    first_by: float | None = None  # time.monotonic
    itl_s: float | None = None

    def left_s(self) -> float | None:
        """Until the first token is late; above 0, be it late already."""
        return None if self.first_by is None else max(self.first_by - time.monotonic(), 1e-3)


NOTHING_PROMISED = Promised()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    num_prompt_tokens: int
    num_output_tokens: float  # expected
    num_sequences: int = 1
    forecast: Callable[[], Forecast] = Forecast

    @property
    def cost(self) -> float:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(slots=True)
class Ticket:
    """A request's way through; `told` counts its tokens."""

    on_first: Callable[[], None]
    arrived: float  # time.monotonic
    queued_s: float = 0.0
    num_tokens: int = 0

    def told(self, num_tokens: int) -> None:
        if not self.num_tokens:
            self.on_first()
        self.num_tokens += num_tokens


@dataclass(slots=True, eq=False, kw_only=True)
class _Queued(Waiting):
    work: Work
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """`problem()`: why no request can be served now."""

    def __init__(
        self,
        config: AdmissionConfig,
        metrics: RouterMetrics,
        *,
        lease_s: float,
        problem: Callable[[], NoWorkers | None] = lambda: None,
    ) -> None:
        self._config, self._metrics, self._lease_s = config, metrics, lease_s
        self._problem = problem
        self._queue: FairQueue[_Queued] = FairQueue()
        self._running = 0  # sequences
        self._ticking = False
        self._broken_since: float | None = None
        self._left_at: float | None = None  # when the last one left a queue that has not been empty since
        self._left_tokens = self._left_s = 0.0
        metrics.queued = self._queue.__len__

    @contextlib.asynccontextmanager
    async def enter(self, claim: Claim, work: Work) -> AsyncGenerator[Ticket]:
        """Inside, the request is at the workers. Raises Overloaded, RateLimited or NoWorkers where it never gets there; whoever is
        cancelled meanwhile is out of the queue at once."""
        arrived, tenant, ttft_slo_s = time.monotonic(), claim.tenant, self._ttft_slo_s(claim)
        limit_s = min(math.inf if ttft_slo_s is None else ttft_slo_s, self._config.max_wait_s)
        queued = _Queued(
            tenant=tenant.name,
            cost=work.cost,
            weight=tenant.weight,
            priority=tenant.allowed(claim.priority),
            deadline=arrived + limit_s,
            work=work,
        )
        self.check_rates(tenant)
        forecast = functools.cache(work.forecast)
        free = not self._queue and self._room(forecast)
        self._check_slo(claim, work, forecast, 0.0, 0.0 if free else self._takes_s(self._queue.ahead(queued) + queued.cost))
        tenant.take(requests=1, tokens=work.num_prompt_tokens)
        ticket, served = Ticket(self._pump, arrived), False
        try:
            if free:
                self._queue.push(queued)
                self._go(queued)
            else:
                await self._wait(queued, limit_s)
                ticket.queued_s = time.monotonic() - arrived
                self._metrics.queue_seconds.observe(ticket.queued_s)
                self._check_slo(claim, work, work.forecast, ticket.queued_s, 0.0)
            served = True
            yield ticket
        finally:
            tenant.take(tokens=ticket.num_tokens if served else -work.num_prompt_tokens)
            if queued.turn.done() and not queued.turn.cancelled() and queued.turn.exception() is None:
                self._running -= work.num_sequences
                self._queue.correct(queued, work.num_prompt_tokens + ticket.num_tokens if served else 0.0)
                self._pump()

    def promised(self, claim: Claim) -> Promised:
        """From now on."""
        ttft_slo_s = self._ttft_slo_s(claim)
        return Promised(None if ttft_slo_s is None else time.monotonic() + ttft_slo_s, self._itl_slo_s(claim))

    def check_rates(self, tenant: Tenant) -> None:
        """Raises RateLimited; also worth asking before a request is even read."""
        try:
            tenant.check_rates()
        except BatonError as error:
            self._metrics.refused(error, "rate", tenant.name)
            raise

    async def _wait(self, queued: _Queued, limit_s: float) -> None:
        """For its turn."""
        if len(self._queue) >= self._config.max_waiting:
            for other in [each for each in self._queue if each.turn.done()]:  # cancelled, and will be out in a moment
                self._queue.remove(other)
        if len(self._queue) >= self._config.max_waiting:
            last = self._queue.last(queued)
            full = self._refusal("full", last.tenant, f"{self._config.max_waiting} requests wait already", self._takes_s(self._cost()))
            if last is queued:
                raise full
            self._queue.remove(last)
            last.turn.set_exception(full)
        self._queue.push(queued)
        self._tick_soon()
        try:
            async with asyncio.timeout(limit_s):
                await queued.turn
        except TimeoutError:
            late = limit_s < self._config.max_wait_s
            why = "all the time it had" if late else "the most that is allowed (admission.max_wait_s)"
            told = f"it waited {limit_s:g} s for its turn, {why}"
            raise self._refusal("ttft" if late else "wait", queued.tenant, told, self._takes_s(self._cost())) from None
        finally:
            self._queue.remove(queued)

    def _go(self, queued: _Queued) -> None:
        self._queue.take(queued)
        self._running += queued.work.num_sequences
        queued.turn.set_result(None)

    def _pump(self) -> None:
        """Lets the next one go, if there is room; and looks again when it has been placed, and counts where it went."""
        queued = self._queue.first()
        if queued is None or not self._room(queued.work.forecast):
            return
        if queued.turn.done():  # and will be out in a moment
            self._queue.remove(queued)
        else:
            self._learn(queued.cost)
            self._go(queued)
        asyncio.get_running_loop().call_soon(self._pump)

    def _room(self, forecast: Callable[[], Forecast]) -> bool:
        config = self._config
        if self._broken_since is not None:
            return False
        if config.max_running is not None and self._running >= config.max_running:
            return False
        return config.backlog_s is None or not self._running or forecast().waits_s <= config.backlog_s

    def _tick_soon(self) -> None:
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        """While anybody waits."""
        self._ticking = False
        if not self._queue:
            self._left_at = self._broken_since = None
            return
        self._tick_soon()
        problem = self._problem()
        if problem is None:
            self._broken_since = None
            self._pump()
        else:
            now = time.monotonic()
            self._broken_since = now if self._broken_since is None else self._broken_since
            if now - self._broken_since >= self._lease_s:
                self._give_up(problem)

    def _give_up(self, problem: NoWorkers) -> None:
        for queued in list(self._queue):
            self._queue.remove(queued)
            if not queued.turn.done():
                error = NoWorkers(problem.message)
                self._metrics.refused(error, "workers", queued.tenant)
                queued.turn.set_exception(error)

    # -- times

    def _ttft_slo_s(self, claim: Claim) -> float | None:
        asked = self._config.ttft_slo_s if claim.ttft_slo_s is None else claim.ttft_slo_s
        return min((limit for limit in (asked, claim.deadline_s) if limit is not None), default=None)

    def _itl_slo_s(self, claim: Claim) -> float | None:
        return self._config.itl_slo_s if claim.itl_slo_s is None else claim.itl_slo_s

    def _check_slo(self, claim: Claim, work: Work, forecast: Callable[[], Forecast], waited_s: float, queue_s: float) -> None:
        """Raises Overloaded where the request is not expected to be served as it asks."""
        ttft_slo_s, itl_slo_s = self._ttft_slo_s(claim), self._itl_slo_s(claim)
        if ttft_slo_s is None and itl_slo_s is None:
            return
        expected = forecast()
        ttft_s = waited_s + queue_s + (expected.ttft_s or 0.0)
        if ttft_slo_s is not None and ttft_s > ttft_slo_s:
            told = f"its first token is expected after {ttft_s * 1000:.0f} ms ({(waited_s + queue_s) * 1000:.0f} ms queued)"
            told += f"; asked for: {ttft_slo_s * 1000:g} ms"
            raise self._refusal("ttft", claim.tenant.name, told, ttft_s - ttft_slo_s)
        if itl_slo_s is not None and expected.itl_s is not None and expected.itl_s > itl_slo_s:
            told = f"a token is expected every {expected.itl_s * 1000:.1f} ms; asked for: {itl_slo_s * 1000:g} ms"
            raise self._refusal("itl", claim.tenant.name, told, work.num_output_tokens * expected.itl_s)

    def _refusal(self, reason: str, tenant: str, told: str, retry_after_s: float) -> Overloaded:
        error = Overloaded(f"{told}; try again in {max(math.ceil(retry_after_s), 1)} s, or elsewhere", retry_after_s=retry_after_s)
        self._metrics.refused(error, reason, tenant)
        return error

    def _cost(self) -> float:
        return sum(queued.cost for queued in self._queue)

    def _learn(self, tokens: float) -> None:
        now = time.monotonic()
        if self._left_at is not None:
            self._left_tokens = _KEPT * self._left_tokens + tokens
            self._left_s = _KEPT * self._left_s + now - self._left_at
        self._left_at = now

    def _takes_s(self, tokens: float) -> float:
        """How long the queue takes for so many; 0 while nobody knows."""
        return tokens * self._left_s / self._left_tokens if self._left_tokens else 0.0
