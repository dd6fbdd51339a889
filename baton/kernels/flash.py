"""Attention of long prompts through FlashAttention-3 (Shah et al. 2024) where one of its packages is installed: `flash_attn_3`, as its
authors build it, or `fa3-fwd`, the same with the forward pass alone.

It is at its best on keys that lie one after the other, so the blocks of the sequences that prefill are first copied together: 2 % of the
time of an 8,192-token prompt's attention.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_TILE = 128  # each sequence's keys begin at a multiple of it
_DIMS = (64, 96, 128, 192, 256)
WORTH_IT = 1024  # new tokens, below which the kernel in `hopper` is faster
_MOST = 1 << 16  # tokens of context that are copied together


@cache
def package() -> tuple[str, Callable[..., tuple[torch.Tensor, ...]]] | None:
    """The package and its forward operator, which is the same in both."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    for name in ("flash_attn_3", "fa3_fwd"):
        try:
            import_module(f"{name}._C")
            return name, getattr(torch.ops, name).fwd.default
        except (ImportError, OSError, AttributeError):
            continue
    return None


def serves(q: torch.Tensor, window: int | None, lengths: Sequence[tuple[int, int]] | None) -> bool:
    """Whether `attend` takes it, and is the better one."""
    if lengths is None or window is not None or q.dtype is not torch.bfloat16 or q.shape[2] not in _DIMS or package() is None:
        return False
    return max(count for count, _ in lengths) >= WORTH_IT and _place(tuple(lengths), q.device).rows <= _MOST


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    lengths: Sequence[tuple[int, int]],
    out: torch.Tensor,
) -> None:
    """As `torch_ops.paged_attention`; rows of sequences that have but one come out as 0."""
    found = package()
    assert found is not None
    keys = _place(tuple(lengths), q.device)
    near = _gather(kv, layer, block_tables, keys).transpose(1, 2)
    if len(lengths) == 1 and lengths[0][0] == lengths[0][1]:  # spares the package a kernel that shares out the sequences' tiles
        near = near[:, None, : lengths[0][1]]
        found[1](q[None], near[0], near[1], out=out[None], softmax_scale=q.shape[2] ** -0.5, is_causal=True, num_splits=1)
        return
    found[1](
        q, near[0], near[1], out=out, cu_seqlens_q=query_start, cu_seqlens_k=keys.starts, seqused_k=keys.lens,
        max_seqlen_q=max(count for count, _ in lengths), max_seqlen_k=max(length for _, length in lengths),
        softmax_scale=q.shape[2] ** -0.5, is_causal=True, num_splits=1,
    )  # fmt: skip


class _Keys(NamedTuple):
    """Where the keys of the sequences that prefill are copied to."""

    starts: torch.Tensor  # [S + 1] int32, multiples of _TILE
    lens: torch.Tensor  # [S] int32; 0 for sequences of one row
    rows: int


@lru_cache(maxsize=4)
def _place(lengths: tuple[tuple[int, int], ...], device: torch.device) -> _Keys:
    """The same for all layers of a step, hence kept."""
    lens, starts = [], [0]
    for count, length in lengths:
        lens.append(length if count > 1 else 0)
        starts.append(starts[-1] + triton.cdiv(lens[-1], _TILE) * _TILE)
    there = torch.tensor([*starts, *lens], dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
    return _Keys(there[: len(starts)], there[len(starts) :], starts[-1])


@triton.jit(do_not_specialize=["sequences", "stride_table", "dense_stride"])
def _gather_kernel(
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
    inside, columns = tokens < length, tl.arange(0, COLUMNS)
    block = tl.load(tables + sequence.to(tl.int64) * stride_table + tokens // SIZE, mask=inside, other=0).to(tl.int64)
    place = block * stride_block + (tokens % SIZE) * DIM + (head // KV_HEADS) * stride_value + (head % KV_HEADS) * stride_head
    there = inside[:, None] & (columns < DIM)[None, :]
    values = tl.load(kv + place[:, None] + columns[None, :], mask=there, other=0.0)
    target = dense + head.to(tl.int64) * dense_stride + (row + tl.arange(0, TILE)).to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(target, values, mask=(columns < DIM)[None, :] & (tokens >= 0)[:, None])


def _gather(kv: torch.Tensor, layer: int, block_tables: torch.Tensor, keys: _Keys) -> torch.Tensor:
    """[2, Hkv, keys.rows, D]: K and V of one layer, each sequence's tokens one after the other."""
    kv_heads, size, dim = kv.shape[3:]
    dense = torch.empty((2, kv_heads, keys.rows, dim), dtype=kv.dtype, device=kv.device)
    _gather_kernel[(keys.rows // _TILE, 2 * kv_heads)](
        kv[:, layer], dense, block_tables, keys.starts, keys.lens, len(keys.lens), block_tables.stride(0),
        kv.stride(0), kv.stride(2), kv.stride(3), dense.stride(1),
        KV_HEADS=kv_heads, SIZE=size, DIM=dim, COLUMNS=triton.next_power_of_2(dim), TILE=_TILE, SEARCH=64, num_warps=4,
    )  # fmt: skip
    return dense
