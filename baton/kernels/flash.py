"""Prefill through FlashAttention-3 (Shah et al. 2024) where one of its packages is installed: `fa3-fwd` or `flash-attn-3`.

FlashAttention-3 is at its best on keys that lie one after the other, so the blocks of the sequences that prefill are first copied
together; that costs 2 % of an 8,192-token prompt's attention. Sequences with few new tokens go to the project's own kernel.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import triton
import triton.language as tl

from baton.kernels.attention import attend_few, attend_many, few_queries

_TILE = 128  # each sequence's keys begin at a multiple of it
_DIMS = (64, 96, 128, 192, 256)
_WORTH_IT = 1024  # new tokens, below which the project's kernel is faster


@cache
def _package() -> Callable[..., tuple[torch.Tensor, ...]] | str:
    """The packages' forward operator (both have the same), or why there is none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "no Hopper GPU"
    for name in ("flash_attn_3", "fa3_fwd"):
        try:
            import_module(f"{name}._C")
            return getattr(torch.ops, name).fwd.default
        except (ImportError, OSError, AttributeError):
            continue
    return "neither flash-attn-3 nor fa3-fwd can be imported"


def unavailable() -> str | None:
    """Why flash_paged_attention would do no better than paged_attention; None if it would."""
    found = _package()
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class DenseKeys:
    """Where the keys of the sequences that prefill will lie, the same for all layers."""

    starts: torch.Tensor  # [S + 1] int32, multiples of 128
    lens: torch.Tensor  # [S] int32; 0 for sequences with few new tokens
    rows: int  # at least starts[S]


def dense_keys(query_start: torch.Tensor, context_lens: torch.Tensor, few: int, total_context: int) -> DenseKeys:
    """few: from few_queries; total_context: an upper bound of all context_lens' sum."""
    lens = torch.where(query_start.diff() > few, context_lens, 0).int()
    starts = torch.zeros_like(query_start)
    torch.cumsum((lens + _TILE - 1) // _TILE * _TILE, 0, out=starts[1:])
    return DenseKeys(starts, lens, (triton.cdiv(total_context, _TILE) + lens.shape[0]) * _TILE)


@triton.jit(do_not_specialize=["sequences", "stride_table"])
def _gather(
    kv, dense, tables, starts, lens, sequences, stride_table, stride_block, stride_value, stride_head, dense_stride,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the dense rows, 2 · KV heads): copies one tile of one head's keys or values; past a sequence's end come zeros."""
    row, head = tl.program_id(0) * TILE, tl.program_id(1)
    sequence = -1
    for base in range(0, sequences, SEARCH):
        numbers = base + tl.arange(0, SEARCH)
        begins = tl.load(starts + numbers, mask=numbers < sequences, other=0)
        sequence += tl.sum(((begins <= row) & (numbers < sequences)).to(tl.int32), 0)
    tokens = row - tl.load(starts + sequence) + tl.arange(0, TILE)
    length = tl.load(lens + sequence)
    if tl.min(tokens, 0) >= length:
        return
    inside, columns = tokens < length, tl.arange(0, COLUMNS)
    block = tl.load(tables + sequence.to(tl.int64) * stride_table + tokens // SIZE, mask=inside, other=0).to(tl.int64)
    place = block * stride_block + (tokens % SIZE) * DIM + (head // KV_HEADS) * stride_value + (head % KV_HEADS) * stride_head
    there = inside[:, None] & (columns < DIM)[None, :]
    values = tl.load(kv + place[:, None] + columns[None, :], mask=there, other=0.0)
    target = dense + head.to(tl.int64) * dense_stride + (row + tl.arange(0, TILE)).to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(target, values, mask=(columns < DIM)[None, :] & (tokens >= 0)[:, None])


def gather_keys(kv: torch.Tensor, layer: int, block_tables: torch.Tensor, keys: DenseKeys) -> torch.Tensor:
    """[2, Hkv, keys.rows, D]: K and V of one layer, each sequence's tokens one after the other."""
    kv_heads, size, dim = kv.shape[3:]
    dense = torch.empty((2, kv_heads, keys.rows, dim), dtype=kv.dtype, device=kv.device)
    _gather[(keys.rows // _TILE, 2 * kv_heads)](
        kv[:, layer], dense, block_tables, keys.starts, keys.lens, keys.lens.shape[0], block_tables.stride(0),
        kv.stride(0), kv.stride(2), kv.stride(3), dense.stride(1),
        KV_HEADS=kv_heads, SIZE=size, DIM=dim, COLUMNS=triton.next_power_of_2(dim), TILE=_TILE, SEARCH=64, num_warps=4,
    )  # fmt: skip
    return dense


def flash_paged_attention(
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
    workspace: torch.Tensor | None = None,
    keys: DenseKeys | None = None,
) -> torch.Tensor:
    """As attention.paged_attention. keys: from dense_keys, made once for all layers; without it, it is made in each call, for
    max_context_len tokens of every sequence. What FlashAttention-3 does not serve (windows, fp32, odd head sizes) goes to Triton's kernels.
    """
    found, few, sequences = _package(), few_queries(q, kv), context_lens.shape[0]
    lists = (block_tables, query_start, context_lens)
    served = q.dtype == torch.bfloat16 and q.shape[2] in _DIMS and window is None and max_query_len >= _WORTH_IT
    if served and not isinstance(found, str):
        keys = keys or dense_keys(query_start, context_lens, few, sequences * max_context_len)
        dense = gather_keys(kv, layer, block_tables, keys).transpose(1, 2)
        result, *_ = found(
            q, dense[0], dense[1], out=out, cu_seqlens_q=query_start, cu_seqlens_k=keys.starts, seqused_k=keys.lens,
            max_seqlen_q=max_query_len, max_seqlen_k=max_context_len, softmax_scale=q.shape[2] ** -0.5, is_causal=True, num_splits=1,
        )  # fmt: skip
    else:
        result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        if max_query_len > few:
            attend_many(q, kv, layer, *lists, window, result)
    if max_query_len <= few or sequences > 1:
        attend_few(q, kv, layer, *lists, max_context_len, window, result, workspace)
    return result
