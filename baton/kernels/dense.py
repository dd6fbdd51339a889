"""Attention of whole prompts on CUDA through cuDNN, as torch has it: on Hopper it is faster than what Triton makes.

It takes K and V as plain tensors, so they are gathered from their blocks; and it plans each new length for tens of milliseconds, so
lengths are padded to a few, which `warm_up` plans. Causality hides the padding.
"""

import bisect

import torch
import triton
import triton.language as tl

LENGTHS = (*range(1024, 2049, 256), *range(2560, 4097, 512), *range(5120, 8193, 1024))
LEAST = 768  # shorter prompts are not worth the copies


@triton.jit
def _gather_kernel(
    kv_ptr, table_ptr, k_ptr, v_ptr, length, block_stride, half_stride, head_stride,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, kv_head = tl.program_id(0) * TILE, tl.program_id(1)
    keys, columns = tl.arange(0, TILE), tl.arange(0, DIM)
    inside = (start + keys < length)[:, None]
    block = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < length, other=0).to(tl.int64)
    source = kv_ptr + block * block_stride + kv_head * head_stride + (start % BLOCK_SIZE + keys)[:, None] * DIM + columns[None, :]
    target = ((start + keys)[:, None] * KV_HEADS + kv_head) * DIM + columns[None, :]
    tl.store(k_ptr + target, tl.load(source, mask=inside, other=0.0))
    tl.store(v_ptr + target, tl.load(source + half_stride, mask=inside, other=0.0))


def supports(dtype: torch.dtype, dim: int) -> bool:
    return dtype is torch.bfloat16 and dim in (64, 128) and torch.backends.cuda.cudnn_sdp_enabled()


def attend(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """q [L, Hq, D] of a whole prompt, LEAST … LENGTHS[-1] tokens, whose KV lies in blocks `table` [≥ blocks] of cache [blocks, 2, Hkv,
    block_size, D] → out [L, Hq, D]."""
    length, heads, dim = q.shape
    kv_heads, block_size = cache.shape[2:4]
    padded = LENGTHS[bisect.bisect_left(LENGTHS, length)]
    k = torch.empty(padded, kv_heads, dim, dtype=q.dtype, device=q.device)
    v = torch.empty_like(k)
    tile = min(block_size, 64)
    _gather_kernel[(padded // tile, kv_heads)](
        cache, table, k, v, length, cache.stride(0), cache.stride(1), cache.stride(2), kv_heads, dim, block_size, tile,
        num_warps=4,
    )  # fmt: skip
    if length < padded:
        wider = torch.empty(padded, heads, dim, dtype=q.dtype, device=q.device)
        wider[:length] = q
        wider[length:] = 0
        q = wider
    out.copy_(_cudnn(q, k, v)[:length])


def warm_up(device: torch.device, heads: int, kv_heads: int, dim: int, most: int) -> None:
    """Plans all lengths up to that of prompts of `most` tokens."""
    for length in LENGTHS[: bisect.bisect_left(LENGTHS, most) + 1]:
        q = torch.zeros(length, heads, dim, dtype=torch.bfloat16, device=device)
        k = torch.zeros(length, kv_heads, dim, dtype=torch.bfloat16, device=device)
        _cudnn(q, k, k)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each[None].transpose(1, 2) for each in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False)[0]
    return found.transpose(1, 2)[0]
