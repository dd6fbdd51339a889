"""SimulatedEngine: a worker's engine in virtual time. The scheduler, its blocks and its prefix cache are the real ones
(`baton.scheduling`); only what a step takes is a sum, by a `Pace`, and tokens have no ids.

    submit, hold, feed ──▶ inbox ─▶ scheduler ─▶ step (its seconds) ─▶ tokens, KV pushed
                            ▲                        │
                            └────────────────────────┘ then what the routers are told, at most each MIN_INTERVAL_S

While nobody has a prompt to compute, steps differ in nothing but the lengths of contexts: a *run* of them is one event, which ends with the
first request that ends, and is cut short by who arrives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from baton.scheduling.backlog import Backlog
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepPlan, StepResult
from baton.scheduling.request import Request
from baton.scheduling.scheduler import Scheduler
from baton.types import Load, MemberState, OutputToken, Pace, StateUpdate
from services.router.simulation.clock import Clock

MIN_INTERVAL_S = 0.02  # between two state updates; as of baton.runtime.state
PATIENCE_S = 2.0  # how long room for a push is waited for
MAX_RUN_S = 1.0  # so that the routers hear of growing contexts
MAX_RESERVED_FRACTION = 0.5
_TOKEN = OutputToken(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A worker's engine settings, as of `EngineConfig`."""

    num_blocks: int = 2048
    block_size: int = 512
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256


@dataclass(slots=True, eq=False)
class _Run:
    """`count` decode steps of the same requests. Step i takes step_s + i · grow_s."""

    begun: float
    count: int
    step_s: float
    grow_s: float

    def seconds(self, count: float) -> float:
        return count * self.step_s + self.grow_s * count * (count - 1) / 2

    def steps_until(self, seconds: float) -> int:
        """The first whole number of steps that takes so long or longer; at least one."""
        slope, linear = self.grow_s / 2, self.step_s - self.grow_s / 2
        steps = (math.sqrt(linear * linear + 4 * slope * seconds) - linear) / (2 * slope) if slope else seconds / linear
        return max(math.ceil(steps - 1e-9), 1)


@dataclass(slots=True, eq=False)
class _Held:
    """A request whose prompt another worker computes."""

    request: Request
    first: int = 0  # blocks from here on are pushed
    block_ids: tuple[int, ...] = ()


class SimulatedEngine:
    def __init__(self, clock: Clock, shape: Shape, pace: Pace, tell: Callable[[StateUpdate], None]) -> None:
        """`tell` gets state updates as they leave."""
        self._clock, self.shape, self.pace, self._tell = clock, shape, pace, tell
        self.scheduler = Scheduler(
            KVCache(shape.num_blocks, shape.block_size),
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_num_seqs=shape.max_num_seqs,
        )
        self.on_token: Callable[[Request], None] = lambda request: None  # it has one more, or its last ones
        self.on_step: Callable[[StepPlan], None] = lambda plan: None  # what is scheduled, when it starts
        self.on_computed: Callable[[StepPlan], None] = lambda plan: None  # when it has ended
        self._backlog = Backlog(self.scheduler.cache)
        self._inbox: list[Callable[[], None]] = []
        self._arriving: dict[Request, bool] = {}  # in the inbox; whether they will be held
        self._held: dict[Request, _Held] = {}
        self._reserving: list[tuple[_Held, float, Callable[[bool], None]]] = []
        self._num_reserved = 0
        self._arrived: list[str] = []
        self._busy = False
        self._run: _Run | None = None
        self._stuck = False  # those that wait cannot be admitted before somebody ends
        self._plan: StepPlan | None = None
        self._num_steps = 0  # that have ended
        self._version = 0  # of the event that ends the step or run in progress
        self._sequence, self._sent_at, self._flushing = 0, -1.0, False
        self._sent: Load = Load()

    # -- requests

    def submit(self, request: Request) -> None:
        """Has its prompt computed here."""
        self._arrive(request, held=False)
        self.post(lambda: self._take(request))

    def hold(self, request: Request, decided: Callable[[int], None]) -> None:
        """Has its prompt computed elsewhere, maybe: `decided` gets the number of blocks it has here, between two steps."""
        self._arrive(request, held=True)

        def look() -> None:
            self._arriving.pop(request)
            self._held[request] = _Held(request)
            decided(self._pin(request))

        self.post(look)

    def compute(self, request: Request) -> None:
        """Nobody else will compute it."""
        self._held.pop(request)
        self.scheduler.add(request)

    def reserve(self, request: Request, answer: Callable[[bool], None]) -> None:
        """Blocks for what it lacks; False where there is no room in time."""
        self._reserving.append((self._held[request], self._clock.now + PATIENCE_S, answer))
        self._clock.after(PATIENCE_S, lambda: self.post(lambda: None))
        self._serve()

    def feed(self, request: Request) -> None:
        """All of its KV has come, and its first token, which its client has."""

        def take() -> None:
            held, cache = self._held.pop(request), self.scheduler.cache
            self._num_reserved -= len(held.block_ids)
            known = request.num_prompt_tokens
            full = known // self.shape.block_size
            whole, tail = held.block_ids[: full - held.first], held.block_ids[full - held.first :]
            cache.pool.register(whole, request.block_hashes[held.first : full])
            cache.pin(request.request_id, whole)
            if tail:
                cache.give_tail(request.request_id, tail[0], known)
            if request.finish_reason is None:
                self.scheduler.add(request)
            else:
                cache.free(request)

        self.post(take)

    def post(self, action: Callable[[], None]) -> None:
        """Between two steps."""
        self._inbox.append(action)
        if not self._busy:
            self._turn()
        elif self._run is not None:
            self._cut(self._run)

    def _arrive(self, request: Request, *, held: bool) -> None:
        self._arriving[request] = held
        self._arrived.append(request.request_id)
        if self._busy and self._run is None:  # else the step about to begin tells
            self._publish()

    def _take(self, request: Request) -> None:
        self._arriving.pop(request)
        self._pin(request)
        self.scheduler.add(request)

    def _pin(self, request: Request) -> int:
        """What it has cached stays until it is scheduled, as `runtime.loading` has it; in blocks."""
        cache = self.scheduler.cache
        matched = cache.match(request)
        cache.pool.reuse(matched)
        cache.pin(request.request_id, matched)
        return len(matched)

    def _serve(self) -> None:
        """Those who wait for room, in their order."""
        cache = self.scheduler.cache
        while self._reserving:
            held, deadline, answer = self._reserving[0]
            first, reserved = len(cache.match(held.request)), self._num_reserved
            count = cache.blocks_for(held.request.num_tokens) - first
            room = count <= cache.pool.num_free and (not reserved or reserved + count <= MAX_RESERVED_FRACTION * self.shape.num_blocks)
            if not room and self._clock.now < deadline:
                return
            self._reserving.pop(0)
            if room:
                held.first, held.block_ids = first, tuple(cache.pool.take(count))
                self._num_reserved += count
            answer(room)

    # -- steps

    def _turn(self) -> None:
        """What came meanwhile, then the next step."""
        self._busy = True
        while self._inbox:
            inbox, self._inbox, self._stuck = self._inbox, [], False
            for action in inbox:
                action()
        self._serve()
        self._publish()  # what came: the step may be long
        seconds = self._next()
        self._busy = seconds is not None
        if seconds is not None:
            self._end_after(seconds)
        else:
            self._publish()

    def _end_after(self, seconds: float) -> None:
        self._version += 1
        version = self._version
        self._clock.after(seconds, lambda: self._ended(version))

    def _next(self) -> float | None:
        """Decides the next step, or run of steps; what it takes. None where there is nothing to do."""
        self._run = self._decode_run()
        if self._run is not None:
            return self._run.seconds(self._run.count)
        num_waiting = len(self.scheduler.waiting)
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return None
        self._stuck = len(self.scheduler.waiting) == num_waiting and all(item.num_new_tokens == 1 for item in plan.scheduled)
        self._plan = plan
        self.on_step(plan)
        self.scheduler.advance(plan)
        return step_seconds(self.pace, plan)

    def _ended(self, version: int) -> None:
        if version != self._version:
            return
        run, plan = self._run, self._plan
        self._run = self._plan = None
        if run is not None:
            self._num_steps += run.count
            self._finish_run(run.count)
        elif plan is not None:
            self._num_steps += 1
            drawn = [item.request for item in plan.scheduled if item.samples]
            self.scheduler.update(plan, StepResult(tokens={request.request_id: _TOKEN for request in drawn}))
            for request in drawn:
                if request.finish_reason is not None or request.num_output_tokens == 1:
                    self._stuck = False
                    self.on_token(request)
            self.on_computed(plan)
        self._publish()
        self._turn()

    def _decode_run(self) -> _Run | None:
        """The steps until the first request ends, where all that run lack one token, and nobody waits."""
        running, size = self.scheduler.running, self.shape.block_size
        if not running or (self.scheduler.waiting and not self._stuck):
            return None
        count, context, blocks = 1 << 30, 0, 0
        for request in running:
            computed = request.num_computed_tokens
            if request.num_tokens - computed != 1:
                return None
            context += computed
            count = min(count, request.sampling.max_tokens - request.num_output_tokens)
        step_s = self.pace.base_s + self.pace.decode_s(len(running), context)
        count = max(min(count, int(MAX_RUN_S / step_s)), 1)
        for request in running:
            blocks += -(-(request.num_computed_tokens + count) // size) - len(request.block_ids)
        if blocks > self.scheduler.cache.pool.num_free:
            return None
        return _Run(self._clock.now, count, step_s, self.pace.context_s * len(running))

    def _cut(self, run: _Run) -> None:
        """The step in progress is the last of the run."""
        count = min(run.steps_until(self._clock.now - run.begun), run.count)
        if count < run.count:
            run.count = count
            self._end_after(max(run.begun + run.seconds(count) - self._clock.now, 0.0))

    def _finish_run(self, count: int) -> None:
        cache, ended = self.scheduler.cache, list[Request]()
        tokens = [0] * count
        for request in self.scheduler.running:
            start = request.num_computed_tokens
            cache.extend(request, start + count)
            request.num_computed_tokens = start + count
            cache.register(request, start, start + count)
            request.token_ids += tokens
            if request.num_output_tokens >= request.sampling.max_tokens:
                ended.append(request)
        for request in ended:
            self._stuck = False
            request.resolve(request.num_tokens - 1, 0)
            self.scheduler.remove(request)
            self.on_token(request)

    # -- what the routers are told

    def _publish(self) -> None:
        wait = self._sent_at + MIN_INTERVAL_S - self._clock.now
        if wait > 1e-9 and self._sent_at >= 0:
            if not self._flushing:
                self._flushing = True
                self._clock.after(wait, self._flush)
            return
        load, events = self.load(), self.scheduler.cache.pool.drain_events()
        if load == self._sent and not events and not self._arrived and self._sequence:
            return
        arrived, self._arrived = tuple(self._arrived), []
        self._sequence, self._sent, self._sent_at = self._sequence + 1, load, self._clock.now
        self._tell(StateUpdate(sequence=self._sequence, state=MemberState.READY, load=load, events=tuple(events), arrived=arrived))

    def _flush(self) -> None:
        self._flushing = False
        if self._run is None:
            self._publish()

    def load(self) -> Load:
        """As baton.runtime.census counts."""
        running, pool = self.scheduler.running, self.scheduler.cache.pool
        own = [*running, *self.scheduler.waiting, *(request for request, held in self._arriving.items() if not held)]
        held = len(self._held) + len(self._arriving) - (len(own) - len(running) - len(self.scheduler.waiting))
        tokens, pairs = self._backlog.measure(own)
        for item in self._plan.scheduled if self._plan is not None else ():  # in a step that has not ended
            if item.num_new_tokens > 1:
                tokens += item.num_new_tokens
                pairs += (item.end**2 - item.start**2) // 2
        return Load(
            num_running=len(running),
            num_waiting=len(own) - len(running) + held,
            num_held=held,
            num_waiting_tokens=tokens,
            num_waiting_pairs=pairs,
            num_context_tokens=sum(request.num_computed_tokens for request in running),
            num_steps=self._num_steps,
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            pace=self.pace,
        )


def step_seconds(pace: Pace, plan: StepPlan) -> float:
    """What a step takes, by the same sum that a worker's pace is learned by."""
    tokens, pairs, rows, context = plan.work()
    return pace.base_s + pace.token_s * tokens + pace.pair_s * pairs + pace.decode_s(rows, context)
