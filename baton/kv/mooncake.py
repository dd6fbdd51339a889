"""MooncakeStore: the KV pool, run by Mooncake. The only importer of `mooncake`, and where its habits are dealt with (docs/kvstore.md).

Connects at the first call, so a worker starts and serves before the pool exists. Mooncake's client comes back by itself after a restart of
the master. Every value is written from and read into registered memory, without a copy.
"""

import logging
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from baton.errors import ConfigError, StoreError
from baton.kv.store import Buffer

logger = logging.getLogger(__name__)

# Read by Mooncake's C++ when it is loaded.
_ENVIRONMENT = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",  # a stopped peer: give up after 2 s (30 by default) and close the socket, so nothing lands late
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_STORE_MEMCPY": "1",
    "GLOG_minloglevel": "3",  # its warnings repeat each failed call; the adapter reports failures itself
    "MC_LOG_LEVEL": "ERROR",
}

NO_SPACE = -200  # the pool is full; eviction runs behind
MISSING = -704
TRANSFER_FAILED = -800  # a node that holds the value does not answer
RPC_FAILED = -900  # the master does not answer


class MooncakeStore:
    def __init__(
        self, master: str, *, host: str, protocol: str = "tcp", devices: str = "", local_buffer: int = 16 * 2**20, segment: int = 0
    ) -> None:
        """`master` is host:port of mooncake_master; `host` is where other clients reach this process; `segment` bytes are lent to the
        pool. Raises ConfigError if Mooncake is not installed."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if protocol == "rdma":
            os.environ.setdefault("MC_FORCE_HCA", "1")  # without an RDMA device: an error, instead of TCP in silence
        else:
            os.environ.setdefault("MC_FORCE_TCP", "1")
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise ConfigError(
                f"Mooncake cannot be loaded ({error}); install baton[mooncake], and on Debian libibverbs1 libnuma1 libcurl4, "
                "or leave pool.master empty to run without a pool"
            ) from error
        self._make: Any = MooncakeDistributedStore
        self._setup = (host, "P2PHANDSHAKE", segment, local_buffer, protocol, devices, master)
        self._store: Any = None
        self._regions: list[Buffer] = []
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Mounts the segment, if any, and registers what was asked for. Idempotent. Raises StoreError."""
        with self._lock:
            if self._store is not None:
                return
            self._probe()
            store = self._make()
            code = store.setup(*self._setup)
            if code != 0:
                store.close()
                raise StoreError(f"mooncake_master at {self._setup[-1]} cannot be joined (code {code})")
            for region in self._regions:
                self._register(store, region)
            self._store = store

    def register(self, region: Buffer) -> None:
        with self._lock:
            self._regions.append(region)
            if self._store is not None:
                self._register(self._store, region)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [code == 1 for code in self._call("batch_is_exist", list(keys))]

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        codes = self._call("batch_get_into", list(keys), *_split(buffers))
        return [code == buffer.nbytes for code, buffer in zip(codes, buffers, strict=True)]

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        return [code == 0 for code in self._call("batch_put_from", list(keys), *_split(buffers))]

    def remove(self, prefix: str) -> int:
        """Removes every key that starts with `prefix`, leased ones too; returns how many."""
        self.connect()
        count: int = self._store.remove_by_regex("^" + prefix.replace("/", "\\/") + ".*", True) if prefix else self._store.remove_all(True)
        if count < 0:
            raise StoreError(f"the pool refused to remove keys (code {count})")
        return count

    @property
    def segment_name(self) -> str:
        """What the master calls this process's segment."""
        self.connect()
        return str(self._store.get_hostname())

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _call(self, method: str, *arguments: object) -> list[int]:
        self.connect()
        codes: list[int] = getattr(self._store, method)(*arguments)
        if RPC_FAILED in codes:
            raise StoreError("mooncake_master does not answer")
        if codes and all(code == TRANSFER_FAILED for code in codes):
            raise StoreError("the pool's nodes do not answer")
        return codes

    def _probe(self) -> None:
        """Mooncake's own set-up tries for 90 s when there is no master; nobody waits for that here."""
        master = self._setup[-1]
        host, _, port = master.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except (OSError, ValueError) as error:
            raise StoreError(f"no mooncake_master at {master} ({error})") from error

    def _register(self, store: Any, region: Buffer) -> None:
        code = store.register_buffer(region.address, region.nbytes)
        if code != 0:
            raise StoreError(f"{region.nbytes} bytes cannot be registered for transfers (code {code}); with RDMA, check ulimit -l")


def _split(buffers: Sequence[Buffer]) -> tuple[list[int], list[int]]:
    return [buffer.address for buffer in buffers], [buffer.nbytes for buffer in buffers]
