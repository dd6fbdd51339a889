"""push.verify: what was pushed is compared with what was computed, and what differs is not used."""

import ctypes
from collections.abc import Callable, Sequence

import pytest

from baton.kv.mooncake import MooncakeStore
from baton.kv.push import PushResult, PushStatus
from baton.kv.store import Buffer, checksum
from baton.runtime.feed import Feed
from baton.runtime.pushing import Pusher, Reservations
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request
from baton.types import GenerateRequest, PushTarget, SamplingParams
from tests.properties.toy import ToyReceiver

SIZE, BYTES, NUM_BLOCKS = 4, 64, 16


class Worker:
    """Blocks in this process's memory."""

    def __init__(self) -> None:
        self.cache = KVCache(NUM_BLOCKS, SIZE)
        self.memory = ctypes.create_string_buffer(NUM_BLOCKS * BYTES)

    def buffer(self, block_id: int) -> Buffer:
        return Buffer(ctypes.addressof(self.memory) + block_id * BYTES, BYTES)

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        return [checksum(self.buffer(block_id)) for block_id in block_ids]

    def fill(self, block_id: int, value: int) -> None:
        ctypes.memset(self.buffer(block_id).address, value, BYTES)


class CopyingSender:
    """Writes at once, or after `before`."""

    before: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def push(
        self, target: PushTarget, first: int, block_ids: Sequence[int], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        self.before()
        for block_id, address in zip(block_ids, target.shards[0].addresses[first:], strict=True):
            ctypes.memmove(address, self._worker.buffer(block_id).address, BYTES)
        done(PushResult(PushStatus.GOOD, 0, 0.0))
        settled()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("corrupt", [None, "source", "target"])
def test_a_corrupted_block_is_caught_and_not_used(corrupt: str | None, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = Worker(), Worker()
    sender = CopyingSender(prefill)
    prompt = tuple(range(14))  # three full blocks and a tail
    inner = Request.create(
        GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1)),
        eos_token_ids=frozenset(), max_model_len=64, block_size=SIZE, arrival=0.0,
    )  # fmt: skip
    feed = Feed(inner, hold=True, await_saves=False, num_tokens=14, num_blocks=3, looked_up=True)
    reservations = Reservations(
        decode.cache,
        ToyReceiver(decode.buffer(0).address, BYTES),
        after_steps=lambda action: action(),
        patience_s=1.0,
        checksums=decode.checksums,
    )
    targets: list[PushTarget | None] = []
    reservations.reserve(feed, targets.append)
    (target,) = targets
    assert target is not None
    pusher = Pusher(prefill.cache.pool, sender, block_size=SIZE, post=lambda action: action(), checksums=prefill.checksums)
    shipment = pusher.open(target, 14, lambda: None)
    blocks = prefill.cache.pool.take(4)
    for number, block_id in enumerate(blocks):
        prefill.fill(block_id, number + 1)
    if corrupt == "source":  # somebody writes there between the step and the push
        sender.before = lambda: prefill.fill(blocks[1], 99)
    pusher.send(shipment, blocks, 14)
    if corrupt == "target":
        ctypes.memset(target.shards[0].addresses[1] + 5, 99, 1)
    reservations.arrived(target.lease, 1, shipment.sums[:1])
    reservations.arrived(target.lease, 4, shipment.sums)
    reservations.arrived(target.lease, 4, shipment.sums)
    good = 4 if corrupt is None else 1
    assert len(decode.cache.match(inner)) == min(good, 3)
    assert reservations.values == {"push_verified": 4 if corrupt is None else 2, "push_corrupt": corrupt is not None}
    assert ("block 1 of r was pushed here and is not what was sent" in caplog.text) is (corrupt is not None)
    reservations.settle(target.lease)
    decode.cache.unpin("r")
    assert decode.cache.pool.num_free == NUM_BLOCKS
    assert decode.cache.pool.check_integrity([]) == []


def test_a_pool_over_rdma_has_no_more_seals_in_a_call_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MC_FORCE_HCA", "MC_FORCE_TCP"):
        monkeypatch.setenv(name, "")  # a store sets the one and removes the other
    store = MooncakeStore("nobody:1", host="127.0.0.1", protocol="rdma")
    count = 3000
    memory = ctypes.create_string_buffer(bytes(range(250)) * 48, 4 * count)
    content = memory.raw
    keys, blocks = [f"k{i}" for i in range(count)], [Buffer(ctypes.addressof(memory) + i * 4, 4) for i in range(count)]
    pool: dict[str, list[bytes]] = {}
    most = 0

    def call(method: str, names: list[str], addresses: list[list[int]], sizes: list[list[int]]) -> list[int]:
        nonlocal most
        most = max(most, len(names))
        for name, pieces in zip(names, zip(addresses, sizes, strict=True), strict=True):
            if method.startswith("batch_put"):
                pool[name] = [ctypes.string_at(*piece) for piece in zip(*pieces, strict=True)]
            else:
                for address, piece in zip(pieces[0], pool[name], strict=True):
                    ctypes.memmove(address, piece, len(piece))
        return [0 if method.startswith("batch_put") else sum(each) for each in sizes]

    monkeypatch.setattr(store, "_call", call)
    assert store.put(keys, blocks) == [True] * count
    ctypes.memset(memory, 0, 4 * count)
    assert store.get(keys, blocks) == [True] * count
    assert memory.raw == content
    assert (store.stats.blocks_verified, store.stats.blocks_corrupt) == (count, 0)
    assert 16 < most < count
    store.close()
