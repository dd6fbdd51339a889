"""Products with weights on CUDA. With few rows they are bound by reading the weight: own kernels (Triton) whose start overlaps the end of
the kernel before (programmatic dependent launch), which cuBLAS's do not; with many rows, cuBLAS.

A weight's tile is the left operand, so that its rows fill the tensor core's 64 and the few rows of x its 16 or more columns. Where its rows
give too few programs the columns are split, too; the parts are added in order by the last program to end, so results repeat.
Choices were measured on an H200 (benchmarks/results/engine-h200.md).
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels import fused
from baton.kernels.scratch import counters

_MAX_ROWS = 64  # of x; cuBLAS is faster beyond
_MAX_SIZE_OUT = 32768  # and where the weight alone fills every processor for long
_TILE_IN = 128


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """[size_out, size_in], as loaded."""

    tensor: torch.Tensor
    _descriptors: dict[int, TensorDescriptor] = field(default_factory=dict[int, TensorDescriptor])

    def descriptor(self, tile_out: int) -> TensorDescriptor:
        if tile_out not in self._descriptors:
            self._descriptors[tile_out] = TensorDescriptor.from_tensor(self.tensor, [tile_out, _TILE_IN])
        return self._descriptors[tile_out]


def pack(weight: torch.Tensor) -> Weight:
    return Weight(weight.detach())


def embedding(weight: Weight, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows token_ids [T] of the weight → [T, size_in]."""
    return functional.embedding(token_ids, weight.tensor)


@triton.jit
def _linear_kernel(
    x_ptr, weight, bias_ptr, out_ptr, parts_ptr, counts_ptr, num_rows, size_out, size_in, x_stride, per_split,
    ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    columns, rows, depth = tile * TILE_OUT + tl.arange(0, TILE_OUT), tl.arange(0, ROWS), tl.arange(0, TILE_IN)
    inside = (rows < num_rows)[None, :] & (columns < size_out)[:, None]
    tl.extra.cuda.gdc_wait()
    acc = tl.zeros([TILE_OUT, ROWS], tl.float32)
    for at in tl.range(split * per_split, (split + 1) * per_split, TILE_IN, num_stages=STAGES):
        w = weight.load([tile * TILE_OUT, at])
        x = tl.load(x_ptr + rows[:, None] * x_stride + at + depth[None, :], mask=(rows < num_rows)[:, None], other=0.0)
        acc = tl.dot(w, x.T, acc)
    tl.extra.cuda.gdc_launch_dependents()
    place = rows[None, :] * size_out + columns[:, None]
    if SPLITS > 1:
        tl.store(parts_ptr + split * num_rows * size_out + place, acc, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(counts_ptr + tile, 0)
        acc = tl.zeros([TILE_OUT, ROWS], tl.float32)
        for index in tl.static_range(SPLITS):
            acc += tl.load(parts_ptr + index * num_rows * size_out + place, mask=inside, other=0.0, volatile=True)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < size_out, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, size_in], rows contiguous · weightᵀ + bias [size_out] → [T, size_out]."""
    rows, (size_out, size_in) = x.shape[0], weight.tensor.shape
    if not _is_ours(x, rows, size_in) or size_out > _MAX_SIZE_OUT:
        return functional.linear(x, weight.tensor, bias)
    tile_out = 128 if size_out >= 16384 and rows <= 16 else 64
    tiles = triton.cdiv(size_out, tile_out)
    most = 4 if rows <= 16 else 2
    splits = next(s for s in (4, 2, 1) if s <= most and (tiles * s <= 400 or s == 1) and size_in % (s * _TILE_IN) == 0)
    out = torch.empty(rows, size_out, dtype=x.dtype, device=x.device)
    parts = torch.empty(splits, rows, size_out, dtype=torch.float32, device=x.device) if splits > 1 else out
    _linear_kernel[(tiles, splits)](
        x, weight.descriptor(tile_out), x if bias is None else bias, out, parts, counters(x.device, tiles), rows, size_out, size_in,
        x.stride(0), size_in // splits, max(16, triton.next_power_of_2(rows)), tile_out, _TILE_IN, splits, bias is not None,
        3 if tiles >= 96 else 5 if rows <= 32 else 4, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


@triton.jit
def _gated_kernel(
    x_ptr, weight, out_ptr, num_rows, size, size_in, x_stride,
    ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    columns, rows, depth = tile * TILE_OUT + tl.arange(0, TILE_OUT), tl.arange(0, ROWS), tl.arange(0, TILE_IN)
    tl.extra.cuda.gdc_wait()
    gate = tl.zeros([TILE_OUT, ROWS], tl.float32)
    up = tl.zeros([TILE_OUT, ROWS], tl.float32)
    for at in tl.range(0, size_in, TILE_IN, num_stages=STAGES):
        x = tl.load(x_ptr + rows[:, None] * x_stride + at + depth[None, :], mask=(rows < num_rows)[:, None], other=0.0).T
        gate = tl.dot(weight.load([tile * TILE_OUT, at]), x, gate)
        up = tl.dot(weight.load([size + tile * TILE_OUT, at]), x, up)
    tl.extra.cuda.gdc_launch_dependents()
    dtype = out_ptr.dtype.element_ty
    wide = gate.to(dtype).to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(dtype).to(tl.float32)
    tl.store(
        out_ptr + rows[None, :] * size + columns[:, None],
        (activated * up.to(dtype).to(tl.float32)).to(dtype),
        mask=(rows < num_rows)[None, :],
    )


def gated(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up of x [T, size_in] · weight [2I, size_in]ᵀ + bias [2I] → [T, I]."""
    rows, (size_out, size_in) = x.shape[0], weight.tensor.shape
    size = size_out // 2
    if bias is not None or size % 64 or not _is_ours(x, rows, size_in):
        return fused.silu_mul(linear(x, weight, bias))
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    _gated_kernel[(size // 64,)](
        x, weight.descriptor(64), out, rows, size, size_in, x.stride(0), max(16, triton.next_power_of_2(rows)), 64, _TILE_IN,
        3 if rows <= 16 else 4, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


def _is_ours(x: torch.Tensor, rows: int, size_in: int) -> bool:
    return 0 < rows <= _MAX_ROWS and x.dtype is torch.bfloat16 and size_in % _TILE_IN == 0
