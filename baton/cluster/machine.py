"""Which machine this process runs on, which of its cores, and what its kernel does for us."""

import ctypes
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def this_machine() -> str:
    """The same for all processes that could share a device, or see each other's memory."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def is_loopback(host: str) -> bool:
    """Whether whoever listens there is reached from this machine alone. A name that nobody knows is not one."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def these_cores(threads: int) -> str:
    """The cores that this process may run on, if it computes on all of them: the same for processes that do so beside each other. Empty
    where it leaves some to others."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores)) if threads >= len(cores) else ""


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent`, which started it, dies; so no orphan stays. Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
