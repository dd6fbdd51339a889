"""Backlog: what requests still have to compute here, for whoever is told of this worker's load. Of one that waits, tokens do not count that
it will find cached: those that are, and those that a request before it computes. One thread at a time calls it.
"""

from collections import Counter
from collections.abc import Iterable

from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request, RequestStatus
from baton.types import FinishReason


class Backlog:
    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._given: dict[Request, int] = {}  # tokens that it need not compute, of who has not got there yet
        self._blocks: dict[Request, list[bytes]] = {}  # that it computes
        self._coming = Counter[bytes]()

    def measure(self, requests: Iterable[Request]) -> tuple[int, int]:
        """Tokens to compute, and pairs of tokens, one of them not computed yet, that attend to each other. `requests`: all that are not
        computed elsewhere, in the order of their coming. A request's blocks are looked up once, or again where one that was to compute
        some of them has been cancelled."""
        tokens = pairs = 0
        requests = tuple(requests)
        self._drop_but({request for request in requests if request.num_tokens - request.num_computed_tokens > 1})
        for request in requests:
            known, computed = request.num_tokens, request.num_computed_tokens
            if known - computed > 1:
                given = self._given[request] if request in self._given else self._add(request)
                if request.status is not RequestStatus.RUNNING:
                    computed = max(computed, given)
            tokens += known - computed
            pairs += known * known - computed * computed
        return tokens, pairs // 2

    def _add(self, request: Request) -> int:
        hashes = request.block_hashes[: self._cache.num_matchable_blocks(request)]
        given = len(self._cache.pool.find(hashes))
        while given < len(hashes) and hashes[given] in self._coming:
            given += 1
        self._blocks[request] = hashes[given:]
        self._coming.update(self._blocks[request])
        self._given[request] = given * self._cache.block_size
        return self._given[request]

    def _drop_but(self, kept: set[Request]) -> None:
        left = self._given.keys() - kept
        if any(_given_up(request) for request in left):
            left = set(self._given)  # others may have counted on what it was to compute
        for request in left:
            del self._given[request]
            for key in self._blocks.pop(request):
                self._coming[key] -= 1
                if not self._coming[key]:
                    del self._coming[key]


def _given_up(request: Request) -> bool:
    """It may not have computed what it was to compute."""
    if request.finish_reason is None:  # it is about to be aborted, or has its prompt
        return request.num_tokens - request.num_computed_tokens > 1
    return request.finish_reason is FinishReason.ABORT
