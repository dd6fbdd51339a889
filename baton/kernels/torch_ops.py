"""The engine's kernels in plain torch: any device, any dtype. What the fused kernels must equal, and what runs where there are none.

Pure functions. Shapes: T tokens, H hidden, I intermediate, Hq query heads, Hkv KV heads, D head_dim, S sequences;
kv [num_blocks, num_layers, 2, Hkv, block_size, D].
"""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., H] → the same. Mean square in fp32 (fp64 stays); the result takes x's dtype before the weight is applied, as Llama does."""
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [T, H] → (rms_norm(residual + x), residual + x). The sum may lie in residual's memory."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I], gate then up → [T, I] silu(gate) · up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


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
    """Rotates q and k, writes k and v into their slots.

    qkv [T, (Hq + 2 Hkv) · D]; cos_sin [P, D] by position, cosines in the first half, sines in the second; positions [T] int64;
    slots [T] int64, block_id · block_size + offset, negative: nothing is written; q_weight and k_weight [D]: RMSNorm of each head before
    the rotation. Returns q [T, Hq, D].
    """
    kv_heads, size, dim = kv.shape[3:]
    q, k, v = qkv.unflatten(1, (-1, dim)).split((num_heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    cos, sin = (part[:, None].to(qkv.dtype) for part in cos_sin[positions].chunk(2, dim=-1))
    real = slots >= 0
    block, offset = slots[real] // size, slots[real] % size
    cache = kv[:, layer]
    cache[block, 0, :, offset] = _rotate(k, cos, sin)[real]
    cache[block, 1, :, offset] = v[real]
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over its blocks.

    q [T, Hq, D]; block_tables [S, B], query_start [S + 1], context_lens [S], int32. Sequence s owns rows
    query_start[s] : query_start[s + 1], which are the last of its context_lens[s] tokens, all of whose KV is written. A token at position p
    sees p - window + 1 … p (window None: 0 … p); scores are scaled by D ** -0.5. Rows of sequences without context are 0, as are rows
    past the last sequence. Returns [T, Hq, D], in `out` if given. Synchronises: the lengths are read.
    """
    result = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out.zero_()
    starts, lens = query_start.tolist(), context_lens.tolist()
    kv_heads, size, dim = kv.shape[3:]
    for s, context in enumerate(lens):
        first, count = starts[s], starts[s + 1] - starts[s]
        if count <= 0 or context <= 0:
            continue
        blocks = kv[block_tables[s, : -(-context // size)].long(), layer]
        keys, values = blocks.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, dim)[:, :, :context]
        distance = torch.arange(context - count, context, device=q.device)[:, None] - torch.arange(context, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        # Query heads that share a KV head are stacked along the query axis, so that no head of K or V is repeated.
        stacked = q[first : first + count].view(count, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        rows = functional.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask.repeat(stacked.shape[1] // count, 1))
        result[first : first + count] = rows.view(kv_heads, -1, count, dim).permute(2, 0, 1, 3).reshape(count, -1, dim)
    return result
