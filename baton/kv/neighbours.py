"""Memory of the KV pool that is shared on one machine: the node's side, and the worker's, which copies from there (docs/kvstore.md).

    node (SharedMemory, Lender)                                worker (Neighbours: a thread for each node)
    a sealed memfd, lent to the pool by Mooncake
    a socket named after its pool and its endpoint ◀ connect ─ of the same pool, by its name
    of the same user? ── where it lies, descriptor ──────────▶ of the same user? maps it, registers it with its device
    ends, or is killed ── hang-up ───────────────────────────▶ unmaps it; then the kernel has the memory back

Whether what was copied is what the pool meant, `kv.mooncake` finds out.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import mmap
import os
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.kv.store import Buffer, Memory

logger = logging.getLogger(__name__)
Place = tuple[str, int]  # of a block: the endpoint of a node, and the address there

_NAME = "baton-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # who maps it never meets its end
_HEADER_BYTES = 1 << 16
_ANSWER_S = 5.0  # that a node may take to answer, and its event loop to come to it
_AGAIN_S = 10.0  # until a node is asked again that could not be mapped
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def meeting_place(setting: str) -> Path | None:
    """The directory of the sockets (`pool.near`). `auto`: one for each user and network namespace, in which an endpoint is one process."""
    if setting == "auto":
        return Path(tempfile.gettempdir()) / f"baton-{os.getuid()}-{os.stat('/proc/self/ns/net').st_ino}"
    return Path(setting) if setting else None


def pool_name(master: str, cluster: str) -> str:
    """What sockets of one pool begin with: 16 hex digits. Nodes and workers that say differently where it is do not meet. `cluster` counts
    where that is etcd, which several pools may share."""
    return hashlib.blake2b(f"{master} {cluster if '://' in master else ''}".encode(), digest_size=8).hexdigest()


class SharedMemory:
    """Has no name in any file system: it goes when the last process that has it mapped does, however that ends."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.file = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, nbytes)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, _SEALS)

    @property
    def path(self) -> str:
        """That this process can open it by."""
        return f"/proc/self/fd/{self.file}"

    def pieces(self) -> list[tuple[int, int, int]]:
        """Where it is mapped in this process: address, bytes, offset."""
        inode = os.fstat(self.file).st_ino
        found: list[tuple[int, int, int]] = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if f"/memfd:{_NAME}" in line:
                span, _, offset, _, number = line.split()[:5]
                start, end = (int(part, 16) for part in span.split("-"))
                found += [(start, end - start, int(offset, 16))] if int(number) == inode else []
        return found


class Lender:
    """Gives the memory to who asks and is of the same user. Runs on the event loop."""

    def __init__(self, memory: SharedMemory, directory: Path, pool: str) -> None:
        """`pool`: a `pool_name`."""
        self._memory, self._directory, self._pool = memory, directory, pool
        self._listener: socket.socket | None = None
        self._path = Path()
        self._peers: set[socket.socket] = set()

    def open(self, endpoint: str) -> None:
        """As `endpoint`, which is how Mooncake names this process's memory. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(self._directory)
        self._path = self._directory / f"{self._pool}-{endpoint}"
        fresh = self._directory / f".{self._path.name}"  # gets its name when it answers
        fresh.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.fchmod(self._listener.fileno(), 0o600)  # Linux gives it to the name, too
        self._listener.bind(str(fresh))
        self._listener.listen()
        self._listener.setblocking(False)
        fresh.rename(self._path)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def close(self) -> None:
        """Who has mapped it keeps what it has, and is told."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            self._path.unlink(missing_ok=True)
            loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for peer in list(self._peers):
            self._drop(peer)

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except OSError as error:  # it has gone again, or there are too many open files
            logger.warning("a worker that asks for this node's memory is not heard: %s", error)
            return
        try:
            if (user := _user(peer)) != os.getuid():
                raise PermissionError(f"it belongs to user {user}")
            header = json.dumps({"bytes": self._memory.nbytes, "pieces": self._memory.pieces()}).encode()
            peer.setblocking(False)
            socket.send_fds(peer, [header], [self._memory.file])
        except BrokenPipeError:  # it only wanted to know whether somebody is here (`_sweep`)
            peer.close()
            return
        except OSError as error:
            logger.warning("a worker does not get this node's memory: %s", error)
            peer.close()
            return
        self._peers.add(peer)
        asyncio.get_running_loop().add_reader(peer, self._drop, peer)  # it has nothing to say until it hangs up

    def _drop(self, peer: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(peer)
        self._peers.discard(peer)
        peer.close()


@dataclass(frozen=True, slots=True)
class _Window:
    """A node's memory, mapped here."""

    peer: socket.socket
    region: Buffer
    pieces: tuple[tuple[int, int, int], ...]

    def alive(self) -> bool:
        try:
            return bool(self.peer.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def find(self, address: int, nbytes: int) -> Buffer | None:
        """What lies at `address` in the node."""
        for start, length, offset in self.pieces:
            if start <= address and address + nbytes <= start + length:
                return Buffer(self.region.address + offset + address - start, nbytes)
        return None


class Neighbours:
    """The nodes of a pool and of this machine that have been met. Each has a thread that stays with it until it ends: until it is mapped,
    which may take seconds, and where it can't be, its blocks are not found here."""

    def __init__(self, directory: Path, memory: Memory, pool: str) -> None:
        """`pool`: a `pool_name`."""
        self.memory = memory
        self._directory, self._prefix = directory, f"{pool}-"
        self._held = threading.Lock()  # a window goes under both: nobody who only meets waits for a copy
        self._lock = threading.Lock()  # of all below
        self._windows: dict[str, _Window] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._failed: dict[str, float] = {}  # when that was
        self._closed = False

    def meet(self) -> bool:
        """Begins with those that are new. Whether any is mapped."""
        try:
            names = [name for name in os.listdir(self._directory) if name.startswith(self._prefix)]
        except OSError:
            names = []
        endpoints = [name.removeprefix(self._prefix) for name in names]
        if new := [endpoint for endpoint in endpoints if endpoint not in self._windows]:
            with self._lock:
                self._failed = {endpoint: at for endpoint, at in self._failed.items() if endpoint in endpoints}
                for endpoint in new:
                    self._meet(endpoint)
        return bool(self._windows)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is found meanwhile stays mapped as long."""
        with self._held:
            yield

    def find(self, places: Iterable[Place], nbytes: int) -> tuple[Place, Buffer] | None:
        """One of the places of a block, and where it is mapped. Call it while `held`."""
        for place in places:
            endpoint, address = place
            window = self._windows.get(endpoint)
            if window is not None and (found := window.find(address, nbytes)) is not None and window.alive():
                return place, found
        return None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for window in self._windows.values():
                with contextlib.suppress(OSError):
                    window.peer.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(_ANSWER_S)

    def _meet(self, endpoint: str) -> None:
        path = self._directory / f"{self._prefix}{endpoint}"
        if self._closed or endpoint in self._threads or endpoint in self._windows:
            return
        if endpoint not in self._failed or time.monotonic() - self._failed[endpoint] > _AGAIN_S:
            self._threads[endpoint] = threading.Thread(target=self._attend, args=(endpoint, path), name=f"kv-near-{endpoint}", daemon=True)
            self._threads[endpoint].start()

    def _attend(self, endpoint: str, path: Path) -> None:
        """The life of one mapping."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.settimeout(_ANSWER_S)
                peer.connect(str(path))
                window = _receive(peer, self.memory)
                peer.settimeout(None)
                with self._lock:
                    self._failed.pop(endpoint, None)
                    if not self._closed:
                        self._windows[endpoint] = window
                logger.info("KV pool: blocks of %s are copied from its memory, %d bytes mapped here", endpoint, window.region.nbytes)
                try:
                    while not self._closed and peer.recv(1):
                        pass
                finally:
                    with self._held, self._lock:
                        self._windows.pop(endpoint, None)
                    _unmap(window.region, self.memory)
                logger.info("KV pool: the memory of %s is not mapped here any more", endpoint)
        except Exception as error:
            if not isinstance(error, OSError | ValueError | RuntimeError):
                logger.exception("mapping a node's memory failed in a way that is not known here")
            new = endpoint not in self._failed and not isinstance(error, ConnectionRefusedError | FileNotFoundError)  # it is dead
            level = logging.WARNING if new else logging.DEBUG
            logger.log(level, "KV pool: blocks of %s, on this machine, come over the network: %s", endpoint, error)
            self._failed[endpoint] = time.monotonic()
        finally:
            with self._lock:
                del self._threads[endpoint]


def _receive(peer: socket.socket, memory: Memory) -> _Window:
    """Raises OSError, ValueError, or RuntimeError where the device does not take the memory."""
    if (user := _user(peer)) != os.getuid():
        raise PermissionError(f"its socket belongs to user {user}")
    message, files, _, _ = socket.recv_fds(peer, _HEADER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if len(files) != 1:
            raise ValueError("the node sent no memory")
        header = json.loads(message)
        nbytes, pieces = int(header["bytes"]), tuple((int(start), int(length), int(offset)) for start, length, offset in header["pieces"])
        if fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(files[0]).st_size != nbytes:
            raise ValueError("its memory may shrink")
        if not pieces or any(offset < 0 or length < 0 or offset + length > nbytes for _, length, offset in pieces):
            raise ValueError("it does not say where its memory lies")
        return _Window(peer, _map(files[0], nbytes, memory), pieces)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its description is not known here: {message[:100]!r}") from error
    finally:
        for file in files:
            os.close(file)


def _map(file: int, nbytes: int, memory: Memory) -> Buffer:
    """Read-only; or, where the device's driver can't register such memory, writable, though nothing writes there."""
    for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
        region = map_shared(file, nbytes, protection)
        try:
            memory.adopt(region, read_only=protection == mmap.PROT_READ)
            return region
        except RuntimeError:
            unmap_shared(region)
            if protection & mmap.PROT_WRITE:
                raise
    raise AssertionError


def _unmap(region: Buffer, memory: Memory) -> None:
    try:
        memory.disown(region)
    finally:
        unmap_shared(region)


def map_shared(file: int, nbytes: int, protection: int) -> Buffer:
    """(Python's own mmap does not tell the address of read-only memory.) Raises OSError."""
    address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, file, 0)
    if address in (None, _MAP_FAILED):
        raise OSError(ctypes.get_errno(), "mmap: " + os.strerror(ctypes.get_errno()))
    return Buffer(address, nbytes)


def unmap_shared(region: Buffer) -> None:
    _libc.munmap(region.address, region.nbytes)


def _user(peer: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


def _sweep(directory: Path) -> None:
    """Removes the sockets of the dead."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if not path.name.startswith(".") and stat.S_ISSOCK(path.lstat().st_mode):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                    probe.setblocking(False)
                    try:
                        probe.connect(str(path))
                    except ConnectionRefusedError:
                        path.unlink()
