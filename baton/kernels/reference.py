"""The obvious twin of each kernel, in torch: slow, in the precision of its inputs, and what every kernel is tested against."""

import torch


def paged_attention(
    q: torch.Tensor, kv: torch.Tensor, layer: int, block_ids: torch.Tensor, context_len: int, window: int | None = None
) -> torch.Tensor:
    """One sequence's attention over its blocks, position by position.

    q [L, num_heads, head_dim] are the queries of the last L of `context_len` tokens; kv as in ForwardBatch, with K and V of all of
    them written; block_ids [B]. Returns [L, num_heads, head_dim]. Softmax of q · k / sqrt(head_dim) over the keys that are seen.
    """
    length, heads, dim = q.shape
    group = heads // kv.shape[3]
    keys = kv[block_ids, layer, 0].transpose(1, 2).reshape(-1, kv.shape[3], dim)[:context_len]
    values = kv[block_ids, layer, 1].transpose(1, 2).reshape(-1, kv.shape[3], dim)[:context_len]
    out = torch.empty_like(q)
    for i in range(length):
        position = context_len - length + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            seen = slice(first, position + 1)
            scores = keys[seen, head // group] @ q[i, head] * dim**-0.5
            out[i, head] = scores.softmax(0) @ values[seen, head // group]
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: torch.Tensor, position: int, inverse_frequencies: torch.Tensor) -> torch.Tensor:
    """x [heads, head_dim] of one token: each pair (x[i], x[i + head_dim / 2]) is rotated by position · inverse_frequencies[i]."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * inverse_frequencies[i].to(x.dtype)
        out[:, i] = x[:, i] * angle.cos() - x[:, i + half] * angle.sin()
        out[:, i + half] = x[:, i + half] * angle.cos() + x[:, i] * angle.sin()
    return out
