"""Holdings: which blocks a tier that is this worker's own holds, for the routers. The store's threads tell it of keys that come and go; the
engine's thread asks. Keys that are not this worker's (another model's, in the same directory) are left out."""

import threading
from collections.abc import Iterable

from baton.hashing import HASH_BYTES
from baton.scheduling.journal import Journal
from baton.types import BlocksStored, Digest, KVEvent, Tier


class Holdings:
    """Thread-safe. A store calls it under a lock of its own, or from one thread, so that changes come in their order."""

    def __init__(self, tier: Tier, prefix: str) -> None:
        """`prefix`: of this worker's keys; a block hash in hex follows."""
        self._prefix, self._tier = prefix, tier
        self._journal, self._held = Journal(tier), set[bytes]()
        self._lock = threading.Lock()

    def stored(self, *keys: str) -> None:
        with self._lock:
            new = self._hashes(keys) - self._held
            self._held |= new
            self._journal.stored(tuple(new))

    def removed(self, *keys: str) -> None:
        with self._lock:
            gone = self._hashes(keys) & self._held
            self._held -= gone
            self._journal.removed(tuple(gone))

    def replaced(self, keys: Iterable[str]) -> None:
        """These are there now, and no others."""
        with self._lock:
            now = self._hashes(keys)
            self._journal.removed(tuple(self._held - now))
            self._journal.stored(tuple(now - self._held))
            self._held = now

    def drain(self) -> tuple[list[KVEvent], Digest]:
        """What has changed since the last call, and the digest of what is there then."""
        with self._lock:
            return self._journal.drain(), self._journal.digest

    def snapshot(self) -> tuple[BlocksStored, Digest]:
        """All that is there. What was not drained yet is in it, and comes again, which changes nothing then."""
        with self._lock:
            return BlocksStored(tuple(self._held), self._tier), self._journal.digest

    def _hashes(self, keys: Iterable[str]) -> set[bytes]:
        start, end = len(self._prefix), len(self._prefix) + 2 * HASH_BYTES
        return {bytes.fromhex(key[start:]) for key in keys if len(key) == end and key.startswith(self._prefix)}
