"""Tiers of KV that lies on a GPU: copies by way of pinned memory, and an engine that finds its blocks again in host memory and in files."""

import asyncio
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch

from baton.config import EngineConfig, FilesConfig, HostConfig, PoolConfig
from baton.kv.files import FileStore
from baton.kv.host import HostStore
from baton.kv.memory import CudaMemory
from baton.kv.neighbours import SharedMemory, map_shared, unmap_shared
from baton.kv.staged import SLOTS, StagedStore
from baton.kv.store import Buffer
from baton.kv.tiers import connect_tiers
from baton.kv.transfer import KVTransfer
from baton.runtime.build import build_engine
from baton.runtime.loaded import load
from baton.types import GenerateRequest, SamplingParams
from tests.parity.models import FAMILIES

pytestmark = pytest.mark.gpu
BLOCK = 1 << 20
COUNT = 3 * SLOTS + 1


class Device:
    """KV memory of COUNT blocks, of random content."""

    def __init__(self) -> None:
        self.blocks = torch.randint(0, 255, (COUNT, BLOCK), dtype=torch.uint8, device="cuda")
        self.buffers = [Buffer(self.blocks.data_ptr() + i * BLOCK, BLOCK) for i in range(COUNT)]
        self.keys = [f"k{i}" for i in range(COUNT)]
        self.memory = CudaMemory(self.blocks)


def test_blocks_survive_the_host() -> None:
    device = Device()
    store = HostStore(COUNT * BLOCK, BLOCK, device.memory)
    wanted = device.blocks.cpu()
    assert store.put(device.keys, device.buffers) == [True] * COUNT
    device.blocks.zero_()
    torch.cuda.synchronize()
    assert store.get(device.keys[::-1], device.buffers) == [True] * COUNT
    assert torch.equal(device.blocks.cpu(), wanted.flip(0))


def test_blocks_survive_files(tmp_path: Path) -> None:
    device = Device()
    store = StagedStore(FileStore(tmp_path, 1 << 30), device.memory, BLOCK)
    wanted = device.blocks.cpu()
    assert store.put(device.keys, device.buffers) == [True] * COUNT
    device.blocks.zero_()
    torch.cuda.synchronize()
    assert store.get(["missing", *device.keys[1:]], device.buffers) == [False] + [True] * (COUNT - 1)
    assert torch.equal(device.blocks[1:].cpu(), wanted[1:])
    assert not device.blocks[0].any()
    host = HostStore(COUNT * BLOCK, BLOCK, device.memory)  # what is written back from there is not staged
    host.put(["h"], device.buffers[1:2])
    held = host.hold(["h"])
    assert store.put(["h"], list(held.values())) == [True]
    assert store.get(["h"], device.buffers[:1]) == [True]
    assert torch.equal(device.blocks[0].cpu(), wanted[1])


def test_threads_copy_at_once() -> None:
    device = Device()
    store, wanted = HostStore(COUNT * BLOCK, BLOCK, device.memory), device.blocks.cpu()
    half, results = COUNT // 2, list[list[bool]]()
    store.put(device.keys[:half], device.buffers[:half])

    def loads() -> None:
        for _ in range(20):
            results.append(store.get(device.keys[:half], device.buffers[:half]))

    thread = threading.Thread(target=loads)
    thread.start()
    for _ in range(20):
        results.append(store.put(device.keys[half:], device.buffers[half:]))
    thread.join()
    assert all(map(all, results))
    assert torch.equal(device.blocks.cpu(), wanted)


@pytest.mark.parametrize("tier", ["host", "files"])
async def test_an_engine_finds_its_blocks_again(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVTransfer, "seconds", lambda tier, nbytes: 0.0)
    FAMILIES[0].make(tmp_path / "model")
    loaded = load(tmp_path / "model", EngineConfig(device="cuda", num_blocks=23, max_num_seqs=8))
    host = HostConfig(bytes=1 << 28 if tier == "host" else 0)
    files = FilesConfig(path=str(tmp_path / "kv"), bytes=1 << 28) if tier == "files" else FilesConfig()
    tiers = connect_tiers(host, PoolConfig(), files, loaded.pool.tensor, loaded.pool.layout.block_bytes)
    engine = build_engine(loaded, tiers, budget_s=5)
    engine.start()

    async def generate(length: int, name: str) -> tuple[list[int], int]:
        prompt = torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        outputs = [o async for o in engine.submit(GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=params))]
        report = next(output.cache for output in outputs if output.cache is not None)
        return [token.token_id for output in outputs for token in output.tokens], report.num_pool_tokens

    try:
        first = await generate(330, "first")
        while tiers[0].stats.blocks_saved < 5:
            await asyncio.sleep(0.01)
        await generate(1400, "other")
        assert await generate(330, "again") == (first[0], 320)
        assert await engine.check_integrity() == []
    finally:
        await engine.stop()


@pytest.mark.parametrize("protection", [mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE])
def test_memory_of_another_process_is_adopted(protection: int) -> None:
    """As `kv.neighbours` does. A driver may refuse read-only memory: then with an error, after which the other way works."""
    device, nbytes = Device(), COUNT * BLOCK
    shared = SharedMemory(nbytes)
    wanted = torch.randint(0, 255, (COUNT, BLOCK), dtype=torch.uint8)
    with mmap.mmap(shared.file, nbytes) as own:
        own[:] = wanted.numpy().tobytes()
    region = map_shared(shared.file, nbytes, protection)
    try:
        device.memory.adopt(region, read_only=protection == mmap.PROT_READ)
    except RuntimeError:
        if protection != mmap.PROT_READ:
            raise
        unmap_shared(region)
        region = map_shared(shared.file, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
        device.memory.adopt(region, read_only=False)
    sources = [Buffer(region.address + i * BLOCK, BLOCK) for i in range(COUNT)]
    device.memory.copy(device.buffers, sources)
    assert torch.equal(device.blocks.cpu(), wanted)
    device.memory.disown(region)
    unmap_shared(region)
    os.close(shared.file)
