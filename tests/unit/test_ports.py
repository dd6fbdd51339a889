"""Ports of Transfer Engines that have ended: kept from others for long enough, and no more than a machine can spare. Real engines."""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator

import pytest

from baton.errors import TransferError
from baton.kv import transfer_engine
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.store import Buffer

HOST, NBYTES = "127.0.0.1", 1 << 16
MEMORY = ctypes.create_string_buffer(NBYTES)
REGION = Buffer(ctypes.addressof(MEMORY), NBYTES)


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[deque[tuple[float, int]]]:
    """What this test holds, of four at most, for its whole time."""
    mine = deque[tuple[float, int]]()
    monkeypatch.setattr(transfer_engine, "_held", mine)
    monkeypatch.setattr(transfer_engine, "_MAX_HELD", 4)
    monkeypatch.setattr(transfer_engine, "_HELD_S", 1e6)
    yield mine
    for _, fd in mine:
        os.close(fd)


def kept(held: deque[tuple[float, int]]) -> set[str]:
    sockets = [socket.socket(fileno=os.dup(fd)) for _, fd in held]
    try:
        return {f"{HOST}:{each.getsockname()[1]}" for each in sockets}
    finally:
        for each in sockets:
            each.close()


def test_a_fence_waits_where_ports_could_not_be_kept_for_their_time(
    held: deque[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, old = MooncakeReceiver(REGION, host=HOST, protocol="tcp"), list[str]()
    try:
        for _ in range(2):
            old.append(receiver.session)
            receiver.advance()
            receiver.fence()
        present = receiver.session
        with pytest.raises(TransferError, match="ports of sessions that have ended"):
            receiver.advance()
        assert receiver.session == present
        assert len(held) == 4
        assert kept(held) > set(old)
        monkeypatch.setattr(transfer_engine, "_HELD_S", 0.0)
        receiver.advance()
        receiver.fence()
        assert len(held) == 4  # for longer than they must, while there are no more
        assert kept(held) > {old[1], present}
    finally:
        receiver.close()


def test_ports_that_no_peer_was_told_are_free_at_once(held: deque[tuple[float, int]]) -> None:
    for _ in range(3):
        MooncakeSender(REGION, host=HOST, protocol="tcp").close()
    with pytest.raises(TransferError, match="registered"):
        transfer_engine.Engine(HOST, "tcp", [REGION, REGION])
    assert not held


def test_where_no_port_is_free_it_is_an_error() -> None:
    """And no crash, which would be this process's."""
    program = f"from baton.kv.transfer_engine import Engine\nEngine({HOST!r}, 'tcp', [])"
    with socket.socket() as taken:
        for port in range(20000, 30000):
            with contextlib.suppress(OSError):
                taken.bind(("", port))
                break
        ports = {name: str(taken.getsockname()[1]) for name in ("MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT")}  # there is one, and it is taken
        ended = subprocess.run([sys.executable, "-c", program], env=os.environ | ports, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "ConfigError" in ended.stderr
    assert "a free port in" in ended.stderr
