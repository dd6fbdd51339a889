"""The engine's operations in plain torch, on any device: the twins of the Triton and of the C++ kernels, and what serves where neither can.

Each rounds to the type of its input exactly where the layers do (layers/norm.py, layers/rotary.py, models/decoder.py).
"""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] → the same; the mean square in fp32, rounded before the product with weight [H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of residual + x, residual + x); the sum is written over residual."""
    residual += x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I] → silu(gate) · up [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
) -> torch.Tensor:
    """Rotates q and k of qkv [T, (Hq + 2 Hkv) · D], after their RMSNorm where weights [D] are given; writes k and v to their slots [T]
    (negative: nowhere) of kv [blocks, layers, 2, Hkv, block_size, D]. cos_sin [P, D] fp32: by position, cos then sin. → q [T, Hq, D]."""
    kv_heads, block_size, dim = kv.shape[3:]
    q, k, v = qkv.unflatten(1, (-1, dim)).split((num_heads, kv_heads, kv_heads), dim=1)
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    cos, sin = cos_sin[positions][:, None].to(qkv.dtype).chunk(2, dim=-1)
    written = slots >= 0
    block, offset = slots[written] // block_size, slots[written] % block_size
    kv[block, layer, 0, :, offset] = _rotate(k, cos, sin)[written]
    kv[block, layer, 1, :, offset] = v[written]
    return _rotate(q, cos, sin)


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    window: int | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, Hq, D] → [T, Hq, D]. Sequence s owns rows query_start[s] : query_start[s + 1], the last of its context_lens[s] tokens, whose KV
    lies in blocks block_tables[s]. Causal; with a window a token sees itself and window - 1 before it. Rows of no sequence, or without
    context, are zero."""
    result = torch.zeros_like(q) if out is None else out.zero_()
    block_size, starts = kv.shape[4], query_start.tolist()
    group = q.shape[1] // kv.shape[3]
    for s, context in enumerate(context_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        length = starts[s + 1] - starts[s]
        if not length or not context:
            continue
        blocks = block_tables[s, : -(-context // block_size)].long()
        keys, values = (kv[blocks, layer, i].transpose(0, 1).flatten(1, 2)[:, :context] for i in (0, 1))
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        distance = torch.arange(context - length, context, device=q.device)[:, None] - torch.arange(context, device=q.device)
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        part = functional.scaled_dot_product_attention(q[rows].transpose(0, 1)[None], keys[None], values[None], attn_mask=mask)
        result[rows] = part[0].transpose(0, 1)
    return result


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] → [R] int64; the lowest id among equals."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[-1] - 1).amin(-1)
