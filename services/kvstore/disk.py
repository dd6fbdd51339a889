"""Disk: a node's directory of blocks, which Mooncake writes and reads. Here is what Mooncake does not see to.

    open: locked; emptied, if the machine has crashed since it was written ─▶ Mooncake's ─▶ close: all is synced, and marked so

Mooncake neither syncs what it writes nor keeps checksums. While the machine runs, the kernel has every write, however processes end; what
was written before a crash of the machine may be torn, and nobody would notice. So whoever opens the directory leaves the kernel's boot id
in it, and only an orderly end takes that away.

`abandoned`: the last owner did not end in order, so the master may believe it to be there still.
"""

import ctypes
import fcntl
import logging
import os
from pathlib import Path

from baton.errors import ConfigError

logger = logging.getLogger(__name__)
_MARK, _BLOCKS = "baton-disk", ("*.bucket", "*.meta")


class Disk:
    def __init__(self, path: str, boot: str | None = None) -> None:
        """`boot`: of this machine, if not the kernel's. Raises ConfigError if the directory cannot be used, or another process has it."""
        self.path = os.path.realpath(path)  # Mooncake refuses links, and ".."
        self._path = Path(self.path)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._mark = os.open(self._path / _MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"disk.path={path} cannot be used: {error.strerror}; give a directory that this user may write to") from error
        try:
            fcntl.flock(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._mark)
            raise ConfigError(f"disk.path={path} is in use by another node: give each node a directory of its own") from error
        now, then = boot or Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.read(self._mark, 64).decode(errors="replace")
        self.abandoned = then == now
        if then not in ("", now):
            logger.warning("the machine that had %s has crashed, or lost it: what is there may be torn, and is removed", path)
            for pattern in _BLOCKS:
                for file in self._path.glob(pattern):
                    file.unlink(missing_ok=True)
        self._write(now)

    def close(self, *, orderly: bool) -> None:
        """`orderly`: the pool has let go of it. Otherwise it stays as an end of the process would leave it."""
        if orderly:
            directory = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            if ctypes.CDLL(None).syncfs(directory) == 0:
                self._write("")
            os.close(directory)
        os.close(self._mark)

    def _write(self, boot: str) -> None:
        os.ftruncate(self._mark, 0)
        os.pwrite(self._mark, boot.encode(), 0)
        os.fsync(self._mark)
