"""InOrder: the copies of one push over NVLink, which Mooncake gives to a stream of the sender's device.

It makes a stream for each thread that hands copies over, and none of them belongs to an engine: that an engine ends, ends no copy. So what
was handed over is asked about until it has ended, however long that takes. (Read in its intranode_nvlink_transport.cpp.)
"""

from collections.abc import Sequence

from baton.kv.push import Copy
from baton.kv.transfer_engine import Engine

BATCH = 16  # copies handed to Mooncake together: the device copies while the next ones are handed over
_REFUSED = "the device refused a copy"
_ENDED = frozenset({1, -1})  # what `Engine.poll` says of a write that is over


class InOrder:
    """Of one thread, which alone may call it."""

    def __init__(self, engine: Engine, session: str) -> None:
        self._engine, self._session = engine, session
        self._open: list[tuple[int, bool]] = []  # in order: what Mooncake calls it, and whether it is a batch
        self.reason = ""
        """Why not everything went well, as far as it is known."""

    def hand_over(self, copies: Sequence[Copy]) -> None:
        """All but the last in batches, up to one that is refused."""
        end = len(copies) - 1
        parts = [copies[at : min(at + BATCH, end)] for at in range(0, end, BATCH)] + ([copies[end:]] if copies else [])
        for part in parts:
            if len(part) > 1:
                sources, targets, sizes = zip(*part, strict=True)
                number = self._engine.submit_batch(self._session, sources, targets, sizes)
            else:
                number = self._engine.submit(self._session, *part[0])
            if not number:
                self.reason = "Mooncake did not take a write"
                return
            self._open.append((number, len(part) > 1))

    def ended(self) -> bool:
        """Whether nothing of it is under way any more; says so at once. Mooncake asks for the whole stream: where a write has ended well,
        so has all that was handed over before it; one that failed was never begun, or the device is lost. Of a batch it asks for the first
        write alone, and then may or may not have forgotten it: so what was asked about to its end is never asked about again."""
        while self._open:
            number, _ = self._open[-1]
            code = self._engine.poll(number)
            if code not in _ENDED:
                return False
            self._open.pop()
            if code == 1:
                break
            self.reason = self.reason or _REFUSED
        before, self._open = self._open, []
        codes = [self._engine.poll(number) for number, is_batch in before if not is_batch]
        if not self._engine.ended_well([number for number, is_batch in before if is_batch]) or any(code != 1 for code in codes):
            self.reason = self.reason or _REFUSED
        return True
