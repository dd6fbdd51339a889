"""Random life around an engine: requests come, are held, fed, cancelled; blocks are short; pool calls return right, wrong, late or never.
Whatever happens, outputs are those of the reference, blocks are accounted for, and everything ends."""

import threading
import time
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.kv.store import Buffer
from baton.runtime.engine import Engine, Entry
from baton.runtime.loading import Feed
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request
from baton.scheduling.scheduler import Scheduler
from baton.types import GenerateOutput, GenerateRequest, OutputToken, SamplingParams
from tests.properties.toy import BLOCK_SIZE, VOCAB, ToyRunner, ToyTransfer, reference

PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=26)  # few different tokens: prefixes meet
BUDGET_S = 0.05


class Sink:
    """Stands where the event loop's half of a request is."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finished = False
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
        num_blocks=st.integers(9, 20), budget=st.integers(1, 30), seqs=st.integers(1, 4), caching=st.booleans(), depth=st.integers(0, 1)
    )
    def start(self, num_blocks: int, budget: int, seqs: int, caching: bool, depth: int) -> None:
        self.runner = ToyRunner(num_blocks, depth)
        self.transfer = ToyTransfer(self.runner, {})
        self.engine = Engine(
            Scheduler(KVCache(num_blocks, BLOCK_SIZE, prefix_caching=caching), max_num_batched_tokens=budget, max_num_seqs=seqs),
            self.runner,
            self.transfer,
            key=bytes.hex,
            buffer=lambda block_id: Buffer(block_id, 1),
            limits=Limits(vocab_size=VOCAB, max_model_len=num_blocks * BLOCK_SIZE),
            eos_token_ids=frozenset(),
            budget_s=BUDGET_S,
        )
        self.sinks: dict[str, tuple[Sink, GenerateRequest]] = {}
        self.entries: dict[str, Entry] = {}
        self.held: set[str] = set()
        self.count = 0
        assert threading.current_thread() is threading.main_thread()

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 8), cut=st.integers(0, 3), hold=st.booleans(), await_saves=st.booleans())
    def submit(self, prompt: list[int], max_tokens: int, cut: int, hold: bool, await_saves: bool) -> None:
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
        self.engine._admit(entry)

    @rule()
    def step(self) -> None:
        self.run_inbox()
        self.engine.loader.tick(time.monotonic())
        self.engine._step()
        self.flush()

    @rule(works=st.booleans())
    def pool_call_returns(self, works: bool) -> None:
        self.transfer.answer_one(works)

    @rule()
    def budget_is_over(self) -> None:
        self.engine.loader.tick(time.monotonic() + 1)
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
        for _ in range(3000):
            while self.transfer.answer_one(True):
                pass
            self.step()
            if not self.engine._entries and self.engine._inbox.empty():
                break
        assert not self.engine._entries, "requests that never end"
        while self.transfer.answer_one(True):  # saves that nobody waited for
            self.run_inbox()
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
        outbox, self.engine._outbox = self.engine._outbox, []
        for sink, output in outbox:
            sink.deliver(output)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
