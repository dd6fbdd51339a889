"""Placer: asks the policy about the workers as they are now, for requests that go and for those that only want to know.

Workers with an open breaker are asked only where there is nobody else. Where no prefill worker fits any decode worker, the decode workers
are taken for unified ones, which compute prompts themselves (*degraded*; not with `local_prefill: false`).

Placements that would break what a request was promised are passed over where there is another. Where there is none, it is placed as if
nothing had been promised: whether it is refused then is admission's to say.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from baton.errors import NoWorkers, Overloaded
from services.router.admission import NOTHING_PROMISED, Forecast, Promised
from services.router.breakers import Breakers
from services.router.policy import Facts, Placement, Policy
from services.router.view import View, WorkerView
from services.router.workers import HashesBySize, Workers

FIRST_GUESS = 128.0  # output tokens, before any request has ended
LEARNED = 0.02  # how much of the expectation each ended request makes
_REMEMBERED = 31  # first tokens


@dataclasses.dataclass(slots=True)
class Decision:
    """A placement, and all that the policy knew, as long as it may be asked for: 168 bytes a worker."""

    facts: Facts
    view: Sequence[WorkerView]
    placement: Placement
    degraded: str = ""  # why a decode worker has to compute the prompt
    at: float = dataclasses.field(default_factory=time.time)
    ttft_s: float | None = None  # what it was in the end


class Placer:
    def __init__(self, workers: Workers, policy: Policy, *, local_prefill: bool = True) -> None:
        self._workers, self.policy, self._local_prefill = workers, policy, local_prefill
        self.breakers = Breakers(workers.instance)
        self._num_output_tokens = FIRST_GUESS  # of a request, lately
        self._beside = deque[float](maxlen=_REMEMBERED)
        self._beside_s = 0.0

    def facts(self, num_prompt_tokens: int, max_tokens: int, turn: int = 0, promised: Promised = NOTHING_PROMISED) -> Facts:
        return Facts(
            num_prompt_tokens=num_prompt_tokens,
            turn=turn,
            num_output_tokens=self.expected_tokens(max_tokens),
            local_prefill=self._local_prefill,
            ttft_slo_s=promised.left_s(),
            itl_slo_s=promised.itl_s,
        )

    def expected_tokens(self, max_tokens: int) -> float:
        """Of an output that may have so many."""
        return min(max_tokens, self._num_output_tokens)

    def learn_output(self, num_tokens: int) -> None:
        self._num_output_tokens += LEARNED * (num_tokens - self._num_output_tokens)

    def learn_ttft(self, decision: Decision) -> None:
        """What a first token took beside what workers announce: hand-overs, the way to us. The latest ones' median is `told`."""
        expected_s, actual_s = decision.placement.ttft_s, decision.ttft_s
        if expected_s is not None and actual_s is not None:
            self._beside.append(actual_s - (expected_s - (decision.placement.beside_s or 0.0)))
            self._beside_s = median(self._beside)

    def told(self, decision: Decision) -> Decision:
        """With what is beside, which doubles or halves the time at most. Nobody is placed or refused by it: a jam that is over keeps nobody
        away."""
        ttft_s = decision.placement.ttft_s
        if ttft_s is not None and self._beside_s:
            beside_s = min(max(self._beside_s, -ttft_s / 2), ttft_s)
            decision.placement = dataclasses.replace(decision.placement, ttft_s=ttft_s + beside_s, beside_s=beside_s)
        return decision

    def decide(self, facts: Facts, hashes: HashesBySize, refused: Sequence[str] = (), version: str = "") -> Decision:
        """`version`: the KV fingerprint of whoever may be asked; empty: any. Raises NoWorkers."""
        broken = self.breakers.open()
        try:
            decision = self._decide(facts, self._view(hashes, [*refused, *broken], version))
            if decision.degraded and broken:
                decision.degraded += f" ({', '.join(broken)}: left alone, having failed request after request)"
            return decision
        except NoWorkers:
            if not broken:
                raise
            return self._decide(facts, self._view(hashes, refused, version))

    def _view(self, hashes: HashesBySize, exclude: Sequence[str], version: str) -> Sequence[WorkerView]:
        view = self._workers.view(hashes, exclude=exclude)
        return View.of(view).version(version) if version else view

    def _decide(self, facts: Facts, view: Sequence[WorkerView]) -> Decision:
        try:
            return self._asked(facts, view)
        except NoWorkers as error:
            alone = View.of(view).alone()
            if not alone or not facts.local_prefill:
                raise
            decision = self._asked(facts, alone)
            reason = f"degraded, no prefill worker; {decision.placement.reason}"
            return dataclasses.replace(decision, placement=dataclasses.replace(decision.placement, reason=reason), degraded=error.message)

    def _asked(self, facts: Facts, view: Sequence[WorkerView]) -> Decision:
        try:
            return Decision(facts, view, self.policy(facts, view))
        except Overloaded:
            facts = dataclasses.replace(facts, ttft_slo_s=None, itl_slo_s=None)
            return Decision(facts, view, self.policy(facts, view))

    def problem(self) -> NoWorkers | None:
        """Why no request can be placed now."""
        try:
            self.decide(self.facts(1, 1), HashesBySize((), ""))
        except NoWorkers as error:
            return error
        return None

    def degraded(self) -> str:
        """Why decode workers have to compute prompts; empty: they do not have to."""
        try:
            return self.decide(self.facts(1, 1), HashesBySize((), "")).degraded
        except NoWorkers:
            return ""

    def forecast(
        self, num_prompt_tokens: int, hashes: HashesBySize, max_tokens: int, promised: Promised = NOTHING_PROMISED
    ) -> Callable[[], Forecast]:
        """What would become of this prompt, whenever it is asked."""

        def now() -> Forecast:
            try:
                placement = self.decide(self.facts(num_prompt_tokens, max_tokens, promised=promised), hashes).placement
            except NoWorkers:
                return Forecast(waits_s=math.inf)
            return Forecast(ttft_s=placement.ttft_s, waits_s=placement.waits_s or 0.0, itl_s=placement.itl_s)

        return now
