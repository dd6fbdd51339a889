"""Elementwise kernels on CUDA (Triton): norms, activation, rotation with the KV write. Each is one launch and one pass over memory.

Semantics are those of `torch_ops`; what happens between load and store is computed in fp32, and rounded where `torch_ops` rounds the norm.
"""

import torch
import triton
import triton.language as tl

EARLY_FROM = 64  # rows: attention's programs fill every processor from there on; fewer crowd on the first that are free


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    tl.extra.cuda.gdc_launch_dependents()  # the product that follows asks for its weights meanwhile
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    normed = (wide * scale).to(x.dtype)
    tl.store(out_ptr + row * size + columns, (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H], rows contiguous → the same; rounded to x's dtype before the product with weight [H]."""
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        warps = max(1, min(16, block // 512))
        _norm_kernel[(rows,)](x, weight, out, x.stride(0), size, eps, block, num_warps=warps, launch_pdl=True)
    return out


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + size + columns, mask=inside, other=0.0)
    tl.extra.cuda.gdc_launch_dependents()
    wide = gate.to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * size + columns, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I], rows contiguous → silu(gate) · up [T, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = 1024
        _silu_mul_kernel[(rows, triton.cdiv(size, block))](gate_up, out, gate_up.stride(0), size, block, num_warps=4, launch_pdl=True)
    return out


@triton.jit
def _rope_write_kernel(
    qkv_ptr, cos_sin_ptr, positions_ptr, slots_ptr, kv_ptr, q_out_ptr, q_weight_ptr, k_weight_ptr,
    qkv_stride, block_stride, half_stride, head_stride, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, HALF)
    inside = (heads < Q_HEADS + 2 * KV_HEADS)[:, None] & (columns < HALF)[None, :]
    is_q, is_v = (heads < Q_HEADS)[:, None], (heads >= Q_HEADS + KV_HEADS)[:, None]
    # The step's lists are read before the kernels before have ended: all are written before the step's embedding, an ordinary launch.
    position, slot = tl.load(positions_ptr + token), tl.load(slots_ptr + token)
    cos, sin = tl.load(cos_sin_ptr + position * DIM + columns)[None, :], tl.load(cos_sin_ptr + position * DIM + HALF + columns)[None, :]
    if NORM:
        w1 = tl.where(is_q, tl.load(q_weight_ptr + columns)[None, :], tl.load(k_weight_ptr + columns)[None, :]).to(tl.float32)
        w2 = tl.where(is_q, tl.load(q_weight_ptr + HALF + columns)[None, :], tl.load(k_weight_ptr + HALF + columns)[None, :]).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    source = qkv_ptr + token * qkv_stride + heads[:, None] * DIM + columns[None, :]
    raw1, raw2 = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    if not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM + eps)[:, None]
        x1 = ((x1 * scale).to(raw1.dtype).to(tl.float32) * w1).to(raw1.dtype).to(tl.float32)
        x2 = ((x2 * scale).to(raw1.dtype).to(tl.float32) * w2).to(raw1.dtype).to(tl.float32)
    cos, sin = cos.to(raw1.dtype).to(tl.float32), sin.to(raw1.dtype).to(tl.float32)
    y1 = tl.where(is_v, raw1, (x1 * cos - x2 * sin).to(raw1.dtype))
    y2 = tl.where(is_v, raw2, (x2 * cos + x1 * sin).to(raw1.dtype))
    target = q_out_ptr + (token * Q_HEADS + heads[:, None]) * DIM + columns[None, :]
    tl.store(target, y1, mask=inside & is_q)
    tl.store(target + HALF, y2, mask=inside & is_q)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kv_head = tl.where(is_v, heads[:, None] - Q_HEADS - KV_HEADS, heads[:, None] - Q_HEADS)
    target = kv_ptr + block * block_stride + tl.where(is_v, half_stride, 0) + kv_head * head_stride + offset * DIM + columns[None, :]
    writes = inside & (heads >= Q_HEADS)[:, None] & (slot >= 0)
    tl.store(target, y1, mask=writes)
    tl.store(target + HALF, y2, mask=writes)


def rope_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    num_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `torch_ops.rope_write`; head_dim is a power of two."""
    kv_heads, block_size, dim = kv.shape[3:]
    rows = qkv.shape[0]
    out = torch.empty(rows, num_heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    cache = kv[:, layer]
    if rows:
        tile = 8
        _rope_write_kernel[(rows, triton.cdiv(num_heads + 2 * kv_heads, tile))](
            qkv, cos_sin, positions, slots, cache, out, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight,
            qkv.stride(0), cache.stride(0), cache.stride(1), cache.stride(2), eps,
            num_heads, kv_heads, block_size, dim, q_weight is not None, tile, rows >= EARLY_FROM, num_warps=2, launch_pdl=True,
        )  # fmt: skip
    return out
