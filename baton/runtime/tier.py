"""A tier of KV behind the device, as the engine's thread sees it: one rank's (`kv.transfer`), or all ranks' together (`runtime.spread`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from baton.kv.store import Buffer


class Tier(Protocol):
    """`done` of each call is called exactly once, on any thread."""

    name: str
    shared: bool  # other workers can read it
    direct: bool  # is saved to from here

    @property
    def available(self) -> bool: ...  # it answers, as far as is known

    @property
    def doubtful(self) -> bool: ...  # it is asked, so that one notices when it is back, but not waited for

    def seconds(self, nbytes: int) -> float: ...

    def decline(self, num_blocks: int) -> None: ...

    def leave_out(self, num_blocks: int) -> None: ...

    def lookup(self, keys: Sequence[str], done: Callable[[list[bool]], None]) -> None: ...

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None: ...

    def flush(self, limit_s: float) -> None: ...

    def close(self) -> None: ...
