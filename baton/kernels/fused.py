"""Triton kernels of what lies between the matrix products: norms, activation, rotation with the KV write. Twins in torch_ops.py.

Each reads and writes every element once; sums run in fp32, and roundings to the tensors' dtype come where the torch twins have them.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, residual, weight, out, total, stride_x, stride_residual, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + row * stride_x + columns, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + row * stride_residual + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * stride_residual + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * scale).to(value.dtype).to(tl.float32) * gain
    tl.store(out + row * size + columns, normed.to(out.dtype.element_ty), mask=inside)


def _norm_warps(size: int) -> int:
    return max(1, min(16, triton.next_power_of_2(size) // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, H], rows may lie apart → [T, H] contiguous."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        _rms_norm[(rows,)](
            x, x, weight, out, x, x.stride(0), 0, size, eps, ADD=False, BLOCK=triton.next_power_of_2(size), num_warps=_norm_warps(size)
        )
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [T, H] → (rms_norm(residual + x), residual + x). The sum is written over residual."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        _rms_norm[(rows,)](
            x,
            residual,
            weight,
            out,
            residual,
            x.stride(0),
            residual.stride(0),
            size,
            eps,
            ADD=True,
            BLOCK=triton.next_power_of_2(size),
            num_warps=_norm_warps(size),
        )
    return out, residual


@triton.jit
def _silu_mul(gate_up, out, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + size + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * size + columns, (silu * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I], gate then up, rows may lie apart → [T, I] silu(gate) · up."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(2048 if rows >= 64 else 1024, triton.next_power_of_2(size))
        _silu_mul[(rows, triton.cdiv(size, block))](gate_up, out, gate_up.stride(0), size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _half_norm(first, second, weight, half_columns, inside, eps, DIM: tl.constexpr):
    """RMSNorm of heads given as two halves [heads, DIM / 2]."""
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM + eps)[:, None]
    kind = weight.dtype.element_ty
    gain_first = tl.load(weight + half_columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    gain_second = tl.load(weight + DIM // 2 + half_columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(kind).to(tl.float32) * gain_first).to(kind).to(tl.float32)
    second = ((second * scale).to(kind).to(tl.float32) * gain_second).to(kind).to(tl.float32)
    return first, second


@triton.jit
def _rope_write(
    qkv,
    cos_sin,
    positions,
    slots,
    kv,
    q_out,
    q_weight,
    k_weight,
    stride_qkv,
    stride_block,
    stride_value,
    stride_head,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program: one token, HEADS of its q, k and v heads. kv points at the layer's first block."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    inside = columns < DIM // 2
    there = (heads < Q_HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    is_query, is_value = heads < Q_HEADS, heads >= Q_HEADS + KV_HEADS
    source = qkv + token * stride_qkv + heads[:, None] * DIM + columns[None, :]
    kind: tl.constexpr = qkv.dtype.element_ty
    first_in = tl.load(source, mask=there, other=0.0)
    second_in = tl.load(source + DIM // 2, mask=there, other=0.0)
    first, second = first_in.to(tl.float32), second_in.to(tl.float32)
    if Q_NORM or K_NORM:
        q_first, q_second, k_first, k_second = first, second, first, second
        if Q_NORM:
            q_first, q_second = _half_norm(first, second, q_weight, columns, inside, eps, DIM)
        if K_NORM:
            k_first, k_second = _half_norm(first, second, k_weight, columns, inside, eps, DIM)
        first = tl.where(is_query[:, None], q_first, k_first)
        second = tl.where(is_query[:, None], q_second, k_second)
    angle = cos_sin + tl.load(positions + token) * DIM + columns
    cos = tl.load(angle, mask=inside, other=0.0).to(kind).to(tl.float32)[None, :]
    sin = tl.load(angle + DIM // 2, mask=inside, other=0.0).to(kind).to(tl.float32)[None, :]
    turned_first = ((first * cos).to(kind).to(tl.float32) - (second * sin).to(kind).to(tl.float32)).to(kind)
    turned_second = ((second * cos).to(kind).to(tl.float32) + (first * sin).to(kind).to(tl.float32)).to(kind)

    target = q_out + (token * Q_HEADS + heads[:, None]) * DIM + columns[None, :]
    tl.store(target, turned_first, mask=there & is_query[:, None])
    tl.store(target + DIM // 2, turned_second, mask=there & is_query[:, None])

    slot = tl.load(slots + token)
    kv_head = heads - Q_HEADS - tl.where(is_value, KV_HEADS, 0)
    place = (slot // SIZE) * stride_block + (slot % SIZE) * DIM
    target = kv + place + tl.where(is_value, stride_value, 0)[:, None] + (kv_head * stride_head)[:, None] + columns[None, :]
    writes = there & (~is_query)[:, None] & (slot >= 0)
    tl.store(target, tl.where(is_value[:, None], first_in, turned_first), mask=writes)
    tl.store(target + DIM // 2, tl.where(is_value[:, None], second_in, turned_second), mask=writes)


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
    eps: float = 1e-6,
) -> torch.Tensor:
    """As torch_ops.rope_write, in one launch. The rows of qkv may lie apart; kv is contiguous within a block's (layer, K or V, head)."""
    rows, (kv_heads, size, dim) = qkv.shape[0], kv.shape[3:]
    q = torch.empty((rows, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    total = num_heads + 2 * kv_heads
    heads = min(16 if rows >= 64 else 4, triton.next_power_of_2(total))
    if rows:
        _rope_write[(rows, triton.cdiv(total, heads))](
            qkv,
            cos_sin,
            positions,
            slots,
            kv[:, layer],
            q,
            q if q_weight is None else q_weight,
            q if k_weight is None else k_weight,
            qkv.stride(0),
            kv.stride(0),
            kv.stride(2),
            kv.stride(3),
            eps,
            Q_HEADS=num_heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            SIZE=size,
            Q_NORM=q_weight is not None,
            K_NORM=k_weight is not None,
            HEADS=heads,
            HALF=triton.next_power_of_2(dim // 2),
            num_warps=4 if heads >= 16 else 1,
        )
    return q
