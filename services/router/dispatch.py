"""Dispatcher: one sequence's life between the router and the workers.

    place ─▶ Decode.Generate ─▶ outputs … ─▶ finished
      ▲            │ refused, lost, silent for a lease
      └────────────┘ with the tokens so far

The sequence goes on elsewhere as if nothing had happened, because draws depend on (seed, position) alone, and it stays with one version of
the model while that has a worker. Text is not known here.
"""

import asyncio
import dataclasses
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from baton.config import HedgingConfig
from baton.errors import BatonError, InternalError, NoWorkers, Overloaded, Unavailable, WorkerLost
from baton.rpc.channel import Channels
from baton.tracing import NO_SPAN, Span
from baton.types import GenerateOutput, GenerateRequest, MemberState, Role
from services.router.admission import NOTHING_PROMISED, Promised
from services.router.attempts import Attempt, Attempts
from services.router.hedging import Hedging
from services.router.placer import Decision, Placer
from services.router.policy import Facts, Placement, Policy
from services.router.sessions import Sessions
from services.router.workers import HashesBySize, Workers

logger = logging.getLogger(__name__)
NO_HEDGING = HedgingConfig()


def not_kept(decision: Decision) -> None:
    """Nobody will ask for it; and its sequence may run for long."""
    decision.view = ()


def nobody_asks(predicted_s: float | None, actual_s: float, predicted_share: float, actual_share: float) -> None:
    """How well it was predicted."""


@dataclasses.dataclass(slots=True)
class Route:
    """Where a sequence went and why; grows while it runs."""

    policy: str
    decode: str = ""
    prefill: str = ""  # empty: the decode worker computed the prompt itself
    reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    predicted_s: float | None = None  # until the first token
    queued_s: float = 0.0  # before it was placed
    hedged: str = ""  # where it was sent to two workers, whether the second one went on with it: won, lost
    moves: list[str] = dataclasses.field(default_factory=list[str])  # why it left each earlier worker
    decisions: list[Decision] = dataclasses.field(default_factory=list[Decision], repr=False)  # of each placement, where they are kept
    on_decision: Callable[[Decision], None] = dataclasses.field(default=not_kept, repr=False)  # keeps its view, or lets it go
    span: Span = dataclasses.field(default=NO_SPAN, repr=False)  # the request's

    def sent(self, placement: Placement) -> None:
        self.decode, self.prefill, self.reason, self.predicted_s = placement.decode, "", placement.reason, placement.ttft_s

    def aside(self) -> "Route":
        """Of the same sequence, elsewhere at the same time."""
        return Route(self.policy, span=self.span)

    def take(self, other: "Route") -> None:
        """It goes on there."""
        self.decode, self.prefill, self.reason, self.predicted_s = other.decode, other.prefill, other.reason, other.predicted_s
        self.num_cached_tokens = other.num_cached_tokens

    def __str__(self) -> str:
        parts = [
            f"policy={self.policy}",
            f"decode={self.decode}",
            f"prefill={self.prefill or 'local'}",
            f"cached={self.num_cached_tokens}/{self.num_prompt_tokens}",
        ]
        if self.predicted_s is not None:
            parts.append(f"predicted_ttft={self.predicted_s:.3f}")
        if self.queued_s:
            parts.append(f"queued={self.queued_s:.3f}")
        if self.hedged:
            parts.append(f"hedged={self.hedged}")
        if self.moves:
            parts.append(f"moves={len(self.moves)}")
        text = "; ".join([*parts, f'reason="{self.reason}"'])
        return text.encode("ascii", "replace").decode().replace("\n", " ")


@dataclasses.dataclass(slots=True)
class Version:
    """Of the model: the KV fingerprint that all sequences of a request stay with, from the first that is placed. One that leaves its worker
    without a token does not count any more."""

    fingerprint: str = ""  # empty: any
    sequences: set[str] = dataclasses.field(default_factory=set[str])  # that count

    def placed(self, sequence: str, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.sequences.add(sequence)

    def left(self, sequence: str) -> None:
        self.sequences.discard(sequence)
        if not self.sequences:
            self.fingerprint = ""


class Dispatcher:
    def __init__(
        self,
        workers: Workers,
        channels: Channels,
        policy_name: str,
        policy: Policy,
        *,
        lease_s: float,
        max_migrations: int,
        local_prefill: bool = True,
        on_migration: Callable[[], None] = lambda: None,
        on_first_token: Callable[[float | None, float, float, float], None] = nobody_asks,
        hedging: HedgingConfig = NO_HEDGING,
        on_hedge: Callable[[str], None] = lambda result: None,
    ) -> None:
        """`on_first_token`: is told the seconds to it as predicted, if they were, and as they were; and the share of the prompt that was
        predicted to be cached, and that was. `on_hedge`: is told what became of each hedge."""
        self.workers, self.policy_name = workers, policy_name
        self.placer = Placer(workers, policy, local_prefill=local_prefill)
        self._attempts = Attempts(workers, Sessions(channels, lease_s=lease_s), self.placer.breakers)
        self._hedging = None
        if hedging.after is not None:
            values = {"after": hedging.after, "at_least_s": hedging.at_least_s, "share": hedging.share}
            self._hedging = Hedging(self._attempts, self.placer, **values, on_hedge=on_hedge)
        self._lease_s, self._max_migrations, self._on_migration = lease_s, max_migrations, on_migration
        self._on_first_token = on_first_token
        self._turns = itertools.count()

    def route(self) -> Route:
        return Route(self.policy_name)

    async def generate(
        self,
        request: GenerateRequest,
        route: Route,
        hashes: HashesBySize | None = None,
        promised: Promised = NOTHING_PROMISED,
        version: Version | None = None,
    ) -> AsyncGenerator[GenerateOutput]:
        """Outputs until the one with a finish reason, from as many workers as it takes. Leaving early cancels the call. `hashes`: of the
        prompt, where its siblings share them; `version`: likewise.

        Raises NoWorkers, Overloaded, WorkerLost (too often), or what a worker says of a wrong request.
        """
        output, hashes = list(request.output_token_ids), hashes or HashesBySize(request.prompt_token_ids, request.salt)
        route.num_prompt_tokens = len(request.prompt_token_ids) + len(output)
        turn, refused, version = next(self._turns), list[str](), version or Version()
        if self._hedging is not None:
            self._hedging.earn()
        try:
            for number in itertools.count():
                if output:  # must be computed as well, wherever it goes on
                    hashes = HashesBySize((*request.prompt_token_ids, *output), request.salt)
                num_known, left = len(request.prompt_token_ids) + len(output), request.sampling.max_tokens - len(output)
                facts = self.placer.facts(num_known, left, turn, promised)
                if output:  # it has its first token
                    facts = dataclasses.replace(facts, ttft_slo_s=None)
                decision = await self._place(facts, hashes, refused, version)
                name = request.request_id if number == 0 else f"{request.request_id}~{number}"
                part = dataclasses.replace(request, request_id=name, output_token_ids=tuple(output))
                attempt = self._attempts.begin(part, route, decision, hashes)
                version.placed(request.request_id, attempt.member.fingerprint)
                route.on_decision(decision)
                try:
                    if self._hedging is None or output or route.hedged:
                        items = self._attempts.outputs(attempt)
                    else:
                        place = functools.partial(self._decide_late, facts, promised, hashes, refused, attempt.member.fingerprint)
                        attempt, items = await self._hedging.race(attempt, place, functools.partial(self._failed, refused))
                    async with aclosing(items):
                        async for item in items:
                            if attempt.decision.ttft_s is None:
                                self._began(attempt, num_known, first=not output)
                            output += [token.token_id for token in item.tokens]
                            yield item
                            if item.finish_reason is not None:
                                return
                except (InternalError, Unavailable) as error:
                    self._failed(refused, attempt, error)
                    if not output:
                        version.left(request.request_id)
                    full = isinstance(error, Overloaded) and not self._others(facts, hashes, refused, version)
                    if isinstance(error, InternalError) or number >= self._max_migrations or full:
                        raise
                    told = (request.request_id, attempt.decode, len(output), error.message)
                    logger.warning("%s moves from %s after %d tokens: %s", *told, extra={"request_id": request.request_id})
                    route.moves.append(f"{attempt.decode}: {error.message}")
                    self._on_migration()
                finally:
                    self._attempts.end(attempt)
        finally:  # also where a stop string ended it, or nobody reads on
            if len(output) > len(request.output_token_ids):
                self.placer.learn_output(len(output))

    def _began(self, attempt: Attempt, num_known: int, *, first: bool) -> None:
        """`first`: the token is the sequence's first."""
        placement, actual_s = attempt.decision.placement, self._attempts.succeeded(attempt)
        if first:
            self.placer.learn_ttft(attempt.decision)
            shares = 1 - placement.missing_tokens / num_known, attempt.route.num_cached_tokens / num_known
            self._on_first_token(placement.ttft_s, actual_s, *shares)

    def _failed(self, refused: list[str], attempt: Attempt, error: BatonError) -> None:
        """What the next decisions are to know of it."""
        self._attempts.failed(attempt, error)
        if isinstance(error, Unavailable) and not isinstance(error, WorkerLost) and attempt.decode not in refused:
            refused.append(attempt.decode)

    def _decide_late(
        self, facts: Facts, promised: Promised, hashes: HashesBySize, refused: Sequence[str], version: str, excluded: Sequence[str]
    ) -> Decision:
        """Now, with what is left of what was promised. Never with another version: either may be the one that goes on."""
        facts = dataclasses.replace(facts, ttft_slo_s=promised.left_s())
        return self.placer.told(self.placer.decide(facts, hashes, [*refused, *excluded], version))

    async def _place(self, facts: Facts, hashes: HashesBySize, refused: list[str], version: Version) -> Decision:
        """Waits up to a lease for a worker that can take it."""
        deadline = asyncio.get_running_loop().time() + self._lease_s
        while True:
            left = deadline - asyncio.get_running_loop().time()
            try:
                return self.placer.told(self._decide(facts, hashes, refused, version, waits=left > 0))
            except NoWorkers:
                if left <= 0:
                    raise
                refused.clear()
                await self.workers.wait_change(min(left, 0.5))

    def _decide(self, facts: Facts, hashes: HashesBySize, refused: Sequence[str], version: Version, *, waits: bool = True) -> Decision:
        """With another version only where its own has nobody left. `waits`: a worker that may come back is waited for. Raises NoWorkers."""
        own = version.fingerprint
        try:
            return self.placer.decide(facts, hashes, refused, own)
        except NoWorkers:
            if not own or (waits and self._has_entrance(own)):
                raise
        decision = self.placer.decide(facts, hashes, refused)
        reason = f"another version of the model, as {own[:8]} has no worker left; {decision.placement.reason}"
        decision.placement = dataclasses.replace(decision.placement, reason=reason)
        return decision

    def _has_entrance(self, fingerprint: str) -> bool:
        """Whether somebody who is asked for sequences of this version is there, or may be again soon."""
        draining = MemberState.DRAINING
        return any(
            each.member.fingerprint == fingerprint
            and each.member.role is not Role.PREFILL
            and draining not in (each.state, each.member.state)
            for each in self.workers.all()
        )

    def _others(self, facts: Facts, hashes: HashesBySize, refused: Sequence[str], version: Version) -> bool:
        try:
            self._decide(facts, hashes, refused, version)
        except NoWorkers:
            return False
        return True
