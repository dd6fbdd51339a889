"""What a worker's gRPC side asks of an engine. Torch-free: `runtime.engine.Engine` is one, tests may bring another."""

from collections.abc import AsyncIterator
from typing import Protocol

from baton.types import GenerateOutput, GenerateRequest, LeaseEnd, Load, OutputToken, PushTarget, StateUpdate


class Sequence(Protocol):
    """One submitted request. All methods belong to the event loop; none blocks.

    Life: submitted → matched (own prefix cache and KV pool looked up) → [held: a prefill worker feeds it] → released → computed → finished.
    Iterating gives outputs until the one with a finish reason; a failure of the engine raises. `close` at any moment ends it and
    frees its blocks within one step; who still iterates gets finish reason ABORT. It is idempotent.
    """

    async def matched(self) -> tuple[int, int]:
        """Prompt tokens found (in the own prefix cache, and beyond them in the KV pool)."""
        ...

    def offer_blocks(self, num_blocks: int) -> None:
        """The KV pool now holds the first `num_blocks` full blocks of the prompt: they get loaded as they appear."""
        ...

    async def reserve(self, beyond: int = 0) -> PushTarget | None:
        """Reserves this worker's blocks for what is neither here nor in the pool, once that is known; None where that can't be, or is no
        more than `beyond` tokens. The lease outlives the sequence: it ends with `Leases.settle` or `Leases.fence`, and one of them must
        follow."""
        ...

    def blocks_pushed(self, lease: str, num_blocks: int, sums: tuple[int, ...] = ()) -> None:
        """The first `num_blocks` blocks of the prompt have been written into what was reserved; the last of them may be half full. `sums`:
        what they should be, with push.verify."""
        ...

    def push_token(self, token: OutputToken) -> None:
        """The next output token, sampled by a prefill worker, of a request that is held; it is emitted like one sampled here."""
        ...

    def release(self) -> None:
        """No more offers will come: what is missing gets computed here. Idempotent."""
        ...

    def __aiter__(self) -> AsyncIterator[GenerateOutput]: ...

    def close(self) -> None: ...


class Leases(Protocol):
    """Of memory that another worker writes into (docs/transfer.md)."""

    async def settled(self, lease: str) -> LeaseEnd:
        """Ends a push target's lease on the sending side, and waits until all that was sent under it has ended."""
        ...

    async def reserved(self, lease: str) -> bool:
        """Whether a lease on the receiving side still has blocks, and sessions that no fence has ended."""
        ...

    def settle(self, lease: str) -> None:
        """Ends a lease on the receiving side: nothing of it is written any more. Idempotent."""
        ...

    @property
    def revocable(self) -> bool:
        """Whether a fence alone ends every write. Else (NVLink) the sender must have said that it has ended, or be gone, too."""
        ...

    async def fence(self, grace_s: float) -> None:
        """Ends, by force, all writes that can be ended from here, for when nobody can say that a lease is over; others have `grace_s` to
        end well. No lease that there was is `reserved` then: where that was all of them they are settled, else they wait for `settle`. One
        that has failed goes on where it was when it is called again, and ends nothing that began since."""
        ...


class Engine(Protocol):
    @property
    def leases(self) -> Leases: ...

    def start(self) -> None:
        """Once, on the event loop that will use it."""
        ...

    def submit(
        self, request: GenerateRequest, *, hold: bool = False, await_saves: bool = False, push: PushTarget | None = None
    ) -> Sequence:
        """Takes a request. With `hold` it waits for `release` after its lookups. With `await_saves` every full block of the prompt that
        the KV pool lacks is saved there, cached ones too, and the output with the finish reason comes when those saves have ended (the
        tokens come at once). With `push` the KV of all tokens that were sent is written there, and the end likewise waits for that.
        Raises InvalidRequest (also PromptTooLong) or Overloaded at once."""
        ...

    def watch(self) -> AsyncIterator[StateUpdate]:
        """State updates: a snapshot, then changes as steps end, at least one a second. A reader that falls behind gets a new snapshot."""
        ...

    @property
    def load(self) -> Load: ...

    @property
    def turns(self) -> int:
        """Grows at least once a second, unless the engine is in a step."""
        ...

    @property
    def stopped(self) -> bool:
        """Its thread has ended, as it was told; what is queued may be saved yet."""
        ...

    async def check_integrity(self) -> list[str]:
        """Problems found in the block bookkeeping; empty when every block is accounted for."""
        ...

    async def stop(self, flush_s: float = 0.0) -> None:
        """Ends every sequence with an error, then the engine's thread. What is on its way to tiers by then is saved, as far as that takes
        no longer than `flush_s`. Idempotent."""
        ...
