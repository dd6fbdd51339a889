"""Paged attention in Triton. Twin in torch_ops.py.

Two kernels, and a batch may need both; each leaves the other's sequences alone, which it sees from query_start:

- `_decode`: sequences with few query rows. One program has one chunk of one KV head's context, and all query rows that share the head
  (Flash-Decoding, Dao et al. 2023). Of a sequence's programs the last to finish merges the partial results.
- `_prefill`: sequences with many. One program has a tile of (token, query head) rows that share a KV head and walks the context
  (FlashAttention-2, Dao 2023). On Hopper, hopper.py does it for bf16.

Nothing of a launch depends on the tensors' contents, so launches can be captured: with max_context_len an upper bound, what is beyond a
sequence's real length exits at once.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
import torch
import triton
import triton.language as tl

_DECODE_ROWS = 16  # the fewest rows that tensor cores multiply
_MAX_CHUNKS = 64
_LEAST_CHUNK = 256  # tokens
_PROGRAMS_AT_ONCE = 3  # of _decode, on one multiprocessor


@triton.jit
def _attend(
    q, acc, peak, total, keys, value_offset, table, positions, low, high, stride_block, scale, window,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the context's tokens low … high - 1 for q [rows, COLUMNS], in powers of two; scale includes log2(e).

    MASK False: the range is whole tiles, all of which every row sees. keys points at the layer and head in block 0.
    """
    columns = tl.arange(0, COLUMNS)
    for start in tl.range(low, high, TOKENS, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS)
        if MASK:
            block = tl.load(table + tokens // SIZE, mask=tokens < high, other=0).to(tl.int64)
        else:
            block = tl.load(table + tokens // SIZE).to(tl.int64)
        place = keys + (block * stride_block + (tokens % SIZE) * DIM)[:, None] + columns[None, :]
        if MASK or COLUMNS != DIM:
            there = (tokens < high)[:, None] & (columns < DIM)[None, :]
            key = tl.load(place, mask=there, other=0.0)
            value = tl.load(place + value_offset, mask=there, other=0.0)
        else:
            key = tl.load(place)
            value = tl.load(place + value_offset)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        if MASK:
            seen = (tokens[None, :] <= positions[:, None]) & (tokens < high)[None, :]
            if WINDOW:
                seen = seen & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            anchor = new_peak
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _merge(
    area, sums, out, count, active, stride_out, stride_out_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, SHARE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes `count` tokens' GROUP heads from `active` partial results: area [chunks, ROWS, COLUMNS], sums [chunks, ROWS]. Read past the
    first-level cache, which other programs' writes do not reach."""
    heads, every, columns = tl.arange(0, SHARE), tl.arange(0, MOST), tl.arange(0, COLUMNS)
    real_heads, real_columns = heads < GROUP, columns < DIM
    for number in range(count):
        row = number * GROUP + heads
        known = (every < active)[:, None] & real_heads[None, :]
        logs = tl.load(sums + every[:, None] * ROWS + row[None, :], mask=known, other=-float("inf"), cache_modifier=".cg")
        peak = tl.max(logs, 0)
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logs - anchor[None, :]), 0)
        merged = tl.zeros((SHARE, COLUMNS), tl.float32)
        for start in range(0, active, AT_ONCE):
            part = start + tl.arange(0, AT_ONCE)
            there = (part < active)[:, None] & real_heads[None, :]
            shares = tl.load(sums + part[:, None] * ROWS + row[None, :], mask=there, other=-float("inf"), cache_modifier=".cg")
            place = part[:, None, None] * (ROWS * COLUMNS) + row[None, :, None] * COLUMNS + columns[None, None, :]
            values = tl.load(area + place, mask=there[:, :, None] & real_columns[None, None, :], other=0.0, cache_modifier=".cg")
            merged += tl.sum(values * tl.exp2(shares - anchor[None, :])[:, :, None], 0)
        merged = merged / tl.where(total > 0, total, 1.0)[:, None]
        target = out + number * stride_out + heads[:, None] * stride_out_head + columns[None, :]
        tl.store(target, merged.to(out.dtype.element_ty), mask=real_heads[:, None] & real_columns[None, :])


@triton.jit(do_not_specialize=["window", "chunks", "stride_table"])
def _decode(
    q, kv, out, partial, counters, tables, starts, lens, scale, window, stride_q, stride_q_head, stride_out, stride_out_head,
    stride_table, stride_block, stride_value, stride_head, chunks,
    GROUP: tl.constexpr, FEW: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, MOST: tl.constexpr,
    SHARE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, chunks, sequences). partial: [sequences, KV heads, chunks, ROWS, COLUMNS + 1] fp32, the last column log2 of the sum;
    counters [sequences, KV heads] int32, zero before and after."""
    head, chunk, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first
    context = tl.load(lens + sequence)
    if (count < 1) | (count > FEW) | (context < 1):
        return
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - count + 1 - window, 0) // TOKENS * TOKENS
    span = tl.maximum(tl.cdiv(tl.cdiv(context - begin, chunks), TOKENS) * TOKENS, LEAST)
    low = begin + chunk * span
    if low >= context:
        return
    high = tl.minimum(low + span, context)
    active = tl.cdiv(context - begin, span)

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token, query_head = rows // GROUP, head * GROUP + rows % GROUP
    inside = (token < count)[:, None] & (columns < DIM)[None, :]
    place = (first + token).to(tl.int64) * stride_q + query_head * stride_q_head
    query = tl.load(q + place[:, None] + columns[None, :], mask=inside, other=0.0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    peak, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    keys, table = kv + head.to(tl.int64) * stride_head, tables + sequence.to(tl.int64) * stride_table
    positions = tl.minimum(context - count + token, context - 1)
    acc, peak, total = _attend(
        query, acc, peak, total, keys, stride_value, table, positions, low, high, stride_block, scale, window,
        True, WINDOW, SIZE, DIM, COLUMNS, TOKENS, PRECISION, STAGES,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (first + token).to(tl.int64) * stride_out + query_head * stride_out_head
    target = out + place[:, None] + columns[None, :]
    if active == 1:
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
        return

    pair = (sequence * tl.num_programs(0) + head).to(tl.int64)
    area = partial + pair * chunks * (ROWS * COLUMNS + ROWS)
    sums = area + chunks * (ROWS * COLUMNS)
    weight = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(area + chunk * (ROWS * COLUMNS) + rows[:, None] * COLUMNS + columns[None, :], acc, mask=inside)
    tl.store(sums + chunk * ROWS + rows, weight)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
    if arrived != active - 1:
        return
    tl.debug_barrier()
    tl.store(counters + pair, 0)
    _merge(
        area, sums, out + first.to(tl.int64) * stride_out + head.to(tl.int64) * GROUP * stride_out_head, count, active, stride_out,
        stride_out_head, GROUP, DIM, COLUMNS, ROWS, MOST, SHARE, AT_ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "sequences", "stride_table"])
def _prefill(
    q, kv, out, tables, starts, lens, scale, window, stride_q, stride_q_head, stride_out, stride_out_head,
    stride_table, stride_block, stride_value, stride_head, sequences,
    GROUP: tl.constexpr, FEW: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all sequences, KV heads). Each sequence has one tile more than whole tiles fit below its last row's number, at most;
    tiles in excess exit. The last tiles, which have the longest contexts, come first."""
    queries: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = -1
    for base in range(0, sequences, SEARCH):
        numbers = base + tl.arange(0, SEARCH)
        begins = tl.load(starts + numbers, mask=numbers < sequences, other=0) // queries + numbers
        sequence += tl.sum(((begins <= tile) & (numbers < sequences)).to(tl.int32), 0)
    first = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first
    context = tl.load(lens + sequence)
    offset = (tile - first // queries - sequence) * queries
    if (count <= FEW) | (context < 1) | (offset >= count):
        return

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token, query_head = offset + rows // GROUP, head * GROUP + rows % GROUP
    owned = (rows // GROUP < queries) & (token < count)
    inside = owned[:, None] & (columns < DIM)[None, :]
    place = (first + token).to(tl.int64) * stride_q + query_head * stride_q_head
    query = tl.load(q + place[:, None] + columns[None, :], mask=inside, other=0.0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    peak, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    keys, table = kv + head.to(tl.int64) * stride_head, tables + sequence.to(tl.int64) * stride_table
    before = context - count
    positions = before + tl.minimum(token, count - 1)
    high = before + tl.minimum(offset + queries, count)
    low = 0
    if WINDOW:
        low = tl.maximum(before + offset + 1 - window, 0) // TOKENS * TOKENS
        middle = low
    else:
        middle = (before + offset + 1) // TOKENS * TOKENS
        acc, peak, total = _attend(
            query, acc, peak, total, keys, stride_value, table, positions, low, middle, stride_block, scale, window,
            False, False, SIZE, DIM, COLUMNS, TOKENS, PRECISION, STAGES,
        )  # fmt: skip
    acc, peak, total = _attend(
        query, acc, peak, total, keys, stride_value, table, positions, middle, high, stride_block, scale, window,
        True, WINDOW, SIZE, DIM, COLUMNS, TOKENS, PRECISION, STAGES,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (first + token).to(tl.int64) * stride_out + query_head * stride_out_head
    tl.store(out + place[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


@cache
def _hopper() -> ModuleType | None:
    """The module for Hopper, where Triton is new enough for it."""
    try:
        return import_module("baton.kernels.hopper")
    except ImportError:
        return None


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _chunks(pairs: int, most: int, slots: int) -> int:
    """How many chunks (at most `most`) a context is cut into, so that programs of (pair of sequence and KV head, chunk) fill the chip's
    slots in nearly whole rounds."""

    def waste(chunks: int) -> float:
        return triton.cdiv(pairs * chunks, slots) * slots / (pairs * chunks)

    counts = range(1, most + 1)
    return next((chunks for chunks in counts if waste(chunks) <= 1.06), min(counts, key=waste))


def _decode_chunks(pairs: int, longest: int, device: torch.device) -> int:
    most = max(1, min(_MAX_CHUNKS, triton.cdiv(longest, _LEAST_CHUNK)))
    return _chunks(pairs, most, _PROGRAMS_AT_ONCE * _multiprocessors(device))


def _decode_options(wide: bool, columns: int) -> dict[str, int]:
    return {"TOKENS": 32 if wide else 128 if columns <= 128 else 64, "STAGES": 3, "num_warps": 4}


def _prefill_options(wide: bool, columns: int) -> dict[str, int]:
    if wide:
        return {"ROWS": 32, "TOKENS": 32, "STAGES": 2, "num_warps": 4}
    return {"ROWS": 128, "TOKENS": 32 if columns > 128 else 128, "STAGES": 2, "num_warps": 8}


def _counters(pairs: int) -> int:
    """Length of the workspace's first part, which keeps the second aligned."""
    return triton.cdiv(pairs, 64) * 64


def decode_workspace(sequences: int, kv_heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """fp32 zeros for paged_attention's `workspace` with at most so many sequences; calls that may run at once must not share it."""
    columns = triton.next_power_of_2(head_dim)
    parts = max(s * kv_heads * _decode_chunks(s * kv_heads, 1 << 30, device) for s in range(1, sequences + 1))
    return torch.zeros(_counters(sequences * kv_heads) + parts * _DECODE_ROWS * (columns + 1), dtype=torch.float32, device=device)


def few_queries(q: torch.Tensor, kv: torch.Tensor) -> int:
    """Most query rows of a sequence that attend_few serves."""
    return max(1, _DECODE_ROWS * kv.shape[3] // q.shape[1])


def _common(
    q: torch.Tensor, kv: torch.Tensor, block_tables: torch.Tensor, window: int | None, out: torch.Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """What both kernels take: the scalars and strides, the constants."""
    (heads, dim), (kv_heads, size) = q.shape[1:], kv.shape[3:5]
    scalars = [dim**-0.5 * 1.4426950408889634, window or 0, q.stride(0), q.stride(1), out.stride(0), out.stride(1)]
    strides = [block_tables.stride(0), kv.stride(0), kv.stride(2), kv.stride(3)]
    constants = {
        "GROUP": heads // kv_heads,
        "FEW": few_queries(q, kv),
        "WINDOW": window is not None,
        "SIZE": size,
        "DIM": dim,
        "COLUMNS": triton.next_power_of_2(dim),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    return scalars + strides, constants


def attend_few(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    window: int | None,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """paged_attention for those sequences that have at most few_queries rows; the others' rows stay as they are."""
    sequences, kv_heads = context_lens.shape[0], kv.shape[3]
    scalars, constants = _common(q, kv, block_tables, window, out)
    group, columns = constants["GROUP"], constants["COLUMNS"]
    pairs, rows = sequences * kv_heads, max(_DECODE_ROWS, triton.next_power_of_2(group))
    chunks = _decode_chunks(pairs, max_context_len, q.device)
    if workspace is None:
        needed = _counters(pairs) + pairs * chunks * rows * (columns + 1) if chunks > 1 else 0
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
        workspace[:pairs].zero_()
    partial, counters = workspace[_counters(pairs) :], workspace[: _counters(pairs)].view(torch.int32)
    share = triton.next_power_of_2(group)
    _decode[(kv_heads, chunks, sequences)](
        q, kv[:, layer], out, partial, counters, block_tables, query_start, context_lens, *scalars, chunks, **constants,
        ROWS=rows, LEAST=_LEAST_CHUNK, MOST=_MAX_CHUNKS, SHARE=share, AT_ONCE=max(1, min(_MAX_CHUNKS, 8192 // (share * columns))),
        **_decode_options(q.dtype == torch.float32, columns),
    )  # fmt: skip


def attend_many(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """paged_attention for those sequences that have more than few_queries rows; the others' rows stay as they are."""
    hopper = _hopper()
    if hopper and hopper.serves(q, kv):
        hopper.attend_many(q, kv, layer, block_tables, query_start, context_lens, few_queries(q, kv), window, out)
        return
    sequences, kv_heads = context_lens.shape[0], kv.shape[3]
    scalars, constants = _common(q, kv, block_tables, window, out)
    options = _prefill_options(q.dtype == torch.float32, constants["COLUMNS"])
    options["ROWS"] = max(options["ROWS"], triton.next_power_of_2(constants["GROUP"]))
    tiles = q.shape[0] // (options["ROWS"] // constants["GROUP"]) + sequences
    _prefill[(tiles, kv_heads)](
        q, kv[:, layer], out, block_tables, query_start, context_lens, *scalars, sequences, **constants, SEARCH=64, **options
    )  # fmt: skip


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
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """As torch_ops.paged_attention, but rows of sequences without context and rows past the last sequence are not written.

    Heads and rows of q and out may lie apart; max_query_len and max_context_len are upper bounds. workspace: from decode_workspace, kept by
    the caller; without one, memory is taken and zeroed in each call that needs it.
    """
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    sequences, few = context_lens.shape[0], few_queries(q, kv)
    if not q.shape[0] or not sequences:
        return result
    lists = (block_tables, query_start, context_lens)
    if max_query_len <= few or sequences > 1:
        attend_few(q, kv, layer, *lists, max_context_len, window, result, workspace)
    if max_query_len > few:
        attend_many(q, kv, layer, *lists, window, result)
    return result
