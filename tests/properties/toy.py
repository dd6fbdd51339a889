"""A deterministic model whose KV cache really matters: each token's entry is written into its slot, and the next token is a hash of all
entries that the block table leads to. A wrong block, a stale one or a lost one gives another token."""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence

from baton.kv.push import Door, PushResult, PushStatus
from baton.kv.store import Buffer
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.scheduling.request import PENDING
from baton.types import GenerateRequest, OutputToken, PushTarget

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
    """With a depth above 0, a step is computed as late as can be: when its result is asked for."""

    def __init__(self, num_blocks: int, depth: int = 0) -> None:
        self.entries: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.depth = depth
        self._drawn: dict[str, int] = {}  # by the step before

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        work = [(item, item.request.token_ids[item.start : item.end], item.block_ids[:]) for item in plan.scheduled]
        if not self.depth:
            result = self._compute(work)
            return lambda: result
        return lambda: self._compute(work)

    def _compute(self, work: Sequence[tuple[ScheduledRequest, list[int], list[int]]]) -> StepResult:
        tokens: dict[str, OutputToken] = {}
        for item, token_ids, block_ids in work:
            name = item.request.request_id
            for position, token_id in enumerate(token_ids, item.start):
                known = self._drawn[name] if token_id == PENDING else token_id
                self.entries[block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] = known
            if item.samples:
                seen = [self.entries[block_ids[p // BLOCK_SIZE]][p % BLOCK_SIZE] for p in range(item.end)]
                tokens[name] = OutputToken(next_token([-1 if entry is None else entry for entry in seen]))
        self._drawn = {name: token.token_id for name, token in tokens.items()}
        return StepResult(tokens)


class ToyTransfer:
    """A tier of blocks whose calls are answered when the test says so, right, wrong or late. `Buffer.address` is a block id."""

    direct = True
    available = True
    doubtful = False

    def __init__(self, runner: ToyRunner, pool: dict[str, tuple[int | None, ...]], name: str = "pool", *, shared: bool = True) -> None:
        self._runner, self.pool, self.name, self.shared = runner, pool, name, shared
        self.block_s = 0.0  # predicted
        self.num_declined = self.num_left_out = 0
        self._calls: queue.SimpleQueue[Callable[[bool], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def seconds(self, nbytes: int) -> float:
        return self.block_s * nbytes

    def decline(self, num_blocks: int) -> None:
        self.num_declined += num_blocks

    def leave_out(self, num_blocks: int) -> None:
        self.num_left_out += num_blocks

    def lookup(self, keys: Sequence[str], done: Callable[[list[bool]], None]) -> None:
        def answer(works: bool) -> None:
            done([works and key in self.pool for key in keys])

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

    def flush(self, limit_s: float) -> None:
        pass

    def close(self) -> None:
        while self.answer_one(False):
            pass


class ToyPush:
    """A push that was handed to the sender. Until it settles, it may read its source blocks at any moment."""

    def __init__(
        self, lease: str, copies: Sequence[tuple[int, int]], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        self.lease, self.copies, self.settle, self.has_ended, self._done = lease, copies, settled, False, done
        self.sent: dict[int, list[int | None]] = {}  # by block, as first seen

    def end(self, good: bool) -> None:
        self._done(PushResult(PushStatus.GOOD if good else PushStatus.UNKNOWN, 0, 0.0))


class ToySender:
    """Pushes that end and settle when the test says so. A target's address is the number of the block in the prompt."""

    def __init__(self) -> None:
        self.pushes: list[ToyPush] = []

    def push(
        self, target: PushTarget, first: int, block_ids: Sequence[int], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        addresses = target.shards[0].addresses[first : first + len(block_ids)]
        self.pushes.append(ToyPush(target.lease, list(zip(block_ids, addresses, strict=True)), done, settled))

    def close(self) -> None:
        pass


class ToyReceiver:
    """Addresses are block ids, unless it is told where they lie."""

    revocable = True

    def __init__(self, base: int = 0, block_bytes: int = 1) -> None:
        self.generation, self._base, self._bytes = 0, base, block_bytes

    @property
    def doors(self) -> tuple[Door, ...]:
        return (Door("here", (("tcp", f"session {self.generation}"),), self._base, self._bytes),)

    def advance(self) -> None:
        self.generation += 1

    def fence(self) -> None:
        pass

    def close(self) -> None:
        pass
