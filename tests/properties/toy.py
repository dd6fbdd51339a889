"""A deterministic model whose KV cache really matters: each token's entry is written into its slot, and the next token is a hash of all
entries that the block table leads to. A wrong block, a stale one or a lost one gives another token."""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence

from baton.kv.store import Buffer
from baton.scheduling.plan import StepPlan, StepResult
from baton.types import GenerateRequest, OutputToken

VOCAB = 50
BLOCK_SIZE = 4


def next_token(token_ids: Sequence[int]) -> int:
    return hashlib.sha256(repr(list(token_ids)).encode()).digest()[0] % VOCAB


def reference(request: GenerateRequest) -> list[int]:
    """What the request must give, whatever happens around it."""
    known = [*request.prompt_token_ids, *request.output_token_ids]
    while len(known) - len(request.prompt_token_ids) < request.sampling.max_tokens:
        known.append(next_token(known))
    return known[len(request.prompt_token_ids) + len(request.output_token_ids) :]


class ToyRunner:
    def __init__(self, num_blocks: int) -> None:
        self.entries: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]

    def execute(self, plan: StepPlan) -> StepResult:
        tokens = {}
        for item in plan.scheduled:
            request, end = item.request, item.start + item.num_new_tokens
            for position in range(item.start, end):
                self.entries[request.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] = request.token_ids[position]
            if item.samples:
                seen = [self.entries[request.block_ids[p // BLOCK_SIZE]][p % BLOCK_SIZE] for p in range(end)]
                tokens[request.request_id] = OutputToken(next_token([-1 if entry is None else entry for entry in seen]))
        return StepResult(tokens)


class ToyTransfer:
    """A pool of blocks whose calls are answered when the test says so, right, wrong or late. `Buffer.address` is a block id."""

    def __init__(self, runner: ToyRunner, pool: dict[str, tuple[int | None, ...]]) -> None:
        self._runner, self.pool = runner, pool
        self._calls: queue.SimpleQueue[Callable[[bool], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def lookup(self, keys: Sequence[str], done: Callable[[int], None]) -> None:
        def answer(works: bool) -> None:
            found = [key in self.pool for key in keys]
            done((found.index(False) if False in found else len(found)) if works else 0)

        self._calls.put(answer)

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        def answer(works: bool) -> None:
            found = []
            for key, buffer in zip(keys, buffers, strict=True):
                value = self.pool.get(key) if works else None
                if value is None:  # a call that fails may have written half
                    self._runner.entries[buffer.address][0] = 777
                else:
                    self._runner.entries[buffer.address][:] = value
                found.append(value is not None)
            done(found)

        self._calls.put(answer)

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        def answer(works: bool) -> None:
            if works:
                self.pool.update((key, tuple(self._runner.entries[b.address])) for key, b in zip(keys, buffers, strict=True))
            done([works] * len(keys))

        self._calls.put(answer)

    def answer_one(self, works: bool) -> bool:
        """Lets the oldest call return; False if there is none."""
        try:
            self._calls.get_nowait()(works)
        except queue.Empty:
            return False
        return True

    def close(self) -> None:
        while self.answer_one(False):
            pass
