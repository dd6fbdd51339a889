"""Random life around an engine: requests come, are held, fed, cancelled; blocks are short; pool calls return right, wrong, late or never;
other workers write into reserved blocks, or too late; pushes fail, and read what they were given long after.
Whatever happens, outputs are those of the reference, blocks are accounted for, and everything ends."""

import threading
import time
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.kv.store import Buffer
from baton.runtime.engine import Engine
from baton.runtime.entry import Entry
from baton.runtime.feed import Feed
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request
from baton.scheduling.scheduler import Scheduler
from baton.types import GenerateOutput, GenerateRequest, OutputToken, PushShard, PushTarget, SamplingParams
from tests.properties.toy import BLOCK_SIZE, VOCAB, ToyPush, ToyReceiver, ToyRunner, ToySender, ToyTransfer, reference

PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=26)  # few different tokens: prefixes meet
BUDGET_S = 1000.0  # ends when a rule says so


class Sink:
    """Stands where the event loop's half of a request is."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finished = self.ended = False
        self.error: Exception | None = None

    def deliver(self, output: object) -> None:
        if isinstance(output, GenerateOutput):
            assert not self.finished, "an output after the end"
            self.tokens += [token.token_id for token in output.tokens]
            self.finished = output.finish_reason is not None
        elif isinstance(output, Exception):
            self.error = output


class EngineMachine(RuleBasedStateMachine):
    """Drives the engine's thread functions by hand, so that every interleaving can be had and shrunk."""

    @initialize(
        num_blocks=st.integers(9, 20),
        budget=st.integers(1, 30),
        seqs=st.integers(1, 4),
        caching=st.booleans(),
        depth=st.integers(0, 1),
        around=st.booleans(),
    )
    def start(self, num_blocks: int, budget: int, seqs: int, caching: bool, depth: int, around: bool = False) -> None:
        """`around` the pool, tiers that nobody shares: one in front of it, one behind."""
        self.runner = ToyRunner(num_blocks, depth)
        self.transfer = ToyTransfer(self.runner, {})
        host, files = (ToyTransfer(self.runner, {}, name, shared=False) for name in ("host", "files"))
        self.tiers = (host, self.transfer, files) if around else (self.transfer,)
        self.engine = Engine(
            Scheduler(KVCache(num_blocks, BLOCK_SIZE, prefix_caching=caching), max_num_batched_tokens=budget, max_num_seqs=seqs),
            self.runner,
            self.tiers,
            key=bytes.hex,
            buffer=lambda block_id: Buffer(block_id, 1),
            limits=Limits(vocab_size=VOCAB, max_model_len=num_blocks * BLOCK_SIZE),
            eos_token_ids=frozenset(),
            budget_s=BUDGET_S,
            sender=(sender := ToySender()),
            receiver=(receiver := ToyReceiver()),
        )
        self.engine._publisher.lock.acquire()  # this is the engine's thread
        self.sender, self.receiver = sender, receiver
        self.leases: dict[str, tuple[str, PushTarget, int]] = {}  # request, target, known tokens
        self.sinks: dict[str, tuple[Sink, GenerateRequest]] = {}
        self.entries: dict[str, Entry] = {}
        self.held: set[str] = set()
        self.known: dict[str, int] = {}  # tokens, by request
        self.count = 0
        assert threading.current_thread() is threading.main_thread()

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 8),
        cut=st.integers(0, 3),
        hold=st.booleans(),
        await_saves=st.booleans(),
        push=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, cut: int, hold: bool, await_saves: bool, push: bool = False) -> None:
        self.count += 1
        whole = GenerateRequest(
            request_id=f"r{self.count}", prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens, temperature=0)
        )
        done = reference(whole)[: min(cut, max_tokens - 1)]  # a migrated request knows some of its output
        request = GenerateRequest(
            request_id=whole.request_id, prompt_token_ids=whole.prompt_token_ids, sampling=whole.sampling, output_token_ids=tuple(done)
        )
        inner = Request.create(request, eos_token_ids=frozenset(), max_model_len=10_000, block_size=BLOCK_SIZE, arrival=0.0)
        sink = Sink()
        entry = Entry(inner, Feed(inner, hold=hold, await_saves=await_saves), sink)  # type: ignore[arg-type]
        self.sinks[request.request_id] = (sink, request)
        self.entries[request.request_id] = entry
        if hold:
            self.held.add(request.request_id)
        push = push and not hold
        known, first = len(inner.token_ids), cut if push else 0
        self.known[request.request_id] = known
        numbers = range(first, -(-known // BLOCK_SIZE))
        target = PushTarget(lease=request.request_id, first_block=first, shards=(PushShard("", (), tuple(numbers)),))
        self.engine._admit(entry, target if push else None)

    @precondition(lambda self: self.sender.pushes)
    @rule(data=st.data(), good=st.booleans(), settles=st.booleans())
    def push_ends(self, data: st.DataObject, good: bool, settles: bool) -> None:
        """Whatever is read before a push settles is what it was given."""
        push = data.draw(st.sampled_from(self.sender.pushes))
        self.check_source(push)
        if not push.has_ended:
            push.has_ended = True
            push.end(good)
        if good or settles:
            self.sender.pushes.remove(push)
            push.settle()
        self.run_inbox()

    def check_source(self, push: ToyPush) -> None:
        for source, number in push.copies:
            entries = self.runner.entries[source][: self.known[push.lease] - number * BLOCK_SIZE]
            token_ids = push.sent.setdefault(number, list(entries))
            assert entries == token_ids, "a block was written while a push could read it"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        entry = self.entries[name]
        if name not in self.engine._entries or not entry.feed.looked_up or entry.feed.ready:
            return
        known = entry.feed.num_tokens
        answers: list[PushTarget | None] = []
        self.engine.reservations._patience_s = 0.0
        self.engine.reservations.reserve(entry.feed, answers.append)
        while not answers:
            self.step()
        if answers[0] is not None:
            self.leases[answers[0].lease] = (name, answers[0], known)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), what=st.sampled_from(["arrive", "stray", "settle", "fence"]), count=st.integers(1, 4))
    def lease_goes_on(self, data: st.DataObject, what: str, count: int) -> None:
        lease = data.draw(st.sampled_from(list(self.leases)))
        name, target, known = self.leases[lease]
        reservation = self.engine.reservations._by_lease[lease]
        if what == "arrive":
            whole = [*self.sinks[name][1].prompt_token_ids, *self.sinks[name][1].output_token_ids] if name in self.sinks else [0] * known
            for number in range(
                target.first_block, min(target.first_block + reservation.num_arrived + count, target.first_block + target.num_blocks)
            ):
                if number - target.first_block < reservation.num_arrived:
                    continue
                token_ids = whole[number * BLOCK_SIZE : min((number + 1) * BLOCK_SIZE, known)]
                block_id = target.shards[0].addresses[number - target.first_block]
                self.runner.entries[block_id][:] = token_ids + [777] * (BLOCK_SIZE - len(token_ids))
            if name in self.sinks:
                self.engine.reservations.arrived(lease, target.first_block + reservation.num_arrived + count)
        elif what == "stray":
            for address in target.shards[0].addresses[reservation.num_arrived :]:
                self.runner.entries[address][:] = [777] * BLOCK_SIZE
        elif what == "settle":
            del self.leases[lease]
            self.engine.reservations.settle(lease)
        else:
            self.leases.clear()
            self.receiver.advance()
            self.engine.reservations.end_old()
        self.flush()

    @rule()
    def step(self) -> None:
        self.run_inbox()
        self.engine.loader.tick(time.monotonic())
        self.engine.saver.tick(time.monotonic())
        self.engine._step()
        self.flush()

    @rule(data=st.data(), works=st.booleans())
    def tier_call_returns(self, data: st.DataObject, works: bool) -> None:
        data.draw(st.sampled_from(self.tiers)).answer_one(works)

    @rule(data=st.data(), block_s=st.sampled_from([0.0, 1e-5, 1000.0]), doubtful=st.booleans())
    def tier_is_so_fast(self, data: st.DataObject, block_s: float, doubtful: bool) -> None:
        tier = data.draw(st.sampled_from(self.tiers))
        tier.block_s, tier.doubtful = block_s, doubtful

    @rule(data=st.data(), key=st.integers(0, 99))
    def tier_loses_a_block(self, data: st.DataObject, key: int) -> None:
        blocks = data.draw(st.sampled_from(self.tiers)).pool
        if blocks:
            del blocks[sorted(blocks)[key % len(blocks)]]

    @rule()
    def budget_is_over(self) -> None:
        self.engine.loader.tick(time.monotonic() + BUDGET_S)
        self.engine.saver.tick(time.monotonic() + BUDGET_S)
        self.flush()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), what=st.sampled_from(["offer", "push", "release"]))
    def feed(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        entry, (sink, request) = self.entries[name], self.sinks[name]
        if name not in self.engine._entries:
            self.held.discard(name)
        elif what == "offer":
            for index, key in enumerate(entry.request.block_hashes):  # a prefill worker computed them
                known = entry.request.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
                self.transfer.pool[key.hex()] = tuple(known)
            self.engine.loader.offer(entry.feed, data.draw(st.integers(0, 9)))
        elif what == "push" and not sink.tokens:
            self.engine.push(entry, OutputToken(reference(request)[0]))
        elif what == "release":
            self.held.discard(name)
            self.engine.loader.release(entry.feed)
        self.flush()

    @precondition(lambda self: self.sinks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sinks)))
        entry = self.engine._entries.get(name)
        if entry is not None:
            self.engine.abort(entry)
            self.sinks.pop(name)
            self.held.discard(name)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine._check_integrity() == []

    @invariant()
    def outputs_are_right_so_far(self) -> None:
        for sink, request in getattr(self, "sinks", {}).values():
            assert sink.error is None
            assert sink.tokens == reference(request)[: len(sink.tokens)]

    def teardown(self) -> None:
        """Everything ends: no more faults, then nothing may be left."""
        if not hasattr(self, "engine"):
            return
        for name in list(self.held):
            if name in self.engine._entries:
                self.engine.loader.release(self.entries[name].feed)
        for lease in list(self.leases):
            self.engine.reservations.settle(lease)
        for _ in range(3000):
            while any([tier.answer_one(True) for tier in self.tiers]):  # noqa: C419
                pass
            while self.sender.pushes:
                push = self.sender.pushes.pop()
                self.check_source(push)
                if not push.has_ended:
                    push.end(True)
                push.settle()
            self.step()
            if not self.engine._entries and self.engine._inbox.empty():
                break
        assert not self.engine._entries, "requests that never end"
        while any([tier.answer_one(True) for tier in self.tiers]):  # noqa: C419 (saves that nobody waited for)
            self.run_inbox()
        self.run_inbox()
        assert not self.engine.pusher._shipments
        for sink, request in self.sinks.values():
            assert sink.finished
            assert sink.tokens == reference(request)
        pool = self.engine.scheduler.cache.pool
        assert self.engine._check_integrity() == []
        assert pool.num_free == pool.num_blocks

    def run_inbox(self) -> None:
        inbox = self.engine._inbox
        while not inbox.empty():
            action: Callable[[], None] | None = inbox.get_nowait()
            assert action is not None
            action()
        self.flush()

    def flush(self) -> None:
        outputs = self.engine._outputs
        queued, outputs._queued = outputs._queued, []
        for sink, output in queued:
            sink.deliver(output)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
