"""MemoryStore, the in-memory twin of the pool."""

import ctypes
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.store import Buffer, MemoryStore

BLOCK = 64
CAPACITY = 3


class Slot:
    def __init__(self, content: bytes = b"") -> None:
        self._memory = ctypes.create_string_buffer(content, BLOCK)
        self.buffer = Buffer(ctypes.addressof(self._memory), BLOCK)

    @property
    def content(self) -> bytes:
        return self._memory.raw


def content(value: int) -> bytes:
    return bytes([value]) * BLOCK


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "contains"]), st.integers(0, 5), st.integers(0, 255)), max_size=40))
def test_it_keeps_the_most_recently_used_and_never_overwrites(steps: list[tuple[str, int, int]]) -> None:
    store, expected = MemoryStore(CAPACITY * BLOCK), OrderedDict[str, bytes]()
    for action, number, value in steps:
        key = f"k{number}"
        if action == "put":
            slot = Slot(content(value))
            assert store.put([key], [slot.buffer]) == [True]
            if key not in expected:
                expected[key] = content(value)
                if len(expected) > CAPACITY:
                    expected.popitem(last=False)
        elif action == "get":
            slot = Slot(content(255 - value))
            assert store.get([key], [slot.buffer]) == [key in expected]
            assert slot.content == expected.get(key, content(255 - value))  # a miss leaves the buffer alone
            if key in expected:
                expected.move_to_end(key)
        else:
            assert store.contains([key]) == [key in expected]


def test_another_size_is_a_miss_and_more_than_all_memory_is_refused() -> None:
    store, slot = MemoryStore(BLOCK), Slot(content(1))
    half = Buffer(slot.buffer.address, BLOCK // 2)
    assert store.put(["half"], [half]) == [True]
    assert store.get(["half"], [slot.buffer]) == [False]
    assert MemoryStore(BLOCK // 2).put(["whole"], [slot.buffer]) == [False]


def test_closing_forgets_everything() -> None:
    store, slot = MemoryStore(BLOCK), Slot(content(1))
    store.put(["a"], [slot.buffer])
    store.close()
    assert store.contains(["a"]) == [False]
    assert store.put(["b"], [slot.buffer]) == [True]  # the memory of "a" is free again
