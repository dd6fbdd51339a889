"""Engine: one Mooncake TransferEngine, from its start to an end that is certain. The only importer of `mooncake.engine`.

What it adds (docs/transfer.md: found by running it): the protocol asked for is the one that is used, or it is an error; `close` leaves no
socket through which a peer could still write, and takes no second with the GIL held; the ports of a closed engine that peers know are used
by nobody else for long, so a write under an old session meets nobody.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from baton.errors import ConfigError, InternalError, TransferError
from baton.kv.store import Buffer

# What chooses the transport, read by Mooncake's C++ when an engine is made: its `protocol` argument does not.
_CHOOSES = {"tcp": "MC_FORCE_TCP", "rdma": "MC_FORCE_HCA", "nvlink_intra": "MC_INTRANODE_NVLINK"}
_LANES = {"MC_TCP_LANES_PER_PEER": "8"}  # connections to a peer; the pool's client wants more (kv.mooncake)
_DEFAULTS = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",  # a stopped receiver: the connection is closed after 2 s, and the push has failed
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_SLICE_SIZE": "65483",  # one segment on loopback; its own 65536 makes one more, of 53 bytes, and each wakes the receiver
    "MC_LOG_LEVEL": "ERROR",
}
_GLOG_LEVEL, _GLOG_FATAL = "_ZN3fLI17FLAGS_minloglevelE", 3
_METADATA = b"\x01"  # a handshake's kind: "describe yourself"
_MAX_DESCRIPTION = 16 * 2**20
_MAX_HELD = 128  # ports kept from being used again, two for each engine; all processes of a machine share Mooncake's, 15000 to 17000
_HELD_S = 120.0  # that they are kept at least; the oldest are let go after that, when there are too many

_environment_lock = threading.Lock()
_held_lock = threading.Lock()
_held: deque[tuple[float, int]] = deque()  # since when, and the socket; oldest first


class Engine:
    """Initialised, verified and registered. Its calls may be made from any thread, but none may be under way when it is closed."""

    def __init__(self, host: str, protocol: str, regions: Sequence[Buffer], devices: str = "", *, announced: bool = True) -> None:
        """`host` is where peers reach this process. `announced`: they are told of the session, and may use it when it has ended. Raises
        ConfigError if Mooncake or the protocol is not to be had here, TransferError if memory cannot be registered."""
        if protocol not in _CHOOSES:
            raise ConfigError(f"unknown transfer protocol {protocol!r}; there are {', '.join(_CHOOSES)}")
        self.protocol, self._closed, self._announced = protocol, False, False
        module = _load()
        with _environment(protocol):
            self._engine: Any = module.TransferEngine()
            code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices)
        if code != 0:
            self._engine = None  # not asked for its ports, which crashes where it got none: so this may take a second
            _let_go(most=0)
            raise ConfigError(
                f"Mooncake cannot transfer over {protocol} here (code {code}); is there a device for it, and a free port in 15000-17000?"
            )
        self._ports, self._kept = [self._engine.get_rpc_port()], list[int]()
        self.session = f"{host}:{self._ports[0]}"
        try:
            for region in regions:
                code = self._engine.register_memory(region.address, region.nbytes)
                if code != 0:
                    raise TransferError(
                        f"{region.nbytes} bytes cannot be registered for {protocol} (code {code}); with RDMA, check ulimit -l"
                    )
            description = describe(f"127.0.0.1:{self._ports[0]}", timeout_s=5.0)
            self._ports += [port] if (port := int(description.get("tcp_data_port", 0))) else []
            if description["protocol"] != protocol:
                raise ConfigError(f"asked for {protocol}, Mooncake has chosen {description['protocol']}; is there a device for {protocol}?")
        except BaseException:
            self.close()
            raise
        self._announced = announced

    def open(self, session: str, timeout_s: float) -> None:
        """Has Mooncake get to know a session before the first write to it. Raises TransferError if nobody answers in time: Mooncake itself
        would wait for 60 s, and every other write of this engine with it."""
        host, _, port = session.rpartition(":")
        try:
            peers = {info[4] for info in socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)}
        except OSError as error:
            raise TransferError(f"{host} has no address ({error})") from error
        watch = threading.Timer(timeout_s, _cut, [peers])
        watch.daemon = True
        watch.start()
        try:
            number = self.submit(session, 0, 0, 0)
        finally:
            watch.cancel()
        if self.protocol == "nvlink_intra":
            return  # it refuses a write to no memory, when it knows the session; if it does not, so it will the first real one
        if number == 0 or self.poll(number) != 1:
            raise TransferError(f"the Transfer Engine at {session} does not answer")

    def submit(self, session: str, source: int, target: int, nbytes: int) -> int:
        """Starts one write and returns its number; 0 where it could not be started. Without the GIL."""
        return self._engine.transfer_submit_write(session, source, target, nbytes)

    def submit_batch(self, session: str, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]) -> int:
        """Starts several writes and returns their number, for `ended_well` alone; 0 where none was started. Without the GIL."""
        return self._engine.batch_transfer_async_write(session, list(sources), list(targets), list(sizes))

    def ended_well(self, batches: Sequence[int]) -> bool:
        """Of all writes of these batches, whose numbers are void then. Waits for them, with a core of its own, without the GIL."""
        return not batches or self._engine.get_batch_transfer_status(list(batches)) == 0

    def poll(self, number: int) -> int:
        """1 when a write has ended well, -1 when it has failed (then the number is void), 0 while it is under way. Of a batch: its first
        write."""
        return self._engine.transfer_check_status(number)

    def close(self) -> None:
        """When this returns, no byte is read from or written into the registered memory by this engine any more: its sockets are closed,
        its threads have ended. Milliseconds. Idempotent. Raises InternalError if it did not come true."""
        if self._closed:
            return
        if self._engine is not None:
            if sys.getrefcount(self._engine) > 2:
                raise InternalError("a Transfer Engine that is in use cannot be closed")
            self._kept = _shut(self._ports)
            self._engine = None  # the destructor joins the threads and closes the sockets, with the GIL held: see _shut
        if left := [fd for fd, sock in _sockets() if _local_port(sock) in self._ports and _is_live(sock)]:
            raise InternalError(f"a closed Transfer Engine has left sockets {left}")
        self._closed = True
        if self._announced:
            with _held_lock:
                _held.extend((time.monotonic(), fd) for fd in self._kept)
            _let_go(_MAX_HELD)
        else:
            for fd in self._kept:
                os.close(fd)


def check_held() -> None:
    """Raises TransferError where so many announced engines have ended lately that no other may: its ports, or theirs, could not be kept
    for long enough."""
    _let_go(_MAX_HELD - 1)
    with _held_lock:
        if len(_held) >= _MAX_HELD:
            left_s = _HELD_S - (time.monotonic() - _held[0][0])
            raise TransferError(f"{len(_held)} ports of sessions that have ended are kept from others, for {left_s:.0f} s more")


def _let_go(most: int) -> None:
    """Of the ports that are held, down to so many, those whose time is over."""
    with _held_lock:
        while len(_held) > most and time.monotonic() - _held[0][0] > _HELD_S:
            os.close(_held.popleft()[1])


def found_protocols(cuda: bool) -> list[str]:
    """What this machine seems to have, best first; whether Mooncake can use it, an Engine says. `cuda`: the memory is a GPU's. Raises
    ConfigError where Mooncake cannot be loaded."""
    found = ["tcp"]
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        found.insert(0, "rdma")
    if cuda and getattr(_load(), "SUPPORT_INTRA_NVLINK", False):
        found.insert(0, "nvlink_intra")
    return found


def describe(session: str, timeout_s: float) -> dict[str, Any]:
    """What the engine behind a session says of itself: `protocol`, `tcp_data_port`, `buffers`. Raises TransferError without an answer."""
    host, _, port = session.rpartition(":")
    try:
        deadline = time.monotonic() + timeout_s
        with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
            request = _METADATA + b"{}"
            connection.sendall(struct.pack("<Q", len(request)) + request)
            (size,) = struct.unpack("<Q", _read(connection, 8, deadline))
            if size > _MAX_DESCRIPTION:
                raise ValueError(f"a description of {size} bytes")
            description = json.loads(_read(connection, size, deadline)[1:])
            description["protocol"] = str(description["protocol"])
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise TransferError(f"no Transfer Engine answers at {session} ({error})") from error
    description.pop("timestamp", None)
    return description


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Raises TimeoutError or ValueError where not all of it comes in time."""
    there = bytearray()
    while len(there) < size:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = connection.recv(min(size - len(there), 1 << 16))
        if not part or time.monotonic() > deadline:
            raise ValueError(f"{len(there)} of {size} bytes came in time")
        there += part
    return bytes(there)


def _shut(ports: Sequence[int]) -> list[int]:
    """Ends the listeners and the handshakes, and returns duplicates of the listeners. Mooncake's handshake thread, which the destructor
    joins while it holds the GIL, waits in accept (1 s) or for a peer (5 s); a socket that is shut down ends both at once. A bound
    duplicate, deaf as it is, keeps the port. `ports`: of handshakes, of data."""
    held: list[int] = []
    for fd, sock in _sockets():
        if (port := _local_port(sock)) not in ports:
            continue
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            held.append(os.dup(fd))
        elif port != ports[0]:
            continue  # a data connection: the destructor closes it, unread
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    return held


def _cut(peers: set[Any]) -> None:
    """Ends what this process has connected to any of `peers`."""
    for _, sock in _sockets():
        with contextlib.suppress(OSError):
            if sock.getpeername() in peers:
                sock.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """This process's TCP sockets."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADF):  # closed meanwhile
                raise
            continue
        with sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                yield int(name), sock


def _local_port(sock: socket.socket) -> int:
    try:
        return sock.getsockname()[1]
    except OSError:
        return 0


def _is_live(sock: socket.socket) -> bool:
    """Listening or connected; what is held of older engines is neither."""
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return True
    with contextlib.suppress(OSError):
        return bool(sock.getpeername())
    return False


@contextlib.contextmanager
def _environment(protocol: str) -> Iterator[None]:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    with _environment_lock:
        wanted: dict[str, str | None] = {variable: "1" if name == protocol else None for name, variable in _CHOOSES.items()} | _LANES
        before = {name: os.environ.get(name) for name in wanted}
        _set(wanted)
        try:
            yield
        finally:
            _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _load() -> Any:
    chatty = os.environ.get("MC_LOG_LEVEL", "ERROR") != "ERROR"
    try:
        module = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise ConfigError(
            f"Mooncake cannot be loaded ({error}); install baton[mooncake], and on Debian libibverbs1 libnuma1 libcurl4"
        ) from error
    if not chatty:  # it writes a line for each failed write; set MC_LOG_LEVEL=INFO to see them
        with contextlib.suppress(ValueError):
            ctypes.c_int32.in_dll(ctypes.CDLL(str(module.__file__)), _GLOG_LEVEL).value = _GLOG_FATAL
    return module
