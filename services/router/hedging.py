"""Hedging: a sequence whose first token is late is sent to a second worker too, and goes on with whoever answers first; the other call is
cancelled ("hedged requests": Dean and Barroso, The Tail at Scale, 2013). Off unless it is configured.

    first ─────── late ───────▶ ? ── the first token of either ──▶ that one goes on
                    └── hedge ─▶ ?

One that fails leaves it to the other; where both fail, it is as if there had been the first alone. Tokens are the same from both, as after
a move, and only one is listened to.

What it may cost is bounded as retries are in gRPC: each sequence adds `share` to a bucket of `BURST`, and a hedge takes 1 out of it. So a
fleet that is slow as a whole is not asked for everything twice.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from baton.errors import BatonError, NoWorkers
from baton.types import GenerateOutput
from services.router.attempts import Attempt, Attempts
from services.router.placer import Decision, Placer

logger = logging.getLogger(__name__)
BURST = 10.0  # hedges that may be sent at once
Outputs = AsyncGenerator[GenerateOutput]


class _Lane:
    """One of the two, and the task that waits for its first output."""

    def __init__(self, attempt: Attempt, outputs: Outputs) -> None:
        self.attempt, self.outputs = attempt, outputs
        self.first = asyncio.create_task(self._first(), name=f"first-{attempt.request.request_id}")

    async def _first(self) -> GenerateOutput:
        return await anext(self.outputs)

    async def leave(self) -> None:
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)  # a generator that runs can't be closed
        await self.outputs.aclose()

    async def all(self) -> Outputs:
        """Its outputs, the first included, which has come."""
        async with aclosing(self.outputs):
            yield self.first.result()
            async for output in self.outputs:
                yield output


class Hedging:
    def __init__(
        self,
        attempts: Attempts,
        placer: Placer,
        *,
        after: float,
        at_least_s: float,
        share: float,
        on_hedge: Callable[[str], None] = lambda result: None,
    ) -> None:
        """A first token is late after `after` times the time that was predicted for it, and `at_least_s`; the latter alone where none
        was. `on_hedge`: is told what became of each: won, lost or failed."""
        self._attempts, self._placer = attempts, placer
        self._after, self._at_least_s, self._share, self._on_hedge = after, at_least_s, share, on_hedge
        self._allowed = BURST

    def earn(self) -> None:
        """Another sequence has come."""
        self._allowed = min(self._allowed + self._share, BURST)

    async def race(
        self, first: Attempt, place: Callable[[Sequence[str]], Decision], failed: Callable[[Attempt, BatonError], None]
    ) -> tuple[Attempt, Outputs]:
        """Who goes on, which may be the hedge, and all its outputs. `place`: a decision without these workers; `failed`: is told of each
        that fails. Raises what the first fails with, if there is nobody else; whoever does not go on has ended."""
        lanes, route = [self._lane(first)], first.route
        won: _Lane | None = None
        try:
            won = await self._first_word(lanes, place, failed)
            for lane in lanes:
                if lane is not won:
                    await self._leave(lane, overtaken=True)
            if won.attempt is not first:
                route.take(won.attempt.route)
                won.attempt.route = route
            return won.attempt, won.all()
        except BaseException:
            won = None
            for lane in lanes:
                lane.first.cancel()  # all of them, though we may be cancelled once more while one is waited for
            for left in await asyncio.gather(*map(self._leave, lanes), return_exceptions=True):
                if isinstance(left, BaseException):
                    logger.error("a call could not be left", exc_info=left)
            raise
        finally:
            for hedge in lanes[1:]:
                route.hedged = "won" if won is hedge else "lost"
                self._on_hedge("failed" if hedge.attempt.error is not None else route.hedged)

    async def _first_word(
        self, lanes: list[_Lane], place: Callable[[Sequence[str]], Decision], failed: Callable[[Attempt, BatonError], None]
    ) -> _Lane:
        """Whose first output has come; adds the hedge to `lanes` when it is time."""
        first = lanes[0].attempt
        patience_s: float | None = max(self._at_least_s, self._after * (first.decision.placement.ttft_s or 0.0))
        while running := [lane for lane in lanes if lane.attempt.error is None]:
            tasks = [lane.first for lane in running]
            done, _ = await asyncio.wait(tasks, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                hedge = self._hedge(first, place, patience_s or 0.0)
                lanes += [] if hedge is None else [self._lane(hedge)]
                patience_s = None
            for lane in running:
                if lane.first in done:
                    try:
                        lane.first.result()
                        return lane
                    except BatonError as error:
                        failed(lane.attempt, error)
                        if len(lanes) > 1:
                            told = first.request.request_id, lane.attempt.decode, error.message
                            logger.warning("%s was sent to two workers, of which %s failed: %s", *told, extra={"request_id": told[0]})
        assert first.error is not None
        raise first.error

    def _hedge(self, first: Attempt, place: Callable[[Sequence[str]], Decision], waited_s: float) -> Attempt | None:
        """None where it is not allowed, or there is nobody to ask."""
        decision = self._elsewhere(first.decision, place) if self._allowed >= 1 else None
        if decision is None:
            return None
        self._allowed -= 1
        reason = f"hedge, no token from {first.decode} after {waited_s:.2f} s; {decision.placement.reason}"
        decision.placement = dataclasses.replace(decision.placement, reason=reason)
        request = dataclasses.replace(first.request, request_id=f"{first.request.request_id}~hedge")  # both may be at one prefill worker
        attempt = self._attempts.begin(request, first.route.aside(), decision, first.hashes)
        first.route.on_decision(decision)
        return attempt

    def _elsewhere(self, first: Decision, place: Callable[[Sequence[str]], Decision]) -> Decision | None:
        """At another decode worker; with another prefill worker too, if there is one: either may be who is slow. Never at one that is
        left alone, nor with its prompt computed by a decode worker because no other prefill worker is there."""
        broken, placement = self._placer.breakers.open(), first.placement
        for excluded in ((placement.decode, *placement.prefills[:1]), (placement.decode,)):
            try:
                decision = place(excluded)
            except NoWorkers:
                continue
            there = decision.placement.decode, *decision.placement.prefills
            if (first.degraded or not decision.degraded) and not set(broken) & set(there):
                return decision
        return None

    def _lane(self, attempt: Attempt) -> _Lane:
        return _Lane(attempt, self._attempts.outputs(attempt))

    async def _leave(self, lane: _Lane, *, overtaken: bool = False) -> None:
        lane.attempt.overtaken = overtaken
        try:
            await lane.leave()
        finally:
            self._attempts.end(lane.attempt)
