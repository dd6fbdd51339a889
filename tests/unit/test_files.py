"""FileStore on real files: the budget, what damage and death leave behind, and directories that several processes write."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError, StoreError
from baton.kv import files as module
from baton.kv.files import MARKER, FileStore
from baton.kv.store import Buffer

BLOCK = 4096
FILE = BLOCK + 36  # with its header


class Slot:
    def __init__(self, content: bytes = bytes(BLOCK)) -> None:
        self._memory = ctypes.create_string_buffer(content, len(content))
        self.buffer = Buffer(ctypes.addressof(self._memory), len(content))

    @property
    def content(self) -> bytes:
        return self._memory.raw


def content(key: str, nbytes: int = BLOCK) -> bytes:
    return (key.encode() * nbytes)[:nbytes]


def put(store: FileStore, *keys: str) -> list[bool]:
    slots = [Slot(content(key)) for key in keys]
    return store.put(keys, [slot.buffer for slot in slots])


def read(store: FileStore, key: str) -> bytes | None:
    slot = Slot()
    return slot.content if store.get([key], [slot.buffer]) == [True] else None


def blocks(root: Path) -> list[Path]:
    return [path for path in root.glob("??/*") if not path.name.endswith(".tmp")]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "kv", 100 * FILE, shared=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def test_what_was_put_is_got_by_this_process_and_the_next(store: FileStore, root: Path) -> None:
    assert put(store, "a", "b") == [True, True]
    again = FileStore(root, 100 * FILE)
    for each in (store, again):
        assert each.contains(["a", "b", "c"]) == [True, True, False]
        assert [read(each, key) for key in "abc"] == [content("a"), content("b"), None]
        assert each.usage().used_bytes == 2 * FILE
    assert put(again, "a") == [True]
    assert again.usage().used_bytes == 2 * FILE


def test_the_budget_is_kept_by_dropping_what_was_used_longest_ago(root: Path) -> None:
    store = FileStore(root, 3 * FILE)
    for key in "abc":
        put(store, key)
        time.sleep(0.01)  # a file's time is its place in the order
    assert read(store, "a") == content("a")
    store = FileStore(root, 3 * FILE)  # the order outlives the process
    put(store, "d")
    assert store.contains(list("abcd")) == [True, False, True, True]
    assert (len(blocks(root)), store.usage().evictions) == (3, 1)
    assert FileStore(root, 3 * FILE).usage().used_bytes == 3 * FILE
    smaller = FileStore(root, FILE)  # the budget was lowered
    put(smaller, "e")
    assert [path.stat().st_size for path in blocks(root)] == [FILE]
    huge = Slot(bytes(2 * BLOCK))
    assert smaller.put(["f"], [huge.buffer]) == [False]


def test_what_is_looked_up_stays_and_of_a_prompt_the_end_goes_first(root: Path) -> None:
    store = FileStore(root, 20 * FILE)
    prompt = [f"p{i}" for i in range(8)]
    put(store, *prompt)
    for i in range(30):  # it counts anew meanwhile
        put(store, f"x{i}")
        assert all(store.contains(prompt))
    assert [read(store, key) for key in prompt] == list(map(content, prompt))  # which changes nothing
    put(store, *(f"y{i}" for i in range(16)))
    assert store.contains(prompt) == [True] * 4 + [False] * 4


def test_a_lookup_in_a_shared_directory_sets_old_times(root: Path) -> None:
    """So that whoever counts does not drop what everybody has on the device."""
    store, other = (FileStore(root, 4 * FILE, shared=True) for _ in range(2))
    for number, key in enumerate("abcd"):
        put(store, key)
        for path in blocks(root):
            if path.name == key:
                os.utime(path, (number, number))
    assert other.contains(["a"]) == [True]
    other._count()
    put(other, "e")
    assert store.contains(list("abcde")) == [True, False, True, True, True]


@pytest.mark.parametrize("use", ["put", "got", "looked up"])
def test_in_a_shared_directory_too_the_end_of_a_prompt_goes_first(root: Path, use: str) -> None:
    prompt = [f"p{number}" for number in range(8)]
    first, other = (FileStore(root, 8 * FILE, shared=True) for _ in range(2))
    put(first, *prompt)
    if use == "got":
        assert [read(other, key) for key in prompt] == list(map(content, prompt))
    elif use == "looked up":
        for path in blocks(root):
            os.utime(path, (int(path.name[1:]), int(path.name[1:])))
        assert all(other.contains(prompt))
    other._count()
    put(other, *(f"x{number}" for number in range(4)))
    assert first.contains(prompt) == [True] * 4 + [False] * 4


def test_another_size_is_a_miss_and_no_damage(store: FileStore, root: Path) -> None:
    put(store, "a")
    slot = Slot(bytes(BLOCK // 2))
    assert store.get(["a"], [slot.buffer]) == [False]
    assert read(store, "a") == content("a")


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1
        path.write_bytes(raw)

    return damage


def zero_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:36] + bytes(BLOCK))


DAMAGES = {
    "content": flip(2000),
    "last byte": flip(-1),
    "magic": flip(0),
    "length": flip(9),
    "checksum": flip(16),
    "digest": flip(20),
    "half of it": lambda path: os.truncate(path, FILE // 2),
    "one byte short": lambda path: os.truncate(path, FILE - 1),
    "half a header": lambda path: os.truncate(path, 10),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, FILE + 1),
    "zeros": zero_a_page,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_block_is_a_miss_and_is_removed(store: FileStore, root: Path, damage: Callable[[Path], None]) -> None:
    put(store, "a")
    damage(blocks(root)[0])
    assert read(FileStore(root, 100 * FILE), "a") is None
    assert blocks(root) == []
    assert read(store, "a") is None
    put(store, "a")
    assert read(store, "a") == content("a")
    damage(blocks(root)[0])
    assert read(store, "a") is None
    assert store.usage().damaged == 1


def test_a_block_under_anothers_name_is_not_taken_for_it(store: FileStore, root: Path) -> None:
    put(store, "a")
    (path,) = blocks(root)
    put(store, "b")
    (other,) = set(blocks(root)) - {path}
    os.replace(path, other)
    assert read(store, "b") is None


def test_a_lookup_of_a_long_unknown_prompt_asks_the_file_system_a_few_times(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "k3", "k500")
    asked: list[Any] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path: asked.append(path) or stat(path))
    assert store.contains([f"k{i}" for i in range(600)]).count(True) == 1
    assert 15 < len(asked) < 30


def test_a_lookup_in_a_private_directory_asks_no_file_system(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(FileStore(root, 100 * FILE), "before")
    store = FileStore(root, 100 * FILE)
    put(store, "a", "gone")
    asked: list[Any] = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or exists(path))
    assert store.contains(["before", "none", "a", "gone"]) == [True, False, True, True]
    assert asked == [root / MARKER]
    monkeypatch.undo()
    for path in blocks(root):
        path.unlink()
    assert read(store, "gone") is None
    assert store.contains(["a", "gone"]) == [True, False]  # a miss was believed


# -- files that can't be written


def test_a_limit_of_the_file_system_is_a_refusal(tmp_path: Path) -> None:
    """Of which the kernel knows: no file of this process may be longer than two blocks."""
    code = f"""
import resource
from pathlib import Path
from baton.kv.files import FileStore
from tests.unit.test_files import BLOCK, Slot, blocks, put, read
root = Path({str(tmp_path / "kv")!r})
store = FileStore(root, 1 << 30)
assert put(store, "before") == [True]
resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BLOCK, 2 * BLOCK))
large = Slot(bytes(3 * BLOCK))
assert store.put(["large", "behind"], [large.buffer, large.buffer]) == [False, False]
assert put(store, "after") == [True]
assert read(store, "before") and read(store, "after")
assert len([*root.glob("??/*")]) == 2, "something half written is left"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_full_disk_makes_room_before_it_refuses(store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk holds two blocks, whatever the budget says."""
    write = os.write

    def limited(file: int, data: Any) -> int:
        if sum(path.stat().st_size for path in root.glob("??/*")) + len(data) > 2 * FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", limited)
    assert put(store, "a", "b", "c") == [True, True, True]
    assert read(store, "c") == content("c")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    assert put(store, "d", "e") == [False, False]
    assert not [path for path in root.glob("??/*") if path.name.endswith(".tmp")]


def test_a_file_system_that_goes_away_is_no_miss_and_is_not_filled(store: FileStore, root: Path) -> None:
    put(store, "a")
    away = root.with_name("away")
    root.rename(away)
    for mounted in (False, True):
        if mounted:
            root.mkdir()  # the mount point alone
        for call in (lambda: put(store, "b"), lambda: read(store, "a"), lambda: store.contains(["a"])):
            with pytest.raises(StoreError, match="not there any more"):
                call()
    assert list(root.iterdir()) == []
    root.rmdir()
    away.rename(root)
    assert read(store, "a") == content("a")


def test_directories_that_will_not_do_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"files\.path=.*file cannot be used"):
        FileStore(tmp_path / "file", 1 << 20)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        FileStore(tmp_path / "home", 1 << 20)
    assert not (tmp_path / "home" / MARKER).exists()


@pytest.mark.parametrize("name", ["lost+found", ".snapshot"])
def test_a_new_volume_is_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert put(FileStore(tmp_path, 1 << 20), "a") == [True]


# -- several processes


def test_who_finds_that_others_write_there_does_not_take_theirs_for_old(root: Path) -> None:
    """The ranks of a worker, say, of whom each writes its share of every block."""
    ranks = [FileStore(root, 40 * FILE) for _ in range(2)]
    for number in range(100):
        for rank, store in enumerate(ranks):
            assert put(store, f"{number}r{rank}") == [True]
    lately = [f"{number}r{rank}" for number in range(85, 100) for rank in range(2)]
    assert [key for key in lately if read(ranks[int(key[-1])], key) is None] == []


WRITES_HALF = """
import os, sys, time
from pathlib import Path
from baton.kv.files import FileStore
from tests.unit.test_files import BLOCK, put
store = FileStore(Path(sys.argv[1]), 1 << 30)
put(store, "whole")
write = os.write
def half(file, data):
    count = write(file, data[:BLOCK // 2])
    if len(data) == BLOCK:
        print("half", flush=True)
        time.sleep(100)
    return count
os.write = half
put(store, "torn")
"""


def test_a_process_that_is_killed_in_the_middle_of_a_block_leaves_nothing_that_is_read(
    store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITES_HALF, str(root)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        assert store.contains(["whole", "torn"]) == [True, False]
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
    assert (read(store, "whole"), read(store, "torn")) == (content("whole"), None)
    assert len([*root.glob("??/*.tmp")]) == 1
    FileStore(root, 1 << 30)
    assert len([*root.glob("??/*.tmp")]) == 1  # it might be a living one's
    monkeypatch.setattr(module, "ABANDONED_S", 0.0)
    FileStore(root, 1 << 30)
    assert [*root.glob("??/*.tmp")] == []
    assert put(store, "torn") == [True]
    assert read(store, "torn") == content("torn")


WRITES_ON = """
import sys
from pathlib import Path
from baton.kv.files import FileStore
from tests.unit.test_files import FILE, put
store = FileStore(Path(sys.argv[1]), 32 * FILE)
while True:
    for number in range(100):
        put(store, f"k{number}")
"""


def test_processes_that_write_and_evict_the_same_blocks_never_give_wrong_ones(root: Path) -> None:
    budget = 32 * FILE
    store = FileStore(root, budget)
    writers = [subprocess.Popen([sys.executable, "-c", WRITES_ON, str(root)]) for _ in range(2)]
    try:
        deadline, hits, misses = time.monotonic() + 30, 0, 0
        while min(hits, misses) < 200:
            assert time.monotonic() < deadline
            for number in range(100):
                key = f"k{number}"
                got = read(store, key)
                hits, misses = hits + (got is not None), misses + (got is None)
                assert got in (None, content(key))
            put(store, *(f"mine{number}" for number in range(3)))
    finally:
        for writer in writers:
            assert writer.poll() is None, "a writer has died by itself"
            writer.kill()
            writer.wait(10)
    assert store.usage().damaged == 0
    assert sum(path.stat().st_size for path in blocks(root)) <= budget * (1 + 3 / 16) + 3 * FILE


def test_what_another_process_evicted_is_not_claimed_any_more(store: FileStore, root: Path) -> None:
    """Who saves it again, for it has it on its device, must write it."""
    assert put(store, "hot") == [True]
    [path] = blocks(root)
    path.unlink()
    assert store.contains(["hot"]) == [False]
    assert put(store, "hot") == [True]
    assert read(FileStore(root, 100 * FILE), "hot") == content("hot")
