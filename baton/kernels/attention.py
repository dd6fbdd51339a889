"""Attention over paged KV on CUDA (Triton, Hopper and later). Semantics: `torch_ops.paged_attention`.

    one new token a sequence: each context is split among programs (Flash-Decoding: Dao et al. 2023), and the last one to end merges the
    parts; the query heads of one KV head share a tile, so K and V are read once
    many new tokens: through FlashAttention-3's package where there is one and prompts are long (`flash`), else the kernel in Gluon
    (`hopper`), else, for fp32 and heads of other sizes, tiles of queries against the context up to them (FlashAttention-2: Dao 2023)

K and V come through the tensor memory accelerator, one block or a part of it at a time, but for the last part of a context in decode.
Grids follow from shapes and the maxima alone, so a captured graph serves any content; a program without work ends at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels import flash, hopper
from baton.kernels.scratch import counters, num_processors

MIN_BLOCK_SIZE = 16
_LOG2E = 1.4426950408889634
_LEAST = 256  # tokens that a split has at least


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode_kernel(
    q_ptr, kv, kv_ptr, tables_ptr, query_start_ptr, context_lens_ptr, out_ptr, parts_ptr, sums_ptr, counts_ptr,
    q_stride, table_stride, block_rows, layer_row, half_rows, num_splits, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)  # a block's heads lie side by side
    # The step's lists are read before the kernels before have ended: all are written before the step's embedding, an ordinary launch.
    row = tl.load(query_start_ptr + sequence).to(tl.int64)
    count = tl.load(query_start_ptr + sequence + 1) - row
    length = tl.load(context_lens_ptr + sequence)
    first = 0
    if WINDOW > 0:
        first = (tl.maximum(length - WINDOW, 0) // TILE) * TILE
    per_split = tl.maximum(tl.cdiv(tl.cdiv(length - first, num_splits), TILE) * TILE, LEAST)
    used = tl.cdiv(length - first, per_split)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if count != 1:
        return
    rows, columns, keys = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, TILE)
    heads = kv_head * GROUP + rows
    real = rows < GROUP
    target = out_ptr + (row * HEADS + heads)[:, None] * DIM + columns[None, :]
    if length == 0:
        if split == 0:
            tl.store(target, tl.zeros([PADDED, DIM], out_ptr.dtype.element_ty), mask=real[:, None])
        return
    if split >= used:
        return
    q = tl.load(q_ptr + row * q_stride + heads[:, None] * DIM + columns[None, :], mask=real[:, None], other=0.0)
    start = first + split * per_split
    end = tl.minimum(start + per_split, length)
    best = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, DIM], tl.float32)
    table = tables_ptr + sequence * table_stride
    head_row = layer_row + kv_head * BLOCK_SIZE
    whole_end = start + ((end - start) // TILE) * TILE
    if WINDOW > 0:
        whole_end = start
    for at in tl.range(start, whole_end, TILE, num_stages=STAGES):
        kv_row = tl.load(table + at // BLOCK_SIZE) * block_rows + head_row + at % BLOCK_SIZE
        scores = tl.dot(q, kv.load([kv_row, 0]).T, input_precision="ieee") * scale
        now = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(best - now)
        total = total * shrink + tl.sum(weights, axis=1)
        v = kv.load([kv_row + half_rows, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = now
    for at in tl.range(whole_end, end, TILE, num_stages=1):  # what lies behind the context may be anything: not read
        kv_row = tl.load(table + at // BLOCK_SIZE) * block_rows + head_row + at % BLOCK_SIZE
        seen = at + keys < end
        place = kv_ptr + (kv_row.to(tl.int64) + keys)[:, None] * DIM + columns[None, :]
        k = tl.load(place, mask=seen[:, None], other=0.0)
        v = tl.load(place + half_rows * DIM, mask=seen[:, None], other=0.0)
        if WINDOW > 0:
            seen = seen & (at + keys >= length - WINDOW)
        scores = tl.where(seen[None, :], tl.dot(q, k.T, input_precision="ieee") * scale, -1e30)
        now = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.exp2(best - now)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = now
    if used == 1:
        tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])
        return
    part = (sequence * HEADS + heads) * num_splits + split
    tl.store(parts_ptr + part[:, None] * DIM + columns[None, :], acc, mask=real[:, None])
    tl.store(sums_ptr + 2 * part, best, mask=real)
    tl.store(sums_ptr + 2 * part + 1, total, mask=real)
    tl.debug_barrier()
    count = counts_ptr + sequence * KV_HEADS + kv_head
    if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") < used - 1:
        return
    tl.store(count, 0)
    best = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, DIM], tl.float32)
    for index in range(used):
        part = (sequence * HEADS + heads) * num_splits + index
        their_best = tl.load(sums_ptr + 2 * part, mask=real, other=0.0, volatile=True)
        their_total = tl.load(sums_ptr + 2 * part + 1, mask=real, other=1.0, volatile=True)
        their_acc = tl.load(parts_ptr + part[:, None] * DIM + columns[None, :], mask=real[:, None], other=0.0, volatile=True)
        now = tl.maximum(best, their_best)
        mine, theirs = tl.exp2(best - now), tl.exp2(their_best - now)
        total = total * mine + their_total * theirs
        acc = acc * mine[:, None] + their_acc * theirs[:, None]
        best = now
    tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr, kv, tables_ptr, query_start_ptr, context_lens_ptr, out_ptr,
    q_stride, table_stride, block_rows, layer_row, half_rows, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    row0 = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - row0
    if (tile * ROWS >= count) | (count == 1):
        return
    length = tl.load(context_lens_ptr + sequence)
    before = length - count  # tokens that were there before the new ones
    rows, columns, keys = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    real = rows < count
    q_rows = (row0 + rows).to(tl.int64)
    q = tl.load(q_ptr + q_rows[:, None] * q_stride + head * DIM + columns[None, :], mask=real[:, None], other=0.0)
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    limit = before + rows  # the last key that each row sees
    end = tl.minimum(before + (tile + 1) * ROWS, length)
    start = 0
    whole_end = ((before + tile * ROWS + 1) // TILE) * TILE  # up to here every row sees every key
    if WINDOW > 0:
        start = (tl.maximum(before + tile * ROWS - WINDOW + 1, 0) // TILE) * TILE
        whole_end = start
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    head_row = layer_row + (head // GROUP) * BLOCK_SIZE
    for at in tl.range(start, whole_end, TILE, num_stages=STAGES):
        kv_row = tl.load(table + at // BLOCK_SIZE) * block_rows + head_row + at % BLOCK_SIZE
        scores = tl.dot(q, kv.load([kv_row, 0]).T, input_precision="ieee")
        now = tl.maximum(best, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - now[:, None])
        shrink = tl.exp2(best - now)
        total = total * shrink + tl.sum(weights, axis=1)
        v = kv.load([kv_row + half_rows, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = now
    for at in tl.range(whole_end, end, TILE, num_stages=2):
        kv_row = tl.load(table + at // BLOCK_SIZE) * block_rows + head_row + at % BLOCK_SIZE
        position = at + keys
        seen = position[None, :] <= limit[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > limit[:, None] - WINDOW)
        scores = tl.where(seen, tl.dot(q, kv.load([kv_row, 0]).T, input_precision="ieee") * scale, -1e30)
        now = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.exp2(best - now)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.where((position < length)[:, None], kv.load([kv_row + half_rows, 0]), 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = now
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + (q_rows[:, None] * HEADS + head) * DIM + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


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
    """See `torch_ops.paged_attention`; head_dim is a power of two, the block size one of at least MIN_BLOCK_SIZE, kv contiguous. Rows of no
    sequence are left as they are. `lengths`: query and context length of each sequence, where the host knows them."""
    rows, heads, dim = q.shape
    _, layers, _, kv_heads, block_size, _ = kv.shape
    sequences = context_lens.shape[0]
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    if not rows:
        return out
    group, scale, wide = heads // kv_heads, dim**-0.5 * _LOG2E, q.dtype is torch.float32
    tile = min(block_size, 32 if wide else 64)
    half_rows = kv_heads * block_size
    common = (block_tables.stride(0), layers * 2 * half_rows, layer * 2 * half_rows, half_rows)
    memory = TensorDescriptor.from_tensor(kv.view(-1, dim), [tile, dim])
    lists = (block_tables, query_start, context_lens)
    if max_query_len > 1 and flash.serves(q, window, lengths):
        flash.attend(q, kv, layer, *lists, lengths, out)
    elif max_query_len > 1 and hopper.serves(q, kv):
        hopper.attend(q, kv, layer, *lists, window, out)
    elif max_query_len > 1:
        query_tile = 32 if wide else 128 if max_query_len > 2048 or dim < 128 else 64
        _prefill_kernel[(triton.cdiv(max_query_len, query_tile), heads, sequences)](
            q, memory, *lists, out, q.stride(0), *common, scale,
            heads, group, dim, block_size, query_tile, tile, window or 0, 2, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    if lengths is not None and all(count > 1 for count, _ in lengths):
        return out
    pairs, processors = sequences * kv_heads, num_processors(q.device)
    reach = min(max_context_len, window + tile if window else max_context_len)
    splits = min(max(processors // pairs, 1), triton.cdiv(reach, _LEAST))
    parts = sums = counts = out
    if splits > 1:
        parts = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(sequences, heads, splits, 2, dtype=torch.float32, device=q.device)
        counts = counters(q.device, pairs)
    _decode_kernel[(kv_heads, sequences, splits)](
        q, memory, kv, block_tables, query_start, context_lens, out, parts, sums, counts, q.stride(0), *common, splits, scale,
        heads, group, max(16, triton.next_power_of_2(group)), dim, block_size, tile, window or 0, _LEAST,
        2 if wide or pairs >= processors else 6 if dim <= 128 else 3, num_warps=2 if dim <= 128 else 4, launch_pdl=True,
    )  # fmt: skip
    return out


def describe(dtype: torch.dtype, head_dim: int) -> str:
    """What prompts are attended by, and why."""
    if dtype is not torch.bfloat16 or head_dim not in hopper.DIMS:
        return f"Triton, since the faster ones take bf16 and heads of {' or '.join(map(str, hopper.DIMS))}"
    found = flash.package()
    return (
        "Gluon, since neither flash_attn_3 nor fa3-fwd is installed" if found is None else f"{found[0]} from {flash.WORTH_IT} tokens, Gluon"
    )
