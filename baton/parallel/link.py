"""Link: whole messages, in order, between two ranks of one worker, over TCP; and the forms that messages have, none of which runs code.

    steps    rank 0 ─▶ rank    what a forward pass reads: arrays of fixed names and dtypes
    calls    rank 0 ◀▶ rank    all else, as JSON

The connections are also how a death is noticed: a process that ends, however it ends, closes them.
"""

import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from baton.errors import InternalError

Channel = Literal["steps", "calls"]
_LENGTH = struct.Struct("<Q")
_MOST = 1 << 30  # bytes of a message
_HELLO, _HELLO_S = 1 << 12, 10.0  # bytes and seconds of a greeting
_OPTIONS = (  # a machine that is gone says nothing: after 5 + 3 · 2 s, or 10 s of what it does not acknowledge, the connection breaks
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
)
_SHAPE = struct.Struct("<ii")
_ARRAYS: dict[str, tuple[str, int]] = {  # dtype, dimensions
    "token_ids": ("<i8", 1),
    "positions": ("<i8", 1),
    "slots": ("<i8", 1),
    "query_start": ("<i4", 1),
    "context_lens": ("<i4", 1),
    "block_tables": ("<i4", 2),
    "logits_rows": ("<i8", 1),
    "logits_owners": ("<i8", 1),
    "scored_rows": ("<i8", 1),
}


class Link:
    """`send` is thread-safe; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        for level, option, value in _OPTIONS:
            sock.setsockopt(level, option, value)
        self._socket, self._lock = sock, threading.Lock()

    def send(self, message: bytes) -> None:
        """Raises OSError where the other side is gone."""
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def send_json(self, message: Mapping[str, Any]) -> None:
        self.send(json.dumps(message).encode())

    def receive(self, most: int = _MOST) -> bytes | None:
        """None at the end, orderly or not. Raises InternalError for a message of more than `most` bytes."""
        header = self._read(_LENGTH.size)
        if header is None:
            return None
        (length,) = _LENGTH.unpack(header)
        if length > most:
            raise InternalError(f"a message of {length} bytes between ranks")
        return self._read(length)

    def receive_json(self) -> dict[str, Any] | None:
        message = self.receive()
        return None if message is None else json.loads(message)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster
        self._socket.close()

    def _read(self, length: int) -> bytes | None:
        there = bytearray(length)
        view, done = memoryview(there), 0
        while done < length:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError:
                return None
            if not count:
                return None
            done += count
        return bytes(there)


def connect(address: str, token: str, rank: int, channel: Channel) -> Link:
    """To rank 0. Raises OSError."""
    host, _, port = address.rpartition(":")
    link = Link(socket.create_connection((host, int(port)), timeout=_HELLO_S))
    link.send_json({"token": token, "rank": rank, "channel": channel})
    return link


class Listener:
    """Where ranks find rank 0. Who does not know the token is turned away."""

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self._server.settimeout(0.1)
        self.address = f"{host}:{self._server.getsockname()[1]}"
        self.token = secrets.token_hex(16)

    def accept(self, wanted: set[tuple[int, Channel]], check: Callable[[], None], limit_s: float) -> dict[tuple[int, Channel], Link]:
        """Until all are there. `check` is called now and then, and may raise. Raises InternalError after `limit_s`."""
        links: dict[tuple[int, Channel], Link] = {}
        deadline = time.monotonic() + limit_s
        while len(links) < len(wanted):
            check()
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, sorted({rank for rank, _ in wanted - links.keys()})))
                raise InternalError(f"ranks {missing} have not connected within {limit_s:g} s; see what they say, if they run")
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            name, link = self._greet(connection)
            if link is not None and name in wanted - links.keys():
                links[name] = link
            else:
                connection.close()
        return links

    def close(self) -> None:
        self._server.close()

    def _greet(self, connection: socket.socket) -> tuple[Any, Link | None]:
        link = Link(connection)
        connection.settimeout(_HELLO_S)
        try:
            hello = json.loads(link.receive(_HELLO) or b"")
            known = secrets.compare_digest(hello["token"].encode(), self.token.encode())
            name = hello["rank"], hello["channel"]
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, InternalError):  # whoever it is, it is no rank
            return None, None
        connection.settimeout(None)
        return name, link if known else None


def pack_step(arrays: Mapping[str, np.ndarray], graphed: bool) -> bytes:
    """`arrays`: what `runtime.inputs` makes; names that are absent stay so."""
    parts = [b"\x01" if graphed else b"\x00"]
    for name, (dtype, dimensions) in _ARRAYS.items():
        array = arrays.get(name)
        if array is None:
            parts.append(_SHAPE.pack(-1, 0))
            continue
        assert array.dtype == np.dtype(dtype), (name, array.dtype)
        assert array.ndim == dimensions, (name, array.shape)
        parts += [_SHAPE.pack(array.shape[0], array.shape[1] if dimensions == 2 else 1), array.tobytes()]
    return b"".join(parts)


def unpack_step(message: bytes) -> tuple[dict[str, np.ndarray], bool]:
    arrays: dict[str, np.ndarray] = {}
    at = 1
    for name, (dtype, dimensions) in _ARRAYS.items():
        rows, columns = _SHAPE.unpack_from(message, at)
        at += _SHAPE.size
        if rows < 0:
            continue
        array = np.frombuffer(message, dtype, rows * columns, at).copy()  # writable, as torch wants it
        at += array.nbytes
        arrays[name] = array.reshape(rows, columns) if dimensions == 2 else array
    return arrays, message[0] == 1
