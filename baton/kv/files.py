"""FileStore: KV blocks as files of a directory, on a local SSD or on a file system that several workers share.

    {root}/baton-kv                  says that this is such a directory; while it is missing, the file system is not there
    {root}/3f/c1…-0of1-9d…           a block: header (magic, length, CRC-32, digest of its key), content. Its name is its key, the block's
                                     hash first; the folder's, two digits of the key's digest
    {root}/3f/c1…-0of1-9d….8e1b-5.tmp  … being written by a store; renamed when it is whole

Readers never see half a block: a file has its name only when it is complete, and what a crash of the machine left of it is caught by length
and checksum, counts as a miss and is removed. There is no index beside the files: a new process finds what the last one left by their
names, and the order of their use by their times, of what is used together the end's the oldest. A process alone keeps a better order in
memory: a lookup is a use of a whole prompt. Several processes may write the same directory, which each should know (`shared`), or finds out
by files that it has not written: until then it looks for nothing that it has not written or counted itself; then a lookup sets times that
are old, and reading none. It counts what is there when it has itself written a sixteenth of the budget, so the budget may be passed by so
much for each of them.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import logging
import os
import secrets
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ConfigError, StoreError
from baton.kv.holdings import Holdings
from baton.kv.store import Buffer, Usage
from baton.types import Tier

logger = logging.getLogger(__name__)

MARKER = "baton-kv"
TEMPORARY = ".tmp"
ABANDONED_S = 60.0  # a temporary file that is older was left by a process that died
GAP = 16  # missing blocks in a row, after which a lookup asks the file system no more
RECOUNT_SHARE = 1 / 16  # of the budget written since the last count
STALE_S = 600.0  # a shared file's time that is older is set by a lookup
_HEADER = struct.Struct("<8sQI16s")
_MAGIC = b"BATONKV1"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TOO_LARGE = errno.EFBIG


class FileStore:
    """Thread-safe, as far as the load and the save thread need it."""

    def __init__(self, root: Path, capacity: int, holdings: Holdings | None = None, *, shared: bool = False) -> None:
        """Creates the directory if it is not there, and lists what it holds. `shared`: others save there, too, and what they have is looked
        for. Raises ConfigError where it can't be used."""
        self._root, self._capacity, self._shared = root, capacity, shared
        self._holdings = holdings or Holdings(Tier.FILES, "")
        self._files = OrderedDict[str, int]()  # bytes by name, least recently used first
        self._used = self._written = self._evictions = self._damaged = 0
        self._numbers, self._token = itertools.count(), secrets.token_hex(4)  # of names that are this store's alone
        self._counted = False
        self._lock = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            marker = root / MARKER
            if not marker.exists() and any(not _is_the_file_systems(each.name) for each in root.iterdir()):
                raise ConfigError(f"files.path={root} holds something else; give a directory that is empty, or that Baton has filled")
            os.close(os.open(marker, os.O_CREAT | os.O_WRONLY, 0o660))
            self._count()
        except OSError as error:
            raise ConfigError(f"files.path={root} cannot be used: {error.strerror}") from error

    def register(self, region: Buffer) -> None:
        pass

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._check()
        names = list(map(_name, keys))
        if not self._shared:
            self._use(names)
            return [name in self._files for name in names]
        found = dict[str, float]()
        missing = 0
        for name in names:
            used = self._used_at(name) if missing < GAP else None  # others evict, too
            missing += 1
            if used is not None:
                found[name], missing = used, 0
        self._date([name for name, used in found.items() if time.time() - used > STALE_S])
        self._use(list(found))
        return [name in found for name in names]

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        self._check()
        files = [self._open(_name(key)) for key in keys]
        try:
            loaded = [self._read(file, _name(key), key, buffer) for file, key, buffer in zip(files, keys, buffers, strict=True)]
        finally:
            for file in files:
                if file is not None:
                    os.close(file)
        if not self._shared:  # else the lookup has
            self._date([_name(key) for key, here in zip(keys, loaded, strict=True) if here])
        return loaded

    def put(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[bool]:
        self._check()
        stored: list[bool] = []
        for key, buffer in zip(keys, buffers, strict=True):
            try:
                stored.append(self._write(_name(key), key, buffer))
            except OSError as error:
                if error.errno not in _FULL and error.errno != _TOO_LARGE:
                    raise StoreError(f"{self._root} cannot be written: {error.strerror}") from error
                logger.debug("%s: %s", self._root, error.strerror)
                break
        there = [_name(key) for key, here in zip(keys, stored, strict=False) if here]
        self._use(there)
        self._date(there)
        return stored + [False] * (len(keys) - len(stored))

    def usage(self) -> Usage:
        return Usage(self._used, self._capacity, self._evictions, self._damaged)

    def close(self) -> None:
        pass

    # -- one block

    def _used_at(self, name: str) -> float | None:
        """By others, too; None: it is not there."""
        try:
            return os.stat(self._path(name)).st_mtime
        except OSError:
            return None

    def _open(self, name: str) -> int | None:
        """The disk begins to read it, beside the others that are opened."""
        try:
            file = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._forget(name)
            return None
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def _read(self, file: int | None, name: str, key: str, buffer: Buffer) -> bool:
        if file is None:
            return False
        try:
            header, size = os.read(file, _HEADER.size), os.fstat(file).st_size
            if len(header) < _HEADER.size:
                return self._remove_damaged(name)
            magic, nbytes, checksum, digest = _HEADER.unpack(header)
            if magic != _MAGIC or digest != _digest(key) or size != _HEADER.size + nbytes:
                return self._remove_damaged(name)
            if nbytes != buffer.nbytes:
                return False
            view = _view(buffer)
            if not _fill(file, view) or zlib.crc32(view) != checksum:
                return self._remove_damaged(name)
        except OSError as error:
            logger.warning("%s: %s", self._path(name), error.strerror)
            self._forget(name)
            return False
        self._note(name, size)
        return True

    def _write(self, name: str, key: str, buffer: Buffer) -> bool:
        """Raises OSError."""
        path, size = self._path(name), _HEADER.size + buffer.nbytes
        if os.path.exists(path):
            self._note(name, size)
            return True
        self._forget(name)  # evicted by another process
        if size > self._capacity:
            return False
        self._make_room(size)
        view = _view(buffer)
        header = _HEADER.pack(_MAGIC, buffer.nbytes, zlib.crc32(view), _digest(key))
        temporary = f"{path}.{self._token}-{next(self._numbers)}{TEMPORARY}"
        try:
            _write_whole(temporary, path, header, view)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._evict(2 * size)  # the disk holds less than the budget
            _write_whole(temporary, path, header, view)
        self._written += size
        self._note(name, size)
        return True

    def _remove_damaged(self, name: str) -> bool:
        self._damaged += 1
        logger.warning("a damaged KV block was removed: %s", self._path(name))
        self._unlink(name)
        return False

    # -- the budget

    def _make_room(self, size: int) -> None:
        if self._written > self._capacity * RECOUNT_SHARE:
            self._count()
        self._evict(self._used + size - self._capacity)

    def _evict(self, nbytes: int) -> None:
        """At least so many, if there are so many."""
        while nbytes > 0 and self._files:
            with self._lock:
                name, size = next(iter(self._files.items()), ("", 0))
            if not name:
                return
            self._unlink(name)
            self._evictions += 1
            nbytes -= size

    def _count(self) -> None:
        """What is really there, whoever wrote it; removes what the dead left half written."""
        found: list[tuple[int, str, int]] = []
        now = time.time()
        for folder in os.scandir(self._root):
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.endswith(TEMPORARY) and entry.path == self._path(entry.name):
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
                    elif not entry.name.endswith(TEMPORARY) or now - status.st_mtime > ABANDONED_S:  # named by another rule
                        os.unlink(entry)
        if self._counted and not self._shared and any(name not in self._files for _, name, _ in found):
            logger.info("others write %s, too: it is looked at whatever this process has written", self._root)
            self._shared = True
        self._counted = True
        with self._lock:
            known = {} if self._shared else {name: place for place, name in enumerate(self._files)}
            found.sort(key=lambda file: (known.get(file[1], -1), *file))  # none is known the first time
            self._files = OrderedDict((name, size) for _, name, size in found)
            self._used = sum(self._files.values())
            self._written = 0
            self._holdings.replaced(map(_key, self._files))

    def _note(self, name: str, size: int) -> None:
        """It is there."""
        with self._lock:
            if name not in self._files:
                self._holdings.stored(_key(name))
            self._used += size - self._files.get(name, 0)
            self._files[name] = size

    def _use(self, names: Sequence[str]) -> None:
        """Of what is used together the end is the first to go."""
        with self._lock:
            for name in reversed(names):
                if name in self._files:
                    self._files.move_to_end(name)

    def _date(self, names: Sequence[str]) -> None:
        """The same, for those who count."""
        now = time.time_ns()
        for place in reversed(range(len(names))):
            path, then = self._path(names[place]), now - 1000 * place
            with contextlib.suppress(OSError):  # read only
                try:
                    os.utime(path, ns=(then, then))
                except PermissionError:  # another user's, who alone may do more than this
                    os.utime(path)

    def _forget(self, name: str) -> None:
        with self._lock:
            if name in self._files:
                self._holdings.removed(_key(name))
            self._used -= self._files.pop(name, 0)

    def _unlink(self, name: str) -> None:
        self._forget(name)
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{_digest(_key(name))[:1].hex()}/{name}"

    def _check(self) -> None:
        """Without its marker, the root is an empty mount point, which must not be filled."""
        if not os.path.exists(self._root / MARKER):
            raise StoreError(f"{self._root}/{MARKER} is not there any more: was the file system unmounted, or its content removed?")


def _write_whole(temporary: str, path: str, header: bytes, view: memoryview) -> None:
    """All of it under its name, or nothing. Raises OSError."""
    file = _create(temporary)
    try:
        try:
            for part in (memoryview(header), view):
                while part:
                    part = part[os.write(file, part) :]
        finally:
            os.close(file)
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o660)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o770)
        return os.open(path, flags, 0o660)


def _fill(file: int, view: memoryview) -> bool:
    """Whether there was so much to read."""
    while view:
        count = os.readv(file, [view])
        if not count:
            return False
        view = view[count:]
    return True


def _view(buffer: Buffer) -> memoryview:
    return memoryview((ctypes.c_char * buffer.nbytes).from_address(buffer.address)).cast("B")


def _is_the_file_systems(name: str) -> bool:
    """What is in the root of an empty volume: lost+found, .snapshot."""
    return name == "lost+found" or name.startswith(".")


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _name(key: str) -> str:
    return "-".join(reversed(key.split("/")))


def _key(name: str) -> str:
    return "/".join(reversed(name.split("-")))
