"""Attention of many new tokens over paged KV on Hopper, in Gluon (Triton's lower level): bf16, heads of 64 or 128.

After FlashAttention-3 (Shah et al. 2024). A program has 128 (token, query head) rows that share a KV head, 64 for each of two warp groups;
a warp of its own fetches keys and values, block by block, with the bulk copy engine. While a group's tensor cores multiply, the other
group, and its own next product, hide its softmax.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DIMS = (64, 128)
ROWS = 128
_TOKENS = 128
_STAGES = 2
_HALF = 64  # columns of a shared buffer: 128 bytes, the widest swizzle


@gluon.jit
def _fetch_tile(
    desc, kv, table, tile, context, first_row, block_rows, outside, low_half, high_half, full,
    SIZE: gl.constexpr, BOX: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr, CLEAN: gl.constexpr,
):  # fmt: skip
    """One tile of keys or values → low_half, high_half [TOKENS, 64]. Boxes past the context become zeros; with CLEAN so do the rows past it
    in the box that it ends in, which the warp then copies itself."""
    begin = tile * TOKENS
    box_bytes: gl.constexpr = BOX * DIM * 2
    ragged = CLEAN and ((context % BOX != 0) and (context < begin + TOKENS))
    if CLEAN:
        if ragged:
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
            offsets = gl.arange(0, BOX, gl.SliceLayout(1, layout))
            columns = gl.arange(0, 64, gl.SliceLayout(0, layout))
            for i in gl.static_range(TOKENS // BOX):
                token = begin + i * BOX
                if (token < context) & (token + BOX > context):
                    block = gl.load(table + token // SIZE)
                    row = (block * block_rows + first_row + token % SIZE).to(gl.int64)
                    place = kv + (row + offsets)[:, None] * DIM + columns[None, :]
                    inside = (token + offsets < context)[:, None] & (columns >= 0)[None, :]
                    low_half.slice(i * BOX, BOX).store(gl.load(place, mask=inside, other=0.0))
                    if DIM == 128:
                        high_half.slice(i * BOX, BOX).store(gl.load(place + 64, mask=inside, other=0.0))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.expect(full, TOKENS * DIM * 2 - box_bytes)
        else:
            mbarrier.expect(full, TOKENS * DIM * 2)
    else:
        mbarrier.expect(full, TOKENS * DIM * 2)
    for i in gl.static_range(TOKENS // BOX):
        token = begin + i * BOX
        block = gl.load(table + token // SIZE, mask=token < context, other=0)
        row = gl.where(token < context, block * block_rows + first_row + token % SIZE, outside)
        wanted = True
        if CLEAN:
            wanted = (not ragged) or (token + BOX <= context) or (token >= context)
        tma.async_copy_global_to_shared(desc, [row, 0], full, low_half.slice(i * BOX, BOX), pred=wanted)
        if DIM == 128:
            tma.async_copy_global_to_shared(desc, [row, 64], full, high_half.slice(i * BOX, BOX), pred=wanted)


@gluon.jit
def _fetch(
    desc, kv, table, tiles, first_tile, context, key_row, value_row, block_rows, outside, keys, values, key_full, key_free, value_full,
    value_free,
    SIZE: gl.constexpr, BOX: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for j in range(tiles):
        stage, phase = j % STAGES, (j // STAGES) & 1
        mbarrier.wait(key_free.index(stage), phase ^ 1)
        _fetch_tile(
            desc, kv, table, first_tile + j, context, key_row, block_rows, outside, keys.index(2 * stage), keys.index(2 * stage + 1),
            key_full.index(stage), SIZE, BOX, TOKENS, DIM, False,
        )  # fmt: skip
        mbarrier.wait(value_free.index(stage), phase ^ 1)
        _fetch_tile(
            desc, kv, table, first_tile + j, context, value_row, block_rows, outside, values.index(2 * stage), values.index(2 * stage + 1),
            value_full.index(stage), SIZE, BOX, TOKENS, DIM, True,
        )  # fmt: skip


@gluon.jit
def _scores(queries, keys, full, j, STAGES: gl.constexpr, DIM: gl.constexpr, layout: gl.constexpr, TOKENS: gl.constexpr):
    """Starts q · kᵀ of the j-th tile."""
    stage = j % STAGES
    mbarrier.wait(full.index(stage), (j // STAGES) & 1)
    zero = gl.zeros([64, TOKENS], gl.float32, layout)
    scores = warpgroup_mma(queries.index(0), keys.index(2 * stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if DIM == 128:
        scores = warpgroup_mma(queries.index(1), keys.index(2 * stage + 1).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _softmax(
    scores, peak, total, tile, full_tiles, seen_from, positions, scale, WINDOW: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr
):
    if (tile >= full_tiles) | WINDOW:
        tokens = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
        seen = tokens[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] >= seen_from[:, None])
        scores = gl.where(seen, scores, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    weights = gl.exp2(scores * scale - (new_peak * scale)[:, None])
    shrink = gl.exp2((peak - new_peak) * scale)
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend(
    part: gl.constexpr, q, out, head, first, offset, count, before, window, scale, stride_q, stride_q_head, stride_out, stride_out_head,
    tiles, first_tile, full_tiles, queries, keys, values, key_full, key_free, value_full, value_free,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows; part says which."""
    load: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    kept: gl.constexpr = 128 // GROUP

    rows = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, load))
    token = offset + rows // GROUP
    inside = (token < count) & (rows // GROUP < kept)
    place = q + ((first + token).to(gl.int64) * stride_q + (head * GROUP + rows % GROUP) * stride_q_head)[:, None]
    place += gl.arange(0, 64, gl.SliceLayout(0, load))[None, :]
    there = inside[:, None] & (gl.arange(0, 64, gl.SliceLayout(0, load)) >= 0)[None, :]
    queries.index(0).store(gl.load(place, mask=there, other=0.0))
    if DIM == 128:
        queries.index(1).store(gl.load(place + 64, mask=there, other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    rows = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    positions = before + gl.minimum(offset + rows // GROUP, count - 1)
    seen_from = positions - window + 1
    peak = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, wide))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, wide))
    low = gl.zeros([64, 64], gl.float32, narrow)
    high = gl.zeros([64, 64], gl.float32, narrow)

    token_of_scores = _scores(queries, keys, key_full, 0, STAGES, DIM, wide, TOKENS)
    scores = warpgroup_mma_wait(0, deps=(token_of_scores,))
    mbarrier.arrive(key_free.index(0), count=1)
    weights, peak, total, shrink = _softmax(scores, peak, total, first_tile, full_tiles, seen_from, positions, scale, WINDOW, TOKENS, wide)
    for j in range(1, tiles):
        stage = (j - 1) % STAGES
        part_weights = gl.convert_layout(weights.to(gl.bfloat16), operand)
        token_of_scores = _scores(queries, keys, key_full, j, STAGES, DIM, wide, TOKENS)
        mbarrier.wait(value_full.index(stage), ((j - 1) // STAGES) & 1)
        low_token = warpgroup_mma(part_weights, values.index(2 * stage), low, is_async=True)
        if DIM == 128:
            high_token = warpgroup_mma(part_weights, values.index(2 * stage + 1), high, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(token_of_scores,))
        else:
            scores = warpgroup_mma_wait(1, deps=(token_of_scores,))
        mbarrier.arrive(key_free.index(j % STAGES), count=1)
        weights, peak, total, shrink = _softmax(
            scores, peak, total, first_tile + j, full_tiles, seen_from, positions, scale, WINDOW, TOKENS, wide
        )  # fmt: skip
        factor = gl.convert_layout(shrink, gl.SliceLayout(1, narrow))[:, None]
        if DIM == 128:
            low, high = warpgroup_mma_wait(0, deps=(low_token, high_token))
            mbarrier.arrive(value_free.index(stage), count=1)
            low, high = low * factor, high * factor
        else:
            low = warpgroup_mma_wait(0, deps=(low_token,))
            mbarrier.arrive(value_free.index(stage), count=1)
            low = low * factor
    stage = (tiles - 1) % STAGES
    part_weights = gl.convert_layout(weights.to(gl.bfloat16), operand)
    mbarrier.wait(value_full.index(stage), ((tiles - 1) // STAGES) & 1)
    low = warpgroup_mma(part_weights, values.index(2 * stage), low)
    if DIM == 128:
        high = warpgroup_mma(part_weights, values.index(2 * stage + 1), high)

    norm = gl.convert_layout(1.0 / gl.where(total > 0, total, 1.0), gl.SliceLayout(1, narrow))[:, None]
    rows = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, narrow))
    columns = gl.arange(0, 64, gl.SliceLayout(0, narrow))
    token = offset + rows // GROUP
    inside = ((token < count) & (rows // GROUP < kept))[:, None] & (columns >= 0)[None, :]
    place = out + ((first + token).to(gl.int64) * stride_out + (head * GROUP + rows % GROUP) * stride_out_head)[:, None] + columns[None, :]
    gl.store(place, (low * norm).to(gl.bfloat16), mask=inside)
    if DIM == 128:
        gl.store(place + 64, (high * norm).to(gl.bfloat16), mask=inside)


@gluon.jit(do_not_specialize=["window", "sequences", "stride_table", "layer_row"])
def _prefill(
    desc, kv, q, out, tables, starts, lens, scale, window, stride_q, stride_q_head, stride_out, stride_out_head, stride_table, sequences,
    layer_row, block_rows, outside,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, WINDOW: gl.constexpr, SIZE: gl.constexpr, BOX: gl.constexpr,
    DIM: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, SEARCH: gl.constexpr,
):  # fmt: skip
    """Grid (tiles of all sequences, KV heads); sequences of one row are left alone. desc: kv as [all rows, DIM], in boxes [BOX, 64]; a
    block has block_rows rows, layer_row is the layer's first in it, `outside` is past the last."""
    kept: gl.constexpr = 128 // GROUP
    tile, head = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    sequence = -1
    for base in range(0, sequences, SEARCH):
        numbers = base + gl.arange(0, SEARCH, line)
        begins = gl.load(starts + numbers, mask=numbers < sequences, other=0) // kept + numbers
        sequence += gl.sum(((begins <= tile) & (numbers < sequences)).to(gl.int32), 0)
    first = gl.load(starts + sequence)
    count = gl.load(starts + sequence + 1) - first
    context = gl.load(lens + sequence)
    offset = (tile - first // kept - sequence) * kept
    if (count > 1) & (context > 0) & (offset < count):
        before = context - count
        high = before + gl.minimum(offset + kept, count)
        full_tiles = (before + offset + 1) // TOKENS
        first_tile = 0
        if WINDOW:
            first_tile = gl.maximum(before + offset + 1 - window, 0) // TOKENS
        tiles = gl.cdiv(high, TOKENS) - first_tile

        layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        first_queries = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], layout)
        second_queries = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], layout)
        keys = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, TOKENS, 64], layout)
        values = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, TOKENS, 64], layout)
        key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(key_full.index(i), count=1)
            mbarrier.init(value_full.index(i), count=1)
            mbarrier.init(key_free.index(i), count=2)
            mbarrier.init(value_free.index(i), count=2)
        fence_async_shared()

        table = tables + sequence.to(gl.int64) * stride_table
        key_row = layer_row + head * SIZE
        value_row = key_row + KV_HEADS * SIZE
        gl.warp_specialize(
            [
                (_attend, (
                    0, q, out, head, first, offset, count, before, window, scale, stride_q, stride_q_head, stride_out, stride_out_head,
                    tiles, first_tile, full_tiles, first_queries, keys, values, key_full, key_free, value_full, value_free,
                    GROUP, WINDOW, TOKENS, DIM, STAGES,
                )),
                (_attend, (
                    1, q, out, head, first, offset, count, before, window, scale, stride_q, stride_q_head, stride_out, stride_out_head,
                    tiles, first_tile, full_tiles, second_queries, keys, values, key_full, key_free, value_full, value_free,
                    GROUP, WINDOW, TOKENS, DIM, STAGES,
                )),
                (_fetch, (
                    desc, kv, table, tiles, first_tile, context, key_row, value_row, block_rows, outside, keys, values, key_full, key_free,
                    value_full, value_free, SIZE, BOX, TOKENS, DIM, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def serves(q: torch.Tensor, kv: torch.Tensor) -> bool:
    """Whether `attend` takes it."""
    (kv_heads, size, dim), numbers = kv.shape[3:], q.shape[1] // kv.shape[3]
    shapes = dim in DIMS and 8 <= size <= _TOKENS and numbers <= ROWS and kv_heads * numbers == q.shape[1]
    if not (q.is_cuda and q.dtype == kv.dtype == torch.bfloat16 and shapes and kv.is_contiguous() and kv.numel() // dim < 2**31):
        return False
    return torch.cuda.get_device_capability(q.device)[0] == 9


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """As `torch_ops.paged_attention`, for the sequences of more than one row."""
    (heads, dim), (layers, _, kv_heads, size) = q.shape[1:], kv.shape[1:5]
    sequences, group = context_lens.shape[0], heads // kv_heads
    flat = kv.view(-1, dim)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    desc = TensorDescriptor(flat, list(flat.shape), [dim, 1], [size, _HALF], layout)
    _prefill[(q.shape[0] // (ROWS // group) + sequences, kv_heads)](
        desc, kv, q, out, block_tables, query_start, context_lens, dim**-0.5 * 1.4426950408889634, window or 0,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_tables.stride(0), sequences,
        layer * 2 * kv_heads * size, layers * 2 * kv_heads * size, flat.shape[0],
        GROUP=group, KV_HEADS=kv_heads, WINDOW=window is not None, SIZE=size, BOX=size, DIM=dim,
        TOKENS=_TOKENS, STAGES=_STAGES, SEARCH=128, num_warps=4,
    )  # fmt: skip
