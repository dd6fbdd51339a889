"""Which machine this process runs on, which of its cores, and what its kernel does for us."""

import contextlib
import ctypes
import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from baton.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_claims: list[int] = []


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


def gpus() -> list[str]:
    """This machine's, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    found = subprocess.run([program, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.split() if found.returncode == 0 else []


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent`, which started it, dies; so no orphan stays. Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def free_port() -> int:
    """For a child that takes it seconds later, and again whenever it is started again: so none that the kernel may give to a connection
    meanwhile (from 32768 on, as a rule), none of Mooncake's own (12000 to 17000), and none that another process has from here: a name
    that the kernel keeps for as long as that process lives says so."""
    for port in random.sample(range(18_000, 32_000), 1000):
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))
            claim.bind(f"\0baton-port-{port}")
            _claims.append(claim.detach())
            return port
        claim.close()
    raise ConfigError("no free port was found between 18000 and 32000")
