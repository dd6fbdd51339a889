"""Engine: one worker's scheduler, KV blocks and model, behind an asynchronous face.

    event loop                         engine's thread                        I/O threads (kv.transfer)
    submit, offer, push, close ──▶ inbox ─▶ loading ─▶ scheduler ─▶ runner ─▶ outputs
    Sequence ◀── one call per step ─────────────────────┘                      lookup, load, save ──▶ inbox

The thread alone changes scheduler, blocks and requests; everything else reaches it as a function in the inbox. While it sleeps, having
nothing to compute, or a step is computed, the event loop may look at them (`StatePublisher.lock`). Knows nothing of gRPC, of other workers,
or of roles.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial

from baton.errors import BatonError, Draining, InternalError, Overloaded, WorkerLost
from baton.kv.holdings import Holdings
from baton.kv.store import Buffer
from baton.runtime.census import Census
from baton.runtime.entry import Entry
from baton.runtime.feed import Feed
from baton.runtime.flights import Flights, Runner
from baton.runtime.leases import EngineLeases, asked
from baton.runtime.loading import Loader
from baton.runtime.outputs import Outputs
from baton.runtime.pace import PaceLearner
from baton.runtime.pushing import Checksums, Pusher, Receiver, Reservations, Sender
from baton.runtime.refetch import set_aside_lost
from baton.runtime.saving import Saver
from baton.runtime.sequence import EngineSequence
from baton.runtime.state import StatePublisher, StateReader
from baton.runtime.steps import Steps
from baton.runtime.tier import Tier, Tiers
from baton.runtime.validation import Limits, validate
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.scheduling.request import Request, RequestStatus
from baton.scheduling.scheduler import Scheduler
from baton.types import FinishReason, GenerateRequest, Load, OutputToken, PushTarget, StateUpdate

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0  # also the heartbeat of the state stream
OWING_WAIT_S = 0.001  # the state is told after that
STALLED_WAIT_S = 0.01  # work is queued, but memory is held by calls in flight


class Engine:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tiers: Sequence[Tier],
        *,
        key: Callable[[bytes], str],
        buffer: Callable[[int], Buffer],
        limits: Limits,
        eos_token_ids: frozenset[int],
        budget_s: float,
        cores: int = 0,
        sender: Sender | None = None,
        receiver: Receiver | None = None,
        checksums: Checksums | None = None,
        holdings: Sequence[Holdings] = (),
    ) -> None:
        """`tiers` hold KV behind the device, fastest first, and `holdings` tell what is in those that are this worker's own; `key` names
        a block hash there, `buffer` gives a block's memory, `budget_s` bounds each call. `cores`: see `pace.Stopwatch`. `sender` and
        `receiver` move blocks between workers past the tiers, with `checksums` if given."""
        self.on_crash: Callable[[], None] = lambda: None
        self.on_stopped: Callable[[], None] = lambda: None  # when all else has ended
        self.on_step: Callable[[StepPlan, float], None] = lambda plan, seconds: None  # after each step, on the engine's thread
        self.scheduler, self.runner, self.limits = scheduler, runner, limits
        self._flights, self._pace = Flights(), PaceLearner()
        cache = scheduler.cache
        self._tiers = Tiers(tiers, key=key, buffer=buffer, block_size=cache.block_size)
        self.saver = Saver(cache, self._tiers, budget_s=budget_s, post=self._post, on_saved=self._saved)
        self.loader = Loader(
            cache,
            self._tiers,
            self.saver,
            budget_s=budget_s,
            pace=lambda: self._pace.pace.by_the_clock(),
            step_tokens=scheduler.max_num_batched_tokens,
            backlog=lambda: (*scheduler.running, *scheduler.waiting),
            post=self._post,
            after_steps=self._flights.after,
            on_matched=self._matched,
            on_ready=self._ready,
        )
        self.pusher = Pusher(cache.pool, sender, block_size=cache.block_size, post=self._post, checksums=checksums)
        self.reservations = Reservations(cache, receiver, after_steps=self._flights.after, patience_s=budget_s, checksums=checksums)
        self.leases = EngineLeases(self.pusher, self.reservations, receiver, post=self._post, stopping=lambda: self._stopping)
        self._sender, self._receiver, self._eos_token_ids = sender, receiver, eos_token_ids
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._entries: dict[str, Entry] = {}
        self._outputs = Outputs(await_saves=self.saver.await_saves, end=self.abort)
        self._live: dict[str, EngineSequence] = {}  # the event loop's
        self._census = Census(
            scheduler,
            self._entries,
            lambda: replace(self._pace.pace, push_token_s=self.pusher.token_s),
            self._flights,
            self._tiers.fetch_token_s,
        )
        self._publisher = StatePublisher(self._census, cache.pool, holdings, self._tiers.take_news)
        self._steps = Steps(
            scheduler,
            runner,
            self._flights,
            self._pace,
            cores=cores,
            elsewhere=self._publisher.elsewhere,
            meanwhile=self._tell,
            on_computed=self._computed,
            on_failed=self._fail,
            on_step=lambda plan, seconds: self.on_step(plan, seconds),
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.turns = 0  # of the engine's thread
        self._stopping = False
        self._stalled = True
        self._owes = False  # its readers the state after the last step

    # -- the event loop's side

    def start(self) -> None:
        """Starts the thread. Called once, on the event loop that will use the engine."""
        self._outputs.open(asyncio.get_running_loop())
        self._publisher.open()
        self._thread.start()

    def submit(
        self, request: GenerateRequest, *, hold: bool = False, await_saves: bool = False, push: PushTarget | None = None
    ) -> EngineSequence:
        if self._stopping:
            raise Draining("this worker is stopping; send the request to another one")
        if len(self._live) >= self.limits.max_queued:
            raise Overloaded(f"this worker has {len(self._live)} requests queued; try again later, or add workers")
        validate(request, self.limits, self._live)
        inner = Request.create(
            request,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self.limits.max_model_len,
            block_size=self.scheduler.cache.block_size,
            arrival=time.monotonic(),
        )
        sequence = self._live[request.request_id] = EngineSequence(self, inner)
        entry = Entry(inner, Feed(inner, hold=hold, await_saves=await_saves), sequence)
        self._census.arrives(entry)
        self._post(lambda: self._admit(entry, push))
        self._publisher.arrives()
        return sequence

    async def watch(self) -> AsyncIterator[StateUpdate]:
        reader = StateReader(asyncio.get_running_loop())
        self._post(lambda: self._publisher.subscribe(reader))
        try:
            while True:
                update = await reader.next()
                if update is None:
                    self._post(lambda: self._publisher.subscribe(reader))
                else:
                    yield update
        finally:
            self._post(lambda: self._publisher.unsubscribe(reader))

    @property
    def load(self) -> Load:
        return self._publisher.load

    async def check_integrity(self) -> list[str]:
        if self._stopping:
            return []
        return await asked(self._post, lambda tell: tell(self._check_integrity()))

    @property
    def stopped(self) -> bool:
        return self._stopping and not self._thread.is_alive()

    async def stop(self, flush_s: float = 0.0) -> None:
        if self._stopping:
            return
        deadline = time.monotonic() + flush_s
        self._stopping = True
        self._publisher.close()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        for sequence in list(self._live.values()):
            sequence.deliver(Draining("this worker is stopping; send the request to another one"))
        for part in (self._sender, self._receiver):
            if part is not None:
                await _end(part.close)
        for tier in self._tiers if flush_s else ():  # what a faster one has saved goes to the one behind it
            await _end(partial(tier.flush, max(deadline - time.monotonic(), 0.0)))
        for tier in reversed(self._tiers):  # it may read from a faster one
            await _end(tier.close)
        self.pusher.stop()  # the thread has ended: nobody else touches it
        await _end(self.on_stopped)

    def ended(self, sequence: EngineSequence) -> None:
        """Told its end, or cancelled. Both may happen; by the second time another may have its name."""
        if self._live.get(sequence.request_id) is sequence:
            del self._live[sequence.request_id]

    def cancel(self, sequence: EngineSequence) -> None:
        self.post_to(sequence.request_id, self.abort)
        self._publisher.changed()

    def post_to(self, request_id: str, action: Callable[[Entry], None]) -> None:
        """Runs `action` on the engine's thread, unless the request has ended by then."""

        def run() -> None:
            entry = self._entries.get(request_id)
            if entry is not None:
                self._guard(entry, action)

        self._post(run)

    def reserve(self, request_id: str, beyond: int, answer: Callable[[PushTarget | None], None]) -> None:
        """Blocks of this worker for what the request misses, once it was looked up; None where it has ended, misses no more than `beyond`
        tokens, or there is no room."""

        def run() -> None:
            entry = self._entries.get(request_id)
            if entry is None or (entry.feed.looked_up and entry.feed.num_missing(self.scheduler.cache.block_size) <= beyond):
                answer(None)
            elif entry.feed.looked_up:
                self.reservations.reserve(entry.feed, answer)
            else:
                entry.when_looked_up.append(run)

        self._post(run)

    # -- the engine's thread

    def push(self, entry: Entry, token: OutputToken, *, told: bool = False) -> None:
        """An output token sampled elsewhere. Ignored once the request is computed here, which samples the same token. `told`: it is not the
        last one, and was emitted already."""
        request = entry.request
        if request.status is not RequestStatus.LOADING or request.finish_reason is not None:
            return
        request.append(token.token_id)
        if not told:
            self._outputs.pushed(entry, token)

    def abort(self, entry: Entry) -> None:
        self.scheduler.remove(entry.request)
        self._drop(entry)

    def _admit(self, entry: Entry, push: PushTarget | None = None) -> None:
        self._entries[entry.request.request_id] = entry
        self._census.taken_in(entry)
        if push is not None:
            entry.shipment = self.pusher.open(push, entry.request.num_tokens, lambda: self._outputs.progressed(entry))
        self._guard(entry, lambda entry: self.loader.start(entry.feed))

    def _guard(self, entry: Entry, action: Callable[[Entry], None]) -> None:
        """A bug met on behalf of one request ends that request alone."""
        try:
            action(entry)
        except Exception as error:
            logger.exception("request %s failed", entry.request.request_id, extra={"request_id": entry.request.request_id})
            self._fail(entry.request, InternalError(f"the engine failed on this request: {type(error).__name__}: {error}"))

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)

    def _run(self) -> None:
        """A bug outside of a step, or a lost device, leaves nothing to trust: every request must move to another worker, and `on_crash` is
        called."""
        try:
            with self._publisher.lock:
                while self._work_inbox():
                    self.turns += 1
                    if not self.runner.depth:  # what came meanwhile need not wait for the step, nor routers, which send to who seems idle
                        self._flush()
                    self.loader.tick(time.monotonic())
                    self.saver.tick(time.monotonic())
                    self.reservations.serve()
                    if not self.runner.depth:
                        self._publisher.publish(time.monotonic())
                    self._stalled = not self._step()
                    self._flush()
                    self._owes = not self._stalled and not self._flights and not self.scheduler.has_work
                    if not self._owes:  # else who waits for the last tokens comes first
                        self._publisher.publish(time.monotonic())
        except Exception:
            logger.critical("the engine has crashed", exc_info=True)
            self._stopping = True
            self.on_crash()
            for entry in self._entries.values():
                self._outputs.tell(entry, WorkerLost("the engine has crashed"))
            self._flush()

    def _work_inbox(self) -> bool:
        """Runs what is in the inbox; waits for something if there is nothing to compute. False at the end."""
        wait = self._wait()
        while True:
            try:
                with self._publisher.elsewhere():
                    action = self._inbox.get(timeout=wait)
            except queue.Empty:
                return True
            if action is None:
                return False
            try:
                action()
            except Exception:
                logger.exception("an action of the engine failed")
            wait = 0.0

    def _wait(self) -> float:
        if self._flights:
            return 0.0
        if self.scheduler.has_work:
            return STALLED_WAIT_S if self._stalled else 0.0
        if self._owes:
            return OWING_WAIT_S
        waits = [IDLE_WAIT_S, self._publisher.wait(time.monotonic())]
        for deadline in (self.loader.next_deadline, self.saver.next_deadline, self.reservations.next_deadline):
            if deadline is not None:
                waits.append(deadline - time.monotonic())
        return max(min(waits), 0.001)

    def _step(self) -> bool:
        """Decides on a step and has it computed. False where there was nothing to do."""
        plan = self.scheduler.schedule()
        if self._tiers:
            plan = set_aside_lost(plan, self.scheduler, self.loader, self._entries)
        for item in plan.scheduled:
            self._admitted(item)
        return self._steps.run(plan)

    def _tell(self) -> None:
        """What came, while the device is at work."""
        self._flush()
        self._publisher.publish(time.monotonic())

    def _admitted(self, item: ScheduledRequest) -> None:
        """The first time that a request is scheduled, its cache is known."""
        request = item.request
        if request.cache is not None:
            return
        entry = self._entries[request.request_id]
        request.cache = entry.cache_report(item.start, self.scheduler.cache.block_size)
        self.saver.save_matched(entry.feed)
        if entry.shipment is not None:
            self.pusher.send(entry.shipment, request.block_ids, min(item.start, entry.shipment.num_tokens - 1))

    def _computed(self, item: ScheduledRequest, result: StepResult, save: bool) -> None:
        entry = self._entries[item.request.request_id]
        if save:
            self.saver.save_new(entry.feed, item.block_ids, item.start, item.end)
            if entry.shipment is not None:
                self.pusher.send(entry.shipment, item.block_ids, item.end)
        self._outputs.computed(entry, item, result)

    def _matched(self, feed: Feed) -> None:
        entry = self._entries[feed.request.request_id]
        size = self.scheduler.cache.block_size
        self._outputs.tell(entry, (feed.num_matched * size, (feed.num_found - feed.num_matched) * size))
        entry.run_waiting()

    def _ready(self, feed: Feed) -> None:
        request = feed.request
        if request.status is RequestStatus.LOADING:
            self.scheduler.add(request)
        elif request.status is RequestStatus.FETCHING:
            self.scheduler.resume(request, max(feed.num_loaded * self.scheduler.cache.block_size, request.num_computed_tokens))

    def _saved(self, feed: Feed) -> None:
        entry = self._entries.get(feed.request.request_id)
        if entry is not None and feed.await_saves:
            self._outputs.progressed(entry)

    def _fail(self, request: Request, error: BatonError) -> None:
        entry = self._entries[request.request_id]
        self._outputs.tell(entry, error)
        self.abort(entry)

    def _drop(self, entry: Entry) -> None:
        self.loader.close(entry.feed)
        self.saver.close(entry.feed)
        if entry.shipment is not None:
            self.pusher.close(entry.shipment)
        self._entries.pop(entry.request.request_id, None)
        entry.run_waiting()
        if entry.request.finish_reason is None:
            entry.request.finish_reason = FinishReason.ABORT

    def _flush(self) -> None:
        if not self._outputs.flush():
            self._stopping = True

    def _check_integrity(self) -> list[str]:
        self._publisher.measure()  # who asks wants to know of this moment
        cache = self.scheduler.cache
        held = [entry.request.block_ids for entry in self._entries.values()] + cache.pinned()
        for part in (self.loader, self.saver, self.pusher, self.reservations):
            held += part.held()
        problems = cache.pool.check_integrity(held)
        known = {entry.request for entry in self._entries.values()}
        queued = {*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.fetching}
        problems += [f"request {request.request_id} is scheduled, but has ended" for request in queued - known]
        return problems


async def _end(part: Callable[[], None]) -> None:
    """One that fails to end leaves the others to end."""
    try:
        await asyncio.to_thread(part)
    except Exception:
        logger.exception("a part of the engine has not ended well")
