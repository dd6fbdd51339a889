"""SimulatedCluster: workers in virtual time, and routers that have their own code: the fleet's view, the policy, what it keeps of requests
under way. What the network and the processes between add is one number.

A request goes the way of `services.router.dispatch` and `services.decode`: to D, which computes a short remainder itself, or reserves room
and asks P; P pushes chunk by chunk as they end, over one link of its own; its first token goes to the client at once, and D decodes when
all has arrived. Not here: the KV pool and other tiers, failures, blocks that stay taken at P until their push has settled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.cli.bench import Sample
from baton.errors import InternalError, Overloaded
from baton.hashing import num_matchable_blocks
from baton.scheduling.plan import StepPlan
from baton.scheduling.request import Request
from baton.types import CacheReport, Member, MemberState, Pace, Role, SamplingParams, StateUpdate
from services.router.fleet import Fleet, Worker
from services.router.placer import FIRST_GUESS, LEARNED
from services.router.policy import Facts, Placement, Policy
from services.router.simulation.clock import Clock
from services.router.simulation.engine import Shape, SimulatedEngine
from services.router.simulation.workload import Ask

_FINGERPRINT = "simulated"


def everybodys(pace: Pace) -> dict[Role, Pace]:
    return dict.fromkeys(Role, pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The cluster. Seconds of `hop_s` pass with every message between two processes."""

    prefill: int = 0
    decode: int = 0
    unified: int = 0
    shape: Shape = field(default_factory=Shape)
    paces: Mapping[Role, Pace]
    hop_s: float = 0.0005
    routers: int = 1  # requests go to each in turn; none knows what the others have just sent
    news_s: float = 0.0  # beside hop_s, that a worker's news take to a router
    local_prefill: bool = True
    max_local_prefill_tokens: int = 64
    ttft_slo_s: float | None = None
    itl_slo_s: float | None = None


@dataclass(slots=True, eq=False)
class _Journey:
    """One request on its way."""

    ask: Ask
    sample: Sample
    request: Request
    placement: Placement
    fleet: Fleet  # of its router
    pushed_from: int = 0  # tokens that D had
    waited_for: tuple[str, ...] = ()
    computes: str = ""
    prompt: Request | None = field(default=None)  # at P


class SimulatedCluster:
    def __init__(self, plan: Plan, policy: Policy, *, first_turn: int = 0) -> None:
        self.plan, self._policy, self._turn = plan, policy, first_turn
        self.clock = Clock()
        self.fleets = [Fleet(lambda: self.clock.now) for _ in range(plan.routers)]
        self.engines: dict[str, SimulatedEngine] = {}
        self._link_free: dict[str, float] = {}
        self._journeys: dict[str, _Journey] = {}
        self._num_output_tokens = FIRST_GUESS
        for role, count in ((Role.PREFILL, plan.prefill), (Role.DECODE, plan.decode), (Role.UNIFIED, plan.unified)):
            for number in range(count):
                self._add(role, f"{role}-{number:04}")

    def run(self, asks: Sequence[Ask]) -> list[Sample]:
        """Until the last one is answered. One sample each; a refused one's has an error. Raises InternalError where one never is: it would
        count as answered at once."""
        samples = [Sample(prompt_tokens=ask.num_prompt_tokens) for ask in asks]
        for number, (ask, sample) in enumerate(zip(asks, samples, strict=True)):
            self.clock.at(ask.at, lambda n=number, a=ask, s=sample: self._arrived(n, a, s))
        self.clock.run()
        if self._journeys:
            some = ", ".join(f"{name} ({journey.request.num_prompt_tokens} tokens)" for name, journey in list(self._journeys.items())[:3])
            raise InternalError(f"{len(self._journeys)} simulated requests were never answered, among them {some}: a bug")
        return samples

    def _add(self, role: Role, name: str) -> None:
        shape = self.plan.shape
        member = Member(
            id=name,
            role=role,
            address="",
            fingerprint=_FINGERPRINT,
            block_size=shape.block_size,
            num_blocks=shape.num_blocks,
            max_num_batched_tokens=shape.max_num_batched_tokens,
        )
        known = [(fleet, fleet.add(member)) for fleet in self.fleets]
        engine = self.engines[name] = SimulatedEngine(self.clock, shape, self.plan.paces[role], lambda update: self._told(known, update))
        engine.on_token = self._has_token if role is not Role.PREFILL else lambda request: self._prefilled(name, request)
        engine.on_step = self._starts if role is not Role.PREFILL else lambda plan: self._prefill_starts(name, plan)
        if role is Role.PREFILL:
            engine.on_computed = lambda plan: self._pushes(name, plan)
        self._link_free[name] = 0.0
        for fleet, worker in known:
            fleet.update(worker, StateUpdate(sequence=0, state=MemberState.READY, load=engine.load(), snapshot=True))

    def _told(self, known: Sequence[tuple[Fleet, Worker]], update: StateUpdate) -> None:
        def told() -> None:
            for fleet, worker in known:
                fleet.update(worker, update)

        self.clock.after(self.plan.hop_s + self.plan.news_s, told)

    # -- the router

    def _arrived(self, number: int, ask: Ask, sample: Sample) -> None:
        plan, size = self.plan, self.plan.shape.block_size
        if ask.num_prompt_tokens + ask.num_output_tokens > plan.shape.num_blocks * size:
            sample.error = "longer than a worker's KV cache"
            return
        prompt = ask.hashes[: ask.num_prompt_tokens // size]
        self._turn += 1
        fleet = self.fleets[number % plan.routers]
        facts = Facts(
            num_prompt_tokens=ask.num_prompt_tokens,
            turn=self._turn,
            num_output_tokens=self._num_output_tokens,
            local_prefill=plan.local_prefill,
            ttft_slo_s=plan.ttft_slo_s,
            itl_slo_s=plan.itl_slo_s,
        )
        try:
            placement = self._policy(facts, fleet.view(lambda size: prompt[: num_matchable_blocks(ask.num_prompt_tokens, size)]))
        except Overloaded as error:
            sample.error = f"refused: {error.message}"
            return
        name = str(number)
        journey = self._journeys[name] = _Journey(ask, sample, _request(name, ask, ask.num_output_tokens), placement, fleet)
        journey.computes = placement.prefills[0] if placement.prefills else placement.decode
        total, missing = ask.num_prompt_tokens, placement.missing_tokens
        fleet.routed(placement.decode, name, 0, 0)
        fleet.routed(journey.computes, name, missing, (total**2 - (total - missing) ** 2) // 2, prompt)
        journey.waited_for = (journey.computes, placement.decode)
        self.clock.after(2 * plan.hop_s, lambda: self._at_decode(journey))

    def _not_there(self, journey: _Journey) -> None:
        """The router hears that D computes the prompt itself."""
        self.clock.after(self.plan.hop_s, lambda: journey.fleet.unrouted(journey.computes, journey.request.request_id))

    def _first_token(self, journey: _Journey) -> None:
        """On its way from D."""
        journey.sample.ttft_s = self.clock.now + 2 * self.plan.hop_s - journey.ask.at

        def seen() -> None:
            for name in journey.waited_for:
                journey.fleet.unrouted(name, journey.request.request_id)

        self.clock.after(self.plan.hop_s, seen)

    def _ended(self, journey: _Journey) -> None:
        tokens, sample = journey.ask.num_output_tokens, journey.sample
        sample.output_tokens = tokens
        sample.e2e_s = self.clock.now + 2 * self.plan.hop_s - journey.ask.at
        self._num_output_tokens += LEARNED * (tokens - self._num_output_tokens)
        del self._journeys[journey.request.request_id]

    # -- D

    def _at_decode(self, journey: _Journey) -> None:
        engine, request = self.engines[journey.placement.decode], journey.request
        if not journey.placement.prefills:
            engine.submit(request)
            return

        def decided(num_blocks: int) -> None:
            journey.pushed_from = num_blocks * self.plan.shape.block_size
            if journey.ask.num_prompt_tokens - journey.pushed_from <= self.plan.max_local_prefill_tokens:
                here()
            else:
                engine.reserve(request, lambda room: self._ask_prefill(journey) if room else here())

        def here() -> None:
            engine.compute(request)
            self._not_there(journey)

        engine.hold(request, decided)

    def _starts(self, plan: StepPlan) -> None:
        for item in plan.scheduled:
            if item.request.cache is None:
                journey = self._journeys[item.request.request_id]
                _report(item.request, item.start)
                if not journey.prompt:
                    journey.sample.cached_tokens = min(item.start, journey.ask.num_prompt_tokens)

    def _has_token(self, request: Request) -> None:
        journey = self._journeys[request.request_id]
        if not journey.sample.ttft_s:
            self._first_token(journey)
        if request.finish_reason is not None:
            self._ended(journey)

    # -- P

    def _ask_prefill(self, journey: _Journey) -> None:
        journey.prompt = _request(journey.request.request_id, journey.ask, 1)
        self.clock.after(self.plan.hop_s, lambda: self.engines[journey.computes].submit(journey.prompt or journey.request))

    def _prefill_starts(self, name: str, plan: StepPlan) -> None:
        """What P finds in its cache is pushed as it begins."""
        for item in plan.scheduled:
            if item.request.cache is None:
                journey = self._journeys[item.request.request_id]
                _report(item.request, item.start)
                journey.sample.cached_tokens = max(journey.pushed_from, item.start)
                self._push(name, item.start - journey.pushed_from)

    def _pushes(self, name: str, plan: StepPlan) -> None:
        for item in plan.scheduled:
            journey = self._journeys.get(item.request.request_id)
            if journey is not None:
                self._push(name, min(item.end, journey.ask.num_prompt_tokens) - max(item.start, journey.pushed_from))

    def _push(self, name: str, tokens: int) -> None:
        if tokens > 0:
            self._link_free[name] = max(self._link_free[name], self.clock.now) + tokens * self.plan.paces[Role.PREFILL].push_token_s

    def _prefilled(self, name: str, request: Request) -> None:
        """The first token goes to D, and after the last block the news that all are there. `_pushes` has not counted this step yet."""
        journey = self._journeys[request.request_id]

        def first() -> None:
            self._first_token(journey)
            journey.request.append(0)

        def whole() -> None:
            arrives = max(self._link_free[name], self.clock.now) + self.plan.hop_s
            self.clock.at(arrives, lambda: self._fed(journey))

        self.clock.after(self.plan.hop_s, first)
        self.clock.after(0.0, whole)

    def _fed(self, journey: _Journey) -> None:
        self.engines[journey.placement.decode].feed(journey.request)
        if journey.request.finish_reason is not None:
            self._ended(journey)


def _request(name: str, ask: Ask, max_tokens: int) -> Request:
    return Request(
        request_id=name,
        token_ids=[0] * ask.num_prompt_tokens,
        num_prompt_tokens=ask.num_prompt_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        eos_token_ids=frozenset(),
        max_model_len=1 << 60,
        block_hashes=list(ask.hashes),
    )


def _report(request: Request, cached: int) -> None:
    request.cache = CacheReport(num_prompt_tokens=request.num_prompt_tokens, num_local_tokens=cached)
