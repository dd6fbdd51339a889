"""MooncakeStore: the KV pool, run by Mooncake. The only importer of `mooncake`, and where its habits are dealt with (docs/kvstore.md).

Connects at the first call, so a worker starts and serves before the pool exists. Mooncake's client comes back by itself after a restart of
the master. Every value is written from and read into registered memory, without a copy; or read from the memory of a node on this machine,
where that is mapped (`kv.neighbours`). Behind each block stands its seal (`kv.seals`): a node's memory has no fence against late writes.
"""

import base64
import contextlib
import ctypes
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from baton.errors import ConfigError, StoreError
from baton.kv.neighbours import Neighbours, Place
from baton.kv.seals import SEAL_BYTES, Seals, seal
from baton.kv.store import SUMS, Buffer, Summing
from baton.kv.transfer import TransferStats

logger = logging.getLogger(__name__)

# Blocks of one call over TCP. They all get a connection at once, so a node that is stopped costs a call one time-out; further ones would
# queue behind them and wait in turn (64 blocks over 4 connections took 31 s), at last longer than Mooncake waits for them.
WAVE = 16
_LARGE_WAVE = 1024  # of one call over RDMA

# Read by Mooncake's C++ when a client is made.
_ENVIRONMENT = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",  # a stopped peer: give up after 2 s (30 by default) and close the socket, so nothing lands late
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_LANES_PER_PEER": str(WAVE),
    "MC_RPC_TIMEOUT_MS": "2000",  # a stopped master: 30 s by default
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",  # a node that is gone, whose disk is asked: three times 30 s by default
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",  # it would try 20 ports for 22 s, whatever is wrong; the next call tries again here
    "MC_STORE_MEMCPY": "1",
    "MC_LOG_LEVEL": "ERROR",
}
_GLOG_LEVEL = "_ZN3fLI17FLAGS_minloglevelE"
_GLOG_FATAL = 3

TRANSFER_FAILED = -800  # the node that holds the value, or shall, does not answer
NO_SPACE = -200  # said at once; eviction begins then
MASTER_AWAY = frozenset({-900, -901})  # the master does not answer, or not in time; of a read: or the node, asked for what is on its disk
_NOT_TRIED = -1
_OTHER_CONTENT = -2  # ours
_READ, _WRITE = "batch_get_into_multi_buffers", "batch_put_from_multi_buffers"
LEASE_S = 5  # that a key which was looked up or read is not evicted for: longer than any call takes; the master is told
_SILENT_S = 1.0  # a call that took longer and says nothing of any key was not answered
_ROOM_S = 0.05  # that eviction takes
_ETCD = "etcd://"
_LEFT: list[Any] = []  # clients whose end would take too long


@dataclass(frozen=True, slots=True)
class Spill:
    """A directory where a node's blocks are written, too."""

    path: str
    nbytes: int  # at most
    buffer: int  # bytes of memory through which others read them

    def environment(self) -> dict[str, str]:
        """Read by Mooncake's C++ when a client is made. A file for each block: blocks of a larger bucket that is not full yet are not
        written, and lost when memory forgets them."""
        return {
            "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "bucket_storage_backend",
            "MOONCAKE_OFFLOAD_BUCKET_KEYS_LIMIT": "1",
            "MOONCAKE_OFFLOAD_BUCKET_MAX_TOTAL_SIZE": str(self.nbytes),
            "MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES": str(self.nbytes),
            "MOONCAKE_OFFLOAD_BUCKET_EVICTION_POLICY": "lru",
            "MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES": str(self.buffer),
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",  # what is written waits for so long
        }


def leader(endpoints: str, cluster: str) -> str:
    """host:port of the mooncake_master that leads, as it has written to etcd. Raises StoreError."""
    key = base64.b64encode(f"mooncake-store/{cluster}/master_view".encode()).decode()
    problem = "none leads"
    for endpoint in endpoints.split(";"):
        try:
            answer = httpx.post(f"http://{endpoint}/v3/kv/range", json={"key": key}, timeout=1.0).raise_for_status().json()
            if answer.get("kvs"):
                return base64.b64decode(answer["kvs"][0]["value"]).decode()
        except (httpx.HTTPError, ValueError) as error:
            problem = f"etcd at {endpoint}: {error!r}"
    raise StoreError(f"no mooncake_master of {cluster} is known ({problem})")


class MooncakeStore:
    def __init__(
        self,
        master: str,
        *,
        host: str,
        cluster: str = "",
        protocol: str = "tcp",
        devices: str = "",
        local_buffer: int = 16 * 2**20,
        segment: int = 0,
        segment_path: str = "",
        spill: Spill | None = None,
        near: Neighbours | None = None,
        summing: Summing | None = None,
    ) -> None:
        """`master` is host:port of mooncake_master, or etcd://host:port;host:port, where the leading one of `cluster` is found; `host` is
        where other clients reach this process; `segment` bytes are lent to the pool, of the file `segment_path`, if given, and what is
        saved there goes to `spill` as well, if given. What lies on this machine is read by way of `near`, if given. `summing`: takes the
        checksums of blocks, on a device, say; all workers of a pool that shall read each other's blocks alike. Raises ConfigError if
        Mooncake is not installed.

        `get` and `put` are for one thread each."""
        if master.startswith(_ETCD):
            os.environ["MC_STORE_CLUSTER_ID"] = cluster
        self._chatty = "MC_LOG_LEVEL" in os.environ
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if protocol == "rdma":
            os.environ.pop("MC_FORCE_TCP", None)  # inherited from a process that uses TCP, it would win
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
        self._setup = (host, "P2PHANDSHAKE", 0 if segment_path else segment, local_buffer, protocol, devices, master)
        self._options = {"enable_ssd_offload": True, "ssd_offload_path": spill.path} if spill is not None else {}
        os.environ.update(spill.environment() if spill is not None else {})
        self._segment = (segment_path, segment, 0, protocol) if segment_path else None
        self._near = near
        self.stats = TransferStats()
        self._master, self._cluster, self._protocol = master, cluster, protocol
        self._wave = WAVE if protocol == "tcp" else _LARGE_WAVE  # keys of one call
        self._store: Any = None
        self._closed = False
        self._summing = summing or Summing()
        self._seals = {method: Seals(self._wave) for method in (_READ, _WRITE)}
        self._regions: list[Buffer] = [seals.region for seals in self._seals.values()]
        self._taken: dict[int, tuple[str, int]] = {}  # by a block's address: key and checksum of what is to be saved from there
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Mounts the segment, if any, and registers what was asked for. Idempotent. Raises StoreError."""
        with self._lock:
            if self._store is not None:
                return
            if self._closed:
                raise StoreError("the pool was closed")
            self._probe()
            store = self._make()
            try:
                code = store.setup(*self._setup, **self._options)
                if code != 0:
                    hint = "; is there an RDMA device (pool.devices)?" if self._protocol == "rdma" else ""
                    raise StoreError(f"mooncake_master at {self._master} cannot be joined over {self._protocol} (code {code}){hint}")
                for region in self._regions:
                    self._register(store, region)
                if self._segment is not None and (code := store.mount_segment(*self._segment)["ret"]) != 0:
                    raise StoreError(
                        f"{self._segment[1]} bytes of shared memory cannot be lent (code {code}); pool.near='' lends Mooncake's own"
                    )
            except Exception:
                store.close()
                raise
            self._store = store
            if not self._chatty:
                self._silence()
            if self._near is not None:
                self._near.meet()  # before the first read, by which the pool's speed is judged

    def register(self, region: Buffer) -> None:
        with self._lock:
            self._regions.append(region)
            if self._store is not None:
                self._register(self._store, region)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        if self._near is not None:
            self._near.meet()
        return [code == 1 for code in self._call("batch_is_exist", [self._object(key) for key in keys])]

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Which keys workers of any kind could read. Raises StoreError."""
        codes = self._call("batch_is_exist", [_object(key, kind) for key in keys for kind in SUMS])
        return [1 in codes[i : i + len(SUMS)] for i in range(0, len(codes), len(SUMS))]

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        found = self._get_near(keys, buffers) if self._near is not None and self._near.meet() else {}
        rest = [i for i in range(len(keys)) if i not in found]
        try:
            codes = self._transfer(_READ, [keys[i] for i in rest], [buffers[i] for i in rest])
        except StoreError:
            if not any(found.values()):
                raise
            codes = [TRANSFER_FAILED] * len(rest)
        found |= {i: code == buffers[i].nbytes for i, code in zip(rest, codes, strict=True)}
        return [found[i] for i in range(len(keys))]

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        codes = self._transfer(_WRITE, keys, buffers)
        if full := [i for i, code in enumerate(codes) if code == NO_SPACE]:
            time.sleep(_ROOM_S)
            again = self._transfer(_WRITE, [keys[i] for i in full], [buffers[i] for i in full])
            codes = [again[full.index(i)] if i in full else code for i, code in enumerate(codes)]
        for buffer in buffers:
            self._taken.pop(buffer.address, None)
        return [code == 0 for code in codes]

    def take(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> None:
        """Before `put`, when the blocks hold what was computed: they are sealed with the checksums of now, so what is written there until
        they are put is found out. Without this, `put` takes them."""
        sums = self._summing.sums(buffers)
        self._taken.update((buffer.address, (key, each)) for key, buffer, each in zip(keys, buffers, sums, strict=True))

    def remove(self, prefix: str) -> int:
        """Removes every key that starts with `prefix`, leased ones too; returns how many."""
        self.connect()
        pattern = f"^{re.escape(prefix)}.*"
        count: int = self._store.remove_by_regex(pattern, True) if prefix else self._store.remove_all(True)
        if count < 0:
            raise StoreError(f"the pool refused to remove keys (code {count})")
        return count

    @property
    def segment_name(self) -> str:
        """What the master calls this process's segment."""
        self.connect()
        return str(self._store.get_hostname())

    def release_disk(self) -> bool:
        """Has the master let go of the disk of `spill`, before `close`. False where it did not, or never had it."""
        with self._lock:
            return self._store is not None and bool(self._options) and self._store.unmount_local_disk_segment() == 0

    def close(self) -> None:
        """Leaves the pool for good. Takes seconds where the master does not answer. Idempotent. With several masters Mooncake would take
        30 s, holding the interpreter, so nothing is done: the process is about to end (`hosting.process`), and the master notices."""
        with self._lock:
            self._closed = True
            if self._master.startswith(_ETCD):
                _LEFT.append(self._store)
            elif self._store is not None:
                self._store.close()
            self._store = None
        if self._near is not None:
            self._near.close()

    def _get_near(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> dict[int, bool]:
        """Of the blocks that were copied from a node's memory on this machine: whether it is they. To ask where a key lies leases it, so it
        is not evicted meanwhile; afterwards the pool is asked again whether it lies there, for a new master and who removes by force know
        no lease."""
        assert self._near is not None
        names, asked = [self._object(key) for key in keys], time.monotonic()
        replicas = self._replicas(names)
        with self._near.held():
            near: dict[int, tuple[Place, Buffer]] = {}
            for i, (name, buffer) in enumerate(zip(names, buffers, strict=True)):
                size = buffer.nbytes + SEAL_BYTES
                if (found := self._near.find(_places(replicas.get(name, ()), size), size)) is not None:
                    near[i] = found
            sources = [Buffer(there.address, buffers[i].nbytes) for i, (_, there) in near.items()]
            self._near.memory.copy([buffers[i] for i in near], sources)
            seals = {i: ctypes.string_at(there.address + buffers[i].nbytes, SEAL_BYTES) for i, (_, there) in near.items()}
        still = self._replicas([names[i] for i in near]) if near else {}
        if time.monotonic() - asked > LEASE_S:
            return {}
        kept = [i for i, (place, _) in near.items() if place in _places(still.get(names[i], ()), buffers[i].nbytes + SEAL_BYTES)]
        intact = self._intact([keys[i] for i in kept], [buffers[i] for i in kept], [seals[i] for i in kept])
        self.stats.blocks_near += sum(intact)
        return {i: True for i, good in zip(kept, intact, strict=True) if good}

    def _replicas(self, names: list[str]) -> dict[str, Sequence[Any]]:
        """As Mooncake describes them; of what the pool has. Leases it."""
        self.connect()
        asked = time.monotonic()
        replicas: dict[str, Sequence[Any]] = self._store.batch_get_replica_desc(names)
        if not replicas and time.monotonic() - asked > _SILENT_S:
            raise StoreError("mooncake_master does not answer")
        return replicas

    def _object(self, key: str) -> str:
        return _object(key, self._summing.name)

    def _intact(self, keys: Sequence[str], buffers: Sequence[Buffer], seals: Sequence[bytes]) -> list[bool]:
        """Whether blocks that were read are what was saved."""
        sums = self._summing.sums(buffers)
        self.stats.blocks_verified += len(keys)
        return [seal(key, each) == found for key, each, found in zip(keys, sums, seals, strict=True)]

    def _corrupt(self, key: str) -> None:
        """Its object is removed: else nobody could save it again."""
        self.stats.blocks_corrupt += 1
        removed = self._store.remove(self._object(key), True) == 0
        logger.critical(
            "block %s came from the KV pool with another content than it was saved with; it is not used%s",
            key, " and was removed" if removed else "",
        )  # fmt: skip

    def _transfer(self, method: str, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        """A batch call's codes. After a wave in which a node did not answer nothing more is tried: it would wait for that node again."""
        codes: list[int] = []
        for start in range(0, len(keys), self._wave):
            wave = slice(start, start + self._wave)
            codes += self._move(method, keys[wave], buffers[wave])
            if TRANSFER_FAILED in codes:
                break
        if codes and all(code == TRANSFER_FAILED for code in codes):
            raise StoreError("the pool's nodes do not answer")
        return codes + [_NOT_TRIED] * (len(keys) - len(codes))

    def _move(self, method: str, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        """One wave. Of what was read: a block's bytes, if it is what was saved."""
        if method == _WRITE:
            self._seals[method].set(map(seal, keys, self._sums(keys, buffers)))
            return self._with_seals(method, keys, buffers)
        codes = self._read(keys, buffers)
        if differ := [i for i, code in enumerate(codes) if code == _OTHER_CONTENT]:
            again = self._read_again([keys[i] for i in differ], [buffers[i] for i in differ])
            for i, code in zip(differ, again, strict=True):
                codes[i] = code
        return codes

    def _read(self, keys: Sequence[str], buffers: Sequence[Buffer], *, settle: bool = False) -> list[int]:
        codes, seals = self._with_seals(_READ, keys, buffers), self._seals[_READ]
        if settle:
            self._summing.settle()
        here = [i for i, (code, buffer) in enumerate(zip(codes, buffers, strict=True)) if code == buffer.nbytes + SEAL_BYTES]
        intact = self._intact([keys[i] for i in here], [buffers[i] for i in here], [seals.get(i) for i in here])
        for i, good in zip(here, intact, strict=True):
            codes[i] = buffers[i].nbytes if good else _OTHER_CONTENT
        return codes

    def _read_again(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        """What differed. Who removes by force frees a place at once, so it may have been another's before it was read: then it is gone by
        now, or has been saved again."""
        try:
            codes = self._read(keys, buffers, settle=True)
        except StoreError:
            return [TRANSFER_FAILED] * len(keys)
        for key, code in zip(keys, codes, strict=True):
            if code == _OTHER_CONTENT:
                self._corrupt(key)
        return codes

    def _with_seals(self, method: str, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        addresses = [[buffer.address, self._seals[method].address(i)] for i, buffer in enumerate(buffers)]
        sizes = [[buffer.nbytes, SEAL_BYTES] for buffer in buffers]
        return self._call(method, [self._object(key) for key in keys], addresses, sizes)

    def _sums(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int]:
        """Of what is to be written: as they were taken before, or of now."""
        taken = [self._taken.get(buffer.address, ("", 0)) for buffer in buffers]
        known = [each if name == key else None for key, (name, each) in zip(keys, taken, strict=True)]
        rest = iter(self._summing.sums([buffer for buffer, each in zip(buffers, known, strict=True) if each is None]))
        return [next(rest) if each is None else each for each in known]

    def _call(self, method: str, *arguments: object) -> list[int]:
        self.connect()
        codes: list[int] = getattr(self._store, method)(*arguments)
        away = [code in MASTER_AWAY for code in codes]
        if any(away) and (method != _READ or all(away)):
            raise StoreError("mooncake_master does not answer, or the node whose disk was asked")
        return [TRANSFER_FAILED if gone else code for gone, code in zip(away, codes, strict=True)]

    def _probe(self) -> None:
        """Mooncake's own set-up tries for 90 s when there is no master; nobody waits for that here."""
        address = leader(self._master.removeprefix(_ETCD), self._cluster) if self._master.startswith(_ETCD) else self._master
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except (OSError, ValueError) as error:
            raise StoreError(f"no mooncake_master at {address} ({error})") from error

    def _register(self, store: Any, region: Buffer) -> None:
        code = store.register_buffer(region.address, region.nbytes)
        if code != 0:
            raise StoreError(f"{region.nbytes} bytes cannot be registered for transfers (code {code}); with RDMA, check ulimit -l")

    def _silence(self) -> None:
        """Mooncake writes two lines for each block that fails, and MC_LOG_LEVEL ends at ERROR, so glog's flag itself is set. Failures
        are reported by who calls this adapter; set MC_LOG_LEVEL to see Mooncake's own lines."""
        with contextlib.suppress(ValueError):  # a build without that symbol stays loud
            ctypes.c_int32.in_dll(ctypes.CDLL(sys.modules[self._make.__module__].__file__), _GLOG_LEVEL).value = _GLOG_FATAL


def _object(key: str, kind: str) -> str:
    """The name of the object of a block whose checksum is of that kind: one of another kind would look corrupt."""
    return f"{key}+{kind}"


def _places(replicas: Sequence[Any], nbytes: int) -> list[Place]:
    """Of those replicas, as Mooncake describes them, that are whole, in memory, and of that size."""
    found: list[Place] = []
    for replica in replicas:
        if replica.is_memory_replica() and replica.status.name == "COMPLETE":
            place = replica.get_memory_descriptor().buffer_descriptor
            found += [(place.transport_endpoint, place.buffer_address)] if place.size == nbytes else []
    return found
