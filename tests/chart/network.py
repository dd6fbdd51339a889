"""A network of pods on this machine: each a network namespace on one bridge, which has a namespace of its own too, and a name server that
answers as Kubernetes' does. Needs root; says so where it is not allowed."""

import itertools
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence

_A, _OK, _NO_SUCH_NAME = 1, 0x8580, 0x8583


class NotAllowed(Exception):
    """This machine does not let tests make network namespaces."""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise NotAllowed(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}; network namespaces need root and CAP_SYS_ADMIN")


def sweep() -> None:
    """Takes away the namespaces, and the processes in them, of test runs that were killed."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20, check=False).stdout.split()
    for name in names:
        if (of := re.match(r"baton(\d+)\.", name)) and not os.path.exists(f"/proc/{of[1]}"):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=20, check=False).stdout
            for pid in pids.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


class Network:
    """The host is 10.x.y.1 there. Namespaces are named after this process."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise NotAllowed("network namespaces need root: run this test as root")
        sweep()
        own = secrets.token_hex(3)
        self._tag, veth = f"baton{os.getpid()}.{own}", f"baton.{own}"
        self._subnet = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
        self._addresses = (f"{self._subnet}.{i}" for i in itertools.count(10))
        self._numbers = itertools.count()
        self._namespaces: list[str] = []
        self.host = f"{self._subnet}.1"
        self._switch = f"{self._tag}-switch"
        try:
            self._make(self._switch)
            ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            ip("-n", self._switch, "link", "set", "br0", "up")
            ip("link", "add", veth, "type", "veth", "peer", "name", "host", "netns", self._switch)
            ip("-n", self._switch, "link", "set", "host", "master", "br0", "up")
            ip("address", "add", f"{self.host}/24", "dev", veth)
            ip("link", "set", veth, "up")
        except NotAllowed:
            self.close()
            raise

    def add(self) -> tuple[str, str]:
        """A new namespace: its name and its address."""
        number, address = next(self._numbers), next(self._addresses)
        name = f"{self._tag}-{number}"
        self._make(name)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", self._switch)
        ip("-n", self._switch, "link", "set", f"p{number}", "master", "br0", "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        return name, address

    def remove(self, name: str) -> None:
        ip("netns", "delete", name)
        self._namespaces.remove(name)

    def close(self) -> None:
        for name in reversed(self._namespaces):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
        self._namespaces.clear()

    def _make(self, name: str) -> None:
        ip("netns", "add", name)
        self._namespaces.append(name)
        ip("-n", name, "link", "set", "lo", "up")


class NameServer:
    """Answers A questions by `find`, which gives the addresses of a name, or None where there is no such name."""

    def __init__(self, host: str, find: Callable[[str], Sequence[str] | None]) -> None:
        self._find = find
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 53))
        self._thread = threading.Thread(target=self._serve, name="dns")
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self._socket.getsockname())  # an empty one ends it
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, sender = self._socket.recvfrom(512)
            if not data:
                return
            self._socket.sendto(self._answer(data), sender)

    def _answer(self, data: bytes) -> bytes:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        (kind,) = struct.unpack_from(">H", data, at + 1)
        found = self._find(".".join(labels).lower())
        addresses = list(found or ()) if kind == _A else []
        header = struct.pack(">HHHHHH", *struct.unpack_from(">H", data), _NO_SUCH_NAME if found is None else _OK, 1, len(addresses), 0, 0)
        records = [struct.pack(">HHHIH", 0xC00C, _A, 1, 5, 4) + socket.inet_aton(address) for address in addresses]
        return header + data[12 : at + 5] + b"".join(records)
