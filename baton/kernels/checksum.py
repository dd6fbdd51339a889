"""64-bit checksums of pieces of memory on the GPU: NH, of UMAC (Black et al., 1999).

Σⱼ (low(xⱼ) + low(kⱼ)) · (high(xⱼ) + high(kⱼ)) over words xⱼ of 64 bits, halves added modulo 2³², the sum modulo 2⁶⁴. kⱼ is j, scrambled.
Two contents have one sum by a chance of 2⁻³².
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK, STEPS = 1024, 8  # words of one step; steps of one program
LOW = 0xFFFFFFFF
FIRST, SECOND = -7046029254386353131, -4658895280553007687  # 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9, splitmix64's
_FIRST, _SECOND, _LOW = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(LOW)


@triton.jit
def _checksum_kernel(addresses, sums, words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    piece, part = tl.program_id(0), tl.program_id(1)
    start = tl.load(addresses + piece).to(tl.pointer_type(tl.int64))
    total = tl.zeros([BLOCK], tl.int64)
    for step in range(STEPS):
        at = (part * STEPS + step).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(start + at, mask=at < words, other=0)
        key = (at + 1) * _FIRST
        key = (key ^ ((key >> 32) & _LOW)) * _SECOND
        low = ((x & _LOW) + (key & _LOW)) & _LOW
        high = (((x >> 32) & _LOW) + ((key >> 32) & _LOW)) & _LOW
        total += tl.where(at < words, low * high, 0)
    tl.atomic_add(sums + piece, tl.sum(total, 0))


def checksums(addresses: Sequence[int], nbytes: int, device: torch.device) -> torch.Tensor:
    """Of `nbytes` (a multiple of 8) at each address, in memory that `device` can read, aligned to 8 → [len(addresses)] int64."""
    assert nbytes % 8 == 0, nbytes
    sums = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    if addresses:
        starts = torch.tensor(addresses, dtype=torch.int64).to(device)
        words = nbytes // 8
        parts = triton.cdiv(words, BLOCK * STEPS)
        _checksum_kernel[(len(addresses), parts)](starts, sums, words, BLOCK=BLOCK, STEPS=STEPS, num_warps=4)
    return sums


def reference(content: torch.Tensor) -> torch.Tensor:
    """The same in plain torch: content [pieces, words] int64 → [pieces] int64."""
    at = torch.arange(1, content.shape[1] + 1, dtype=torch.int64, device=content.device)
    key = at * FIRST
    key = (key ^ ((key >> 32) & LOW)) * SECOND
    low = ((content & LOW) + (key & LOW)) & LOW
    high = (((content >> 32) & LOW) + ((key >> 32) & LOW)) & LOW
    return (low * high).sum(1)
