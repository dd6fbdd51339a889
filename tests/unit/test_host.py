"""Host memory: as a tier, beside the device's, and on the way to files."""

import ctypes
import random
import threading
import time
from pathlib import Path

import pytest

from baton.errors import ConfigError
from baton.kv.files import FileStore
from baton.kv.host import HostStore
from baton.kv.memory import CpuMemory
from baton.kv.staged import SLOTS, StagedStore
from baton.kv.store import Buffer
from baton.kv.tiers import HostTier
from baton.kv.transfer import KVTransfer
from baton.metrics import WorkerMetrics
from baton.types import Load
from tests.unit.test_files import Slot
from tests.unit.test_transfer import Answers, BreakableStore

BLOCK = 4096


def host(slots: int) -> HostStore:
    return HostStore(slots * BLOCK + 1, BLOCK, CpuMemory())


def content(key: str) -> bytes:
    return (key.encode() * BLOCK)[:BLOCK]


def put(store: HostStore, *keys: str) -> list[bool]:
    slots = [Slot(content(key)) for key in keys]
    return store.put(keys, [slot.buffer for slot in slots])


def read(store: HostStore, *keys: str) -> list[bytes | None]:
    slots = [Slot() for _ in keys]
    return [slot.content if hit else None for slot, hit in zip(slots, store.get(keys, [s.buffer for s in slots]), strict=True)]


# -- host memory


def test_what_was_put_is_got_within_the_budget() -> None:
    store = host(3)
    assert put(store, "a", "b", "a") == [True] * 3
    assert read(store, "a", "x", "b") == [content("a"), None, content("b")]
    assert (store.usage().used_bytes, store.usage().capacity_bytes) == (2 * BLOCK, 3 * BLOCK)
    assert put(store, "c", "d", "e") == [True] * 3
    assert store.usage().used_bytes == 3 * BLOCK
    assert store.usage().evictions == 2
    half = Slot(bytes(BLOCK // 2))
    assert store.put(["half"], [half.buffer]) == [False]
    assert store.get(["c"], [half.buffer]) == [False]
    with pytest.raises(ConfigError, match=r"host\.bytes=100 holds 0 blocks"):
        HostStore(100, BLOCK, CpuMemory())
    with pytest.raises(ConfigError, match=r"host\.bytes=\d+ cannot be had on this machine"):
        HostStore(1 << 60, BLOCK, CpuMemory())


def test_prompts_that_come_once_do_not_flush_what_requests_share() -> None:
    store, shared = host(20), [f"system{i}" for i in range(8)]
    put(store, *shared)
    put(store, *(f"once{i}" for i in range(8)))
    store.contains(shared)  # by another request
    for i in range(100):
        put(store, f"scan{i}")
    assert store.contains(shared) == [True] * 8
    assert not any(store.contains([f"once{i}" for i in range(8)]))
    for i in range(100):  # what is shared may change, too
        put(store, f"new{i}")
        store.contains([f"new{i}"])
    assert not any(store.contains(shared))


def test_of_a_prefix_the_end_goes_first() -> None:
    store = host(8)
    put(store, *(f"p{i}" for i in range(8)))
    put(store, "x", "y", "z")
    prompt = [f"p{i}" for i in range(8)]
    assert store.contains(prompt) == [True] * 5 + [False] * 3
    read(store, *prompt[:3])  # in pieces
    read(store, *prompt[3:5])
    for i in range(6):
        put(store, f"y{i}")
        store.contains([f"y{i}"])
    assert sum(held := store.contains(prompt)) in range(1, 5)
    assert held == sorted(held, reverse=True)


def test_held_blocks_stay_and_not_too_many_are_held() -> None:
    store = host(4)
    put(store, "a", "b", "c")
    held = store.hold(["a", "missing", "b"])
    assert [ctypes.string_at(buffer.address, buffer.nbytes) for buffer in held.values()] == [content("a"), content("b")]
    assert store.hold(["c"]) == {}  # half of them are held
    assert put(store, "d", "e", "f", "g") == [True, True, False, False]
    assert store.contains(["a", "b"]) == [True, True]
    assert [ctypes.string_at(buffer.address, buffer.nbytes) for buffer in held.values()] == [content("a"), content("b")]
    store.release(held)
    assert put(store, "h", "i", "j", "k") == [True] * 4
    assert not any(store.contains(["a", "b"]))


def test_threads_that_put_and_get_never_see_anothers_block() -> None:
    store, wrong = host(10), list[str]()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            keys = [f"k{rng.randrange(30)}" for _ in range(3)]
            put(store, *keys)
            wrong.extend(key for key, got in zip(keys, read(store, *keys), strict=True) if got not in (None, content(key)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.usage().used_bytes == 10 * BLOCK
    assert not store._holds


# -- from host to files


def test_saves_to_the_host_are_written_back_behind_it(tmp_path: Path) -> None:
    files = FileStore(tmp_path, 1 << 20)
    behind = KVTransfer(files, "files", shared=False, direct=False, usage=files.usage)
    store = host(8)
    tier = HostTier(store, behind)
    slots, saved = [Slot(content(key)) for key in "abc"], Answers()
    tier.save(list("abc"), [slot.buffer for slot in slots], saved)
    assert saved.wait(1) == [[True] * 3]
    for slot in slots:  # the device's blocks are free to be used again
        ctypes.memset(slot.buffer.address, 0, BLOCK)
    deadline = time.monotonic() + 10
    while behind.stats.blocks_saved < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    behind.close()
    assert not store._holds
    tier.save(["d"], [Slot(content("d")).buffer], saved)  # the tier behind is gone
    assert saved.wait(2)[1] == [True]
    tier.close()
    assert not store._holds
    again = [Slot() for _ in "abc"]
    assert FileStore(tmp_path, 1 << 20).get(list("abc"), [slot.buffer for slot in again]) == [True] * 3
    assert [slot.content for slot in again] == [content(key) for key in "abc"]


def test_a_tier_behind_that_hangs_holds_up_neither_the_host_nor_its_memory() -> None:
    slow = BreakableStore()
    slow.gate.clear()
    store, behind = host(8), KVTransfer(slow, "files", shared=False, direct=False)
    tier, saved = HostTier(store, behind), Answers()
    slots = [Slot(content(f"k{i}")) for i in range(40)]
    for i, slot in enumerate(slots):
        tier.save([f"k{i}"], [slot.buffer], saved)
    assert saved.wait(40) == [[True]] * 40
    assert behind.stats.blocks_left_out > 30
    slow.gate.set()
    behind.close()
    tier.close()
    assert not store._holds


def test_at_an_orderly_end_what_is_queued_reaches_the_last_tier(caplog: pytest.LogCaptureFixture) -> None:
    slow, saved = BreakableStore(), Answers()
    slow.gate.clear()
    behind = KVTransfer(slow, "files", shared=False, direct=False)
    tier = HostTier(host(8), behind)
    slots = [Slot(content(key)) for key in "abc"]
    for key, slot in zip("abc", slots, strict=True):
        tier.save([key], [slot.buffer], saved)
    tier.flush(10)
    assert len(saved.values) == 3
    behind.flush(0.05)  # no time is left
    assert "KV files: what is still to be saved is lost" in caplog.text
    slow.gate.set()
    behind.flush(10)
    assert behind.stats.blocks_saved == 3
    for each in (behind, tier):
        each.close()
        each.flush(10)  # nobody is there to wait for


def test_tiers_are_told_by_metrics() -> None:
    store = host(4)
    tier = HostTier(store, None)
    saved = Answers()
    tier.save(["a"], [Slot(content("a")).buffer], saved)
    saved.wait(1)
    tier.decline(3)
    metrics = WorkerMetrics("m", "decode-0", Load, dict)
    metrics.tiers({"host": tier.values})
    page = metrics.exposition().decode()
    labels = '{model_name="m",tier="host",worker="decode-0"}'
    for sample in ("blocks_saved_total 1.0", "blocks_declined_total 3.0", f"used_bytes {BLOCK}.0", f"capacity_bytes {4 * BLOCK}.0"):
        name, value = sample.split()
        assert f"baton:kv_tier_{name}{labels} {value}" in page
    tier.close()


class OtherMemory(CpuMemory):
    """As if blocks outside of what was allocated here were on a device."""

    def is_host(self, buffer: Buffer) -> bool:
        return any(area.data_ptr() <= buffer.address < area.data_ptr() + area.numel() for area in self._allocated)


def test_files_of_a_device_go_by_staging(tmp_path: Path) -> None:
    memory, keys = OtherMemory(), [f"k{i}" for i in range(2 * SLOTS + 3)]
    store = StagedStore(FileStore(tmp_path, 1 << 20), memory, BLOCK)
    slots = [Slot(content(key)) for key in keys]
    assert store.put(keys, [slot.buffer for slot in slots]) == [True] * len(keys)
    asked, targets = [keys[1], "missing", *keys], [Slot() for _ in range(len(keys) + 2)]
    assert store.contains(asked) == [True, False] + [True] * len(keys)
    assert store.get(asked, [slot.buffer for slot in targets]) == [True, False] + [True] * len(keys)
    assert [slot.content for slot in targets] == [content(keys[1]), bytes(BLOCK), *map(content, keys)]
    area = memory.allocate(BLOCK)
    assert store.get([keys[0]], [area]) == [True]
    assert ctypes.string_at(area.address, BLOCK) == content(keys[0])


def test_device_memory_is_reached_by_address() -> None:
    memory = CpuMemory()
    area = memory.allocate(3 * BLOCK)
    slot = Slot(content("a"))
    target = Buffer(area.address + BLOCK, BLOCK)
    memory.copy([target], [slot.buffer])
    assert ctypes.string_at(target.address, BLOCK) == content("a")
    assert memory.is_host(target)
