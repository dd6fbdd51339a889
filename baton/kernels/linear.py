"""Products with a weight, x · weightᵀ, for the rows of a decode step. Weights stay as checkpoints have them: [N, K], row-major.

Two CUDA kernels for Hopper, compiled at first use: skinny.cu to 32 rows, wide.cu (wgmma) from there; elsewhere, and where the library's
product is the better one, torch's. Both give a row of the weight to one block, or to the blocks of a cluster, whose sums are added in their
order: the same bits in each run.
"""

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from baton.kernels import blas, fused
from baton.kernels.nvrtc import CudaError, Kernel, TensorMap, compile_source, tensor_map

SHARED = 203 * 1024  # bytes of an SM's 227 KiB for the ring, so that the small kernels between two products fit beside
OVERLAP = True  # launches may start before the kernel before them has ended; they wait for it themselves
SOURCES, ARCH = Path(__file__).parent, "sm_90a"


class Skinny(NamedTuple):
    """The macros of skinny.cu; see there. alias: one tile a block, its sums lie in the ring's memory."""

    rows: int
    tokens: int
    warps_n: int
    warps_k: int
    block_k: int
    alias: int = 1

    @property
    def stage_bytes(self) -> int:
        return self.block_k * 2 * (self.rows + self.tokens)

    @property
    def sums_bytes(self) -> int:
        return self.warps_k * self.tokens * (self.rows + 4) * 4

    @property
    def depth(self) -> int:
        return min(16, (SHARED - (0 if self.alias else self.sums_bytes)) // self.stage_bytes)

    @property
    def shared(self) -> int:
        ring = self.depth * self.stage_bytes
        return max(ring, self.sums_bytes) if self.alias else ring + self.sums_bytes

    @property
    def threads(self) -> int:
        return (self.warps_n * self.warps_k + 1) * 32


class Wide(NamedTuple):
    """The macros of wide.cu; see there. share: blocks of a cluster, which have a part of K each."""

    rows: int
    tokens: int
    boxes: int = 1
    split: int = 1
    share: int = 1

    @property
    def stages(self) -> tuple[int, int]:
        """Buffers of weights and of x: as many of both as there is room for; with few rows of x, what is left is for more weights."""
        room, w_bytes, x_bytes = SHARED - self.mail, self.boxes * 128 * self.rows, self.boxes * 128 * self.tokens
        both = min(16, room // (w_bytes + x_bytes))
        return min(16, (room - both * x_bytes) // w_bytes) if self.tokens == 64 else both, both

    @property
    def mail(self) -> int:
        """Bytes for the sums that the cluster's other blocks send."""
        return (self.share - 1) * self.rows // self.share * self.tokens * 4

    @property
    def shared(self) -> int:
        w, x = self.stages
        return self.boxes * 128 * (w * self.rows + x * self.tokens) + self.mail

    @property
    def threads(self) -> int:
        return self.tokens * 2 * self.split + 64


# Rows of the weight a block takes → how its warps share a tile: (warps over rows, warps over K, K per stage).
SHAPES = {
    16: (1, 8, 512),
    32: (2, 4, 256),
    48: (3, 4, 128),
    64: (4, 2, 128),
    96: (6, 2, 128),
    112: (7, 1, 64),
    128: (8, 1, 64),
    224: (7, 1, 64),
}
_ROUNDS = 3  # from more on, as for a vocabulary, shorter tiles are better than few
WIDE_ROWS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 232, 248, 256)


def _skinny(tokens: int, outputs: int, pair: bool, processors: int) -> Skinny | None:
    width = next(t for t in (8, 16, 32) if tokens <= t)
    best: tuple[float, Skinny] | None = None
    for rows, (warps_n, warps_k, block) in SHAPES.items():
        if pair and rows < 32:
            continue
        waves = -(-outputs // (rows * processors))
        config = Skinny(rows, width, warps_n, warps_k, block, int(waves == 1))
        # rows through the fullest SM, something for each change of tile, and for x where its bytes come near the weight's
        cost = waves * (rows + 2) * (1 + 0.6 * max(0.0, width / rows - 0.75))
        if config.depth >= 3 and (best is None or cost < best[0]):
            best = cost, config
    return best[1] if best else None


def _wide(tokens: int, outputs: int, depth: int, pair: bool, processors: int) -> Wide | None:
    width = -(-tokens // 64) * 64
    if width == 64 and not pair and outputs > _ROUNDS * max(WIDE_ROWS) * processors:
        return Wide(128, 64, 2)
    best: tuple[float, Wide] | None = None
    for rows in WIDE_ROWS:
        if (pair and (rows < 32 or rows % 16)) or rows * width > 224 * 128:  # registers
            continue
        for share in (1, 2):
            waves = -(-outputs // (rows * (processors // share)))
            if share > 1 and (width > 64 or pair or rows % 16 or waves > 1 or depth < 1024):
                continue
            boxes, split = (_boxes(rows, share), 2 if pair and rows % 32 == 0 else 1) if width == 64 else (1, 1)
            config = Wide(rows, width, boxes, split, share)
            cost = waves * (rows / share + 2) * (1 + 0.3 * width / rows)
            if config.stages[1] >= 3 and (best is None or cost < best[0]):
                best = cost, config
    return best[1] if best else None


def _boxes(rows: int, share: int) -> int:
    """Of 64 columns, in a buffer, with 64 rows of x. Half as many with K shared, for twice the rows."""
    return max(1, min(4 // share, 192 // rows))


@cache
def plan(tokens: int, outputs: int, depth: int, pair: bool, processors: int) -> Skinny | Wide | None:
    """The block shape for [tokens, depth] x [outputs, depth]ᵀ, or None where the library's product is the better one (measured on an H200).

    Good shapes give each SM one equal share of the rows: 6144 = 128 · 48, 4096 = 128 · 32, 28672 = 128 · 224; or each pair of them, with K
    shared: 64 · 96, 64 · 64. The copy engine is slow to fill in for rows that are not there, hence the multiples of 64.
    """
    if tokens > 256 or depth % 8 or depth < 64 or outputs < 16 or (tokens > 64 and not pair) or (tokens > 32 and tokens % 64):
        return None
    return _skinny(tokens, outputs, pair, processors) if tokens <= 32 else _wide(tokens, outputs, depth, pair, processors)


def _multiply(columns: int, half: bool) -> str:
    """multiply(): 64 x 16 by 16 x columns, added to d."""
    count, kind = columns // 2, "f16" if half else "bf16"
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    lines = (
        f"__device__ __forceinline__ void multiply(float (&d)[{count}], u64 a, u64 b) {{",
        '    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0;"',
        f'        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{registers}}},"',
        f'        "%{count}, %{count + 1}, p, 1, 1, 0, 0; }}"',
        f'        : {operands} : "l"(a), "l"(b));\n}}\n',
    )
    return "\n".join(lines)


@cache
def _kernel(config: Skinny | Wide, pair: bool, add: bool, bias: bool, half: bool, device: int) -> Kernel:
    macros = {"ROWS": config.rows, "TOKENS": config.tokens}
    macros |= {"PAIR": int(pair), "ADD": int(add), "BIAS": int(bias), "HALF": int(half)}
    source = (SOURCES / "common.cuh").read_text()
    if isinstance(config, Wide):
        name, source = "wide", source + _multiply(config.rows // config.split, half)
        stages, x_stages = config.stages
        macros |= {"SPLIT": config.split, "SHARE": config.share, "BOXES": config.boxes, "STAGES": stages, "X_STAGES": x_stages}
        macros |= {"LATE": int(config.tokens > 128)}
    else:
        name = "skinny"
        macros |= {"WARPS_N": config.warps_n, "WARPS_K": config.warps_k, "BLOCK_K": config.block_k}
        macros |= {"STAGES": config.depth, "ALIAS": config.alias}
    return Kernel(compile_source(source + (SOURCES / f"{name}.cu").read_text(), macros, ARCH), name, config.shared)


@lru_cache(maxsize=8192)
def _map(address: int, half: bool, rows: int, columns: int, row_bytes: int, box_rows: int) -> TensorMap:
    return tensor_map(address, half, rows, columns, row_bytes, box_rows)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    config: Skinny | Wide,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    pair: bool = False,
    add: bool = False,
) -> None:
    """x [M, K], weight [N, K], out [M, N] or, for a pair, [M, N / 2]."""
    tokens, depth = x.shape
    outputs, half, device = out.shape[1], x.dtype == torch.float16, x.device.index
    out_rows = config.rows // 2 if pair else config.rows
    box_rows = out_rows // config.split if pair and isinstance(config, Wide) else out_rows
    share = config.share if isinstance(config, Wide) else 1
    tiles, clusters = -(-outputs // out_rows), _processors(device) // share
    grid = -(-tiles // -(-tiles // clusters)) * share
    args = (
        _map(weight.data_ptr(), half, weight.shape[0], depth, depth * 2, box_rows),
        _map(x.data_ptr(), half, tokens, depth, x.stride(0) * 2, config.tokens),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else 0),
        ctypes.c_int(tokens),
        ctypes.c_int(outputs),
        ctypes.c_int(depth),
    )
    kernel = _kernel(config, pair, add, bias is not None, half, device)
    kernel.launch(grid, config.threads, args, torch.cuda.current_stream(device).cuda_stream, OVERLAP, share)


@cache
def usable(device: int) -> bool:
    """Whether this device runs these kernels and a compiler for them is here."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        _kernel(Skinny(32, 8, *SHAPES[32]), False, False, False, False, device)
    except (CudaError, OSError):
        return False
    return True


def planned(x: torch.Tensor, weight: torch.Tensor, pair: bool = False) -> Skinny | Wide | None:
    """How x [M, K] · weight [N, K]ᵀ would run here; None: by the library."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype or x.dim() != 2 or x.shape[0] == 0:
        return None
    if not weight.is_contiguous() or weight.data_ptr() % 16 or not usable(x.device.index):
        return None
    outputs, depth = weight.shape
    return plan(x.shape[0], outputs, depth, pair, _processors(x.device.index))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N]."""
    config = planned(x, weight)
    by_blas = config is None and bias is None and blas.serves(x, weight)
    if config is None and not by_blas:
        return functional.linear(x, weight, bias)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if config is not None:
        run(config, _rows(x), weight, bias, out)
    elif not blas.multiply(x, weight, out):
        return functional.linear(x, weight)
    return out


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → residual [M, N], to which the product has been added before it is rounded."""
    config = planned(x, weight) if residual.is_contiguous() else None
    if config is not None:
        run(config, _rows(x), weight, bias, residual, add=True)
    elif bias is None and blas.serves(x, weight) and residual.is_contiguous() and blas.multiply(x, weight, residual, add=True):
        pass
    elif bias is None:
        torch.addmm(residual, x, weight.t(), out=residual)
    else:
        residual += functional.linear(x, weight, bias)
    return residual


def gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], weight [2I, K] gate then up, bias [2I] → [M, I] silu(gate) · up, each rounded to x's dtype as if they were stored."""
    config = planned(x, weight, pair=True)
    if config is None:
        return fused.silu_mul(linear(x, weight, bias))
    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    run(config, _rows(x), weight, bias, out, pair=True)
    return out


def pack(weight: torch.Tensor) -> torch.Tensor:
    """As it is."""
    return weight.detach()


def embedding(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows token_ids [T] of weight [N, K] → [T, K]."""
    return functional.embedding(token_ids, weight)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x where the copy engine can read it."""
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()
