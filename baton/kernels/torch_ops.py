"""The kernels' operations in plain torch: what runs where nothing faster does, on any device and in any floating dtype."""

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] → the same: x / sqrt(mean(x²) + eps), computed in fp32 at least and rounded to x's dtype, times weight [H]."""
    wide = x if x.dtype is torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I] → silu(gate) · up [T, I]."""
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
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k of qkv [T, (Hq + 2 Hkv) · D], after their RMSNorm where weights [D] are given; writes k and v to their slots [T]
    (negative: nowhere) of kv [blocks, layers, 2, Hkv, block_size, D]. cos_sin [P, D]: by position, cos then sin. → q [T, Hq, D], `out` if
    that is given."""
    kv_heads, block_size, dim = kv.shape[3:]
    q, k, v = qkv.view(len(qkv), -1, dim).split((num_heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    cos, sin = cos_sin[positions][:, None].to(qkv.dtype).chunk(2, dim=-1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if not slots.is_cuda and bool((slots < 0).any()):
        real = slots >= 0
        slots, k, v = slots[real], k[real], v[real]
    cache = kv[:, layer]
    block, offset = slots // block_size, slots % block_size
    cache[block, 0, :, offset] = k
    cache[block, 1, :, offset] = v
    return q if out is None else out.copy_(q)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves convention: (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin)."""
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
    window: int | None,
    out: torch.Tensor | None = None,
    lengths: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """q [T, Hq, D] → [T, Hq, D]. Sequence s owns rows query_start[s] : query_start[s + 1] (int32), the last of its context_lens[s] tokens,
    whose KV lies in blocks block_tables[s] (int32). Causal; with a window a token sees itself and window - 1 before it. Rows of no
    sequence, or without context, are 0. `lengths`: query and context length of each sequence, where the host knows them.

    Gathers each sequence's blocks and calls torch's scaled_dot_product_attention; sequences with one row go together."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out.zero_()
    starts, lens = query_start.tolist(), context_lens.tolist()
    counts = [end - start if length else 0 for (start, end), length in zip(itertools.pairwise(starts), lens, strict=True)]
    cache = kv[:, layer]
    single = [s for s, count in enumerate(counts) if count == 1]
    if single:
        rows = torch.tensor([starts[s] for s in single], device=q.device)
        limits = torch.tensor([lens[s] for s in single], device=q.device)[:, None]
        blocks = block_tables[torch.tensor(single, device=q.device), : -(-max(lens[s] for s in single) // kv.shape[4])]
        out[rows] = _attend(q[rows], cache, blocks.long(), limits - 1, window)
    for s, count in enumerate(counts):
        if count > 1:
            rows = slice(starts[s], starts[s + 1])
            positions = torch.arange(lens[s] - count, lens[s], device=q.device)[None]
            out[rows] = _attend(q[rows], cache, block_tables[s : s + 1, : -(-lens[s] // kv.shape[4])].long(), positions, window)
    return out


def _attend(q: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """q [S · L, Hq, D] of L tokens of each of S sequences, at positions [S, L], over blocks [S, B] → the same."""
    sequences, length = positions.shape
    heads, dim = q.shape[1:]
    kv_heads = cache.shape[2]
    # Query heads that share a KV head are stacked along the query axis, so that no head of K or V is repeated.
    q = q.view(sequences, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, -1, dim)
    kv = cache[blocks.clamp(0, len(cache) - 1)].permute(2, 0, 3, 1, 4, 5).reshape(2, sequences, kv_heads, -1, dim)
    keys = torch.arange(kv.shape[3], device=q.device)
    kv = kv.masked_fill((keys > positions[:, -1:])[:, None, :, None], 0)  # what lies behind the context may be anything
    distance = positions[:, :, None] - keys
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    out = functional.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask[:, None].repeat(1, 1, heads // kv_heads, 1))
    out = out.view(sequences, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(sequences * length, heads, dim)


def pack(weight: torch.Tensor) -> torch.Tensor:
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, k] · weight [n, k]ᵀ + bias [n] → [T, n]."""
    return functional.linear(x, weight, bias)


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """residual [T, n], to which x [T, k] · weight [n, k]ᵀ + bias [n] has been added."""
    return residual.add_(linear(x, weight, bias))


def gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up of x [T, k] · weight [2I, k]ᵀ + bias [2I] → [T, I]."""
    return silu_mul(linear(x, weight, bias))


def embedding(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows token_ids [T] of weight [n, k] → [T, k]."""
    return functional.embedding(token_ids, weight)


def resolve(ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """Replaces each negative id of ids [T] int64 by drawn[-1 - id]."""
    ids.copy_(torch.where(ids < 0, drawn[(-1 - ids).clamp_(min=0)], ids))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] → [R] int64; the lowest id among equals."""
    return logits.argmax(-1)
