"""KVCache: which blocks a request holds, and which of its tokens need no computing because their blocks are cached.

    blocks of a request:   | matched (shared, full) | computed here (own) | next |
    tokens:                  0 ...                                     num_tokens

The last known token is never matched (`hashing.num_matchable_blocks`). Blocks that were loaded ahead for a request that is not scheduled
yet are *pinned* under its id, and so is the last block of a prompt that was pushed here, half full: its *tail*. Pins are broken, newest
first, when somebody running needs the memory.
Knows nothing of where loaded blocks come from. Only the engine's thread calls it.
"""

from collections.abc import Sequence

from baton.hashing import block_hashes, num_matchable_blocks
from baton.scheduling.blocks import BlockPool
from baton.scheduling.request import Request


class KVCache:
    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._pins: dict[str, list[int]] = {}
        self._tails: dict[str, tuple[int, int]] = {}  # block, and the number of known tokens whose end it holds

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_matchable_blocks(self, request: Request) -> int:
        """Leading full blocks that a match may use. A request for prompt logprobs must compute every position, so it matches none."""
        if not self.prefix_caching or request.sampling.prompt_logprobs is not None:
            return 0
        return num_matchable_blocks(request.num_tokens, self.block_size)

    def match(self, request: Request) -> list[int]:
        """Cached blocks of the longest prefix. Takes no reference."""
        return self.pool.find(request.block_hashes[: self.num_matchable_blocks(request)])

    def admit(self, request: Request, num_new_tokens: int) -> bool:
        """Gives a waiting request its cached prefix and blocks for at least one and at most `num_new_tokens` tokens more.

        False where memory does not allow it; then only the cached prefix stays pinned.
        """
        matched, size = self.match(request), self.block_size
        tail, known = self._tails.pop(request.request_id, (-1, 0))
        if tail >= 0 and not (len(matched) == known // size and request.num_tokens > known):
            self.pool.release([tail])
            tail = -1
        held = [*matched, tail] if tail >= 0 else matched
        start = known if tail >= 0 else len(matched) * size
        wanted = self.blocks_for(min(start + num_new_tokens, request.num_tokens)) - len(held)
        self.pool.reuse(matched)
        self.unpin(request.request_id)  # what it pinned and cannot match (another's copy won) must not keep it out
        if not self._make_room(wanted):
            self.pin(request.request_id, matched)
            if tail >= 0:
                self._tails[request.request_id] = (tail, known)
            return False
        request.block_ids = held + self.pool.take(wanted)
        request.num_computed_tokens = start
        return True

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens of a running request. False, with nothing taken, where there are too few."""
        wanted = self.blocks_for(num_tokens) - len(request.block_ids)
        if wanted > 0:
            if not self._make_room(wanted):
                return False
            request.block_ids += self.pool.take(wanted)
        return True

    def keep(self, request: Request, num_tokens: int) -> None:
        """Takes back the blocks beyond a request's first tokens, which are all that it has computed."""
        count = self.blocks_for(num_tokens)
        self.pool.release(request.block_ids[count:])
        request.block_ids, request.num_computed_tokens = request.block_ids[:count], num_tokens

    def register(self, request: Request, start: int, end: int) -> None:
        """Makes the blocks that became full by computing tokens start … end findable."""
        first, last = start // self.block_size, end // self.block_size
        if last > len(request.block_hashes):
            known = request.token_ids[: last * self.block_size]
            request.block_hashes = block_hashes(known, self.block_size, request.salt, known=request.block_hashes)
        if self.prefix_caching and last > first:
            self.pool.register(request.block_ids[first:last], request.block_hashes[first:last])

    def free(self, request: Request) -> None:
        """Takes everything back; what is cached stays findable. Idempotent."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        self.unpin(request.request_id)

    def pin(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Hands the caller's references on these blocks over to a pin."""
        self._pins.setdefault(request_id, []).extend(block_ids)

    def give_tail(self, request_id: str, block_id: int, num_tokens: int) -> None:
        """Hands over the caller's reference on the block that holds the end of the request's first `num_tokens` tokens. It is not full, so
        no hash names it; with all blocks before it cached, those tokens need no computing."""
        if request_id in self._tails:
            self.pool.release([block_id])
        else:
            self._tails[request_id] = (block_id, num_tokens)

    def unpin(self, request_id: str) -> None:
        """Gives up what the request holds without being scheduled."""
        self.pool.release(self._pins.pop(request_id, []))
        if request_id in self._tails:
            self.pool.release([self._tails.pop(request_id)[0]])

    def pinned(self) -> list[list[int]]:
        return [*self._pins.values(), *([block_id] for block_id, _ in self._tails.values())]

    def _make_room(self, count: int) -> bool:
        """Breaks pins as far as needed; none where even all of them are too few."""
        missing = count - self.pool.num_free
        if missing <= 0:
            return True
        pinned = self.pinned()
        if sum(map(len, pinned)) < missing or self.pool.num_held_by(pinned) < missing:
            return False
        for request_id in [*reversed(self._pins), *reversed(self._tails)]:
            if self.pool.num_free >= count:
                break
            self.unpin(request_id)
        return self.pool.num_free >= count
