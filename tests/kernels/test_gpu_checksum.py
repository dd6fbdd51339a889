"""Checksums of KV blocks on the GPU: equal to their definition in plain torch, wherever the blocks lie; and the seals of a pool by them."""

import ctypes

import pytest
import torch

from baton.kv.memory import CudaMemory, CudaSumming
from baton.kv.store import Buffer

pytestmark = pytest.mark.gpu


def definition(words: torch.Tensor) -> list[int]:
    """words [pieces, n] int64."""
    from baton.kernels.checksum import reference

    return [each % 2**64 for each in reference(words.cpu()).tolist()]


@pytest.mark.parametrize("nbytes", [8, 64, 4096, 65536, 8 * 8191, 8 * 8193, (1 << 20) + 8, 5 << 20])
def test_sums_are_the_definitions(nbytes: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (5, nbytes // 8), dtype=torch.int64, device="cuda")
    words[1] = 0
    words[2] = -1
    buffers = [Buffer(row.data_ptr(), nbytes) for row in words]
    summing = CudaSumming(words.device)
    sums = summing.sums(buffers)
    assert sums == definition(words)
    assert len(set(sums)) == 5
    assert summing.sums(buffers[::-1]) == sums[::-1]
    assert summing.sums([]) == []


def test_each_word_and_each_place_counts() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1, 20_000), dtype=torch.int64, device="cuda")
    summing, buffer = CudaSumming(words.device), Buffer(words.data_ptr(), 160_000)
    seen = set(summing.sums([buffer]))
    for at in (0, 1, 1023, 1024, 8191, 8192, 19_999):
        for bit in (0, 31, 32, 63):
            words[0, at] ^= torch.tensor(-(2**63) if bit == 63 else 1 << bit, device="cuda")
            torch.cuda.synchronize()
            seen.update(summing.sums([buffer]))
            words[0, at] ^= torch.tensor(-(2**63) if bit == 63 else 1 << bit, device="cuda")
    words[0, [5, 9000]] = words[0, [9000, 5]]
    torch.cuda.synchronize()
    seen.update(summing.sums([buffer]))
    assert len(seen) == 1 + 7 * 4 + 1


def test_host_memory_has_the_sums_of_the_devices() -> None:
    blocks = torch.randint(0, 255, (4, 1 << 20), dtype=torch.uint8, device="cuda")
    memory, summing = CudaMemory(blocks), CudaSumming(blocks.device)
    there = [Buffer(row.data_ptr(), 1 << 20) for row in blocks]
    area = memory.allocate(4 << 20)
    here = [Buffer(area.address + i * (1 << 20), 1 << 20) for i in range(4)]
    memory.copy(here, there)
    assert summing.sums(here) == summing.sums(there) == summing.sums([here[0], *there[1:]])
    ctypes.memset(here[2].address + 77, 1, 1)
    ctypes.memset(here[2].address + 78, 2, 1)
    assert [a == b for a, b in zip(summing.sums(here), summing.sums(there), strict=True)] == [True, True, False, True]
