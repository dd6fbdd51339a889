"""Which machine this process runs on, and which of its cores."""

import os
import socket
from pathlib import Path


def this_machine() -> str:
    """The same for all processes that could share a device, or see each other's memory."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def these_cores(threads: int) -> str:
    """The cores that this process may run on, if it computes on all of them: the same for processes that do so beside each other. Empty
    where it leaves some to others."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores)) if threads >= len(cores) else ""
