"""Products with a weight, x · weightᵀ, for the few rows of a decode step. Weights stay as checkpoints have them: [N, K], row-major."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from baton.kernels.nvrtc import Kernel, TensorMap, compile_source, tensor_map

SHARED = 203 * 1024  # of an SM's 227 KiB, so that the small kernels between two products fit beside
OVERLAP = True  # launches may start before the kernel before them has ended; they wait for it themselves
SOURCE = Path(__file__).with_name("skinny.cu")


class Config(NamedTuple):
    """The macros of skinny.cu; see there."""

    rows: int
    tokens: int
    warps_n: int
    warps_k: int
    block_k: int
    split: int = 1
    alias: int = 1
    stages: int = 0

    @property
    def stage_bytes(self) -> int:
        return self.block_k * 2 * (self.rows + self.tokens)

    @property
    def sums_bytes(self) -> int:
        return self.warps_k * self.tokens * (self.rows + 4) * 4

    @property
    def depth(self) -> int:
        return self.stages or min(16, (SHARED - (0 if self.alias else self.sums_bytes)) // self.stage_bytes)

    @property
    def shared(self) -> int:
        ring = self.depth * self.stage_bytes
        return max(ring, self.sums_bytes) if self.alias else ring + self.sums_bytes


@lru_cache(maxsize=None)
def _kernel(config: Config, pair: bool, bias: bool, half: bool, device: int) -> Kernel:
    macros = {
        "ROWS": config.rows, "TOKENS": config.tokens, "WARPS_N": config.warps_n, "WARPS_K": config.warps_k, "BLOCK_K": config.block_k,
        "STAGES": config.depth, "SPLIT": config.split, "ALIAS": config.alias, "PAIR": int(pair), "BIAS": int(bias), "HALF": int(half),
    }  # fmt: skip
    return Kernel(compile_source(SOURCE.read_text(), macros, "sm_90a"), "skinny", config.shared)


@lru_cache(maxsize=8192)
def _map(address: int, half: bool, rows: int, columns: int, row_bytes: int, box_rows: int) -> TensorMap:
    return tensor_map(address, half, rows, columns, row_bytes, box_rows)


@lru_cache(maxsize=None)
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(config: Config, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, pair: bool = False) -> None:
    """x [M, K], weight [N, K], out [M, N] or, for a pair, [M, N / 2]."""
    tokens, depth = x.shape
    outputs, half, device = out.shape[1], x.dtype == torch.float16, x.device.index
    out_rows = config.rows // 2 if pair else config.rows
    tiles = -(-outputs // out_rows)
    grid = tiles * config.split if config.alias else min(tiles, _processors(device))
    args = (
        _map(weight.data_ptr(), half, weight.shape[0], weight.shape[1], weight.stride(0) * 2, out_rows),
        _map(x.data_ptr(), half, tokens, depth, x.stride(0) * 2, config.tokens),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else 0),
        ctypes.c_int(tokens),
        ctypes.c_int(outputs),
        ctypes.c_int(depth),
    )
    kernel = _kernel(config, pair, bias is not None, half, device)
    kernel.launch(grid, (config.warps_n * config.warps_k + 1) * 32, args, torch.cuda.current_stream(device).cuda_stream, config.split, OVERLAP)


# Rows of the weight a block takes → how its warps share a tile: (warps over rows, warps over K, K per stage).
SHAPES = {16: (1, 8, 512), 32: (2, 4, 256), 48: (3, 4, 128), 64: (4, 2, 128), 96: (6, 2, 128), 112: (7, 1, 64), 128: (8, 1, 64), 192: (6, 1, 64), 224: (7, 1, 64)}
MAX_TOKENS = 64


@lru_cache(maxsize=None)
def plan(tokens: int, outputs: int, depth: int, pair: bool, processors: int) -> Config | None:
    """The block shape for [tokens, depth] x [outputs, depth]ᵀ, or None where the library's product is the better one.

    A block per SM that gets an equal share of the rows needs no sum across blocks: 6144 = 128 · 48, 4096 = 128 · 32, 28672 = 128 · 224.
    """
    if tokens > MAX_TOKENS or depth % 8 or depth < 64 or outputs < 16:
        return None
    width = next(t for t in (8, 16, 32, 64) if tokens <= t)
    best: tuple[float, Config] | None = None
    for rows, (wn, wk, block) in SHAPES.items():
        if pair and rows < 32:
            continue
        for split in (1, 2):
            if (split == 2 and (pair or width < 64 or wk == 1)) or (wn * wk == 7 and width > 64):
                continue
            tiles = -(-outputs // rows)
            waves = -(-tiles * split // processors)
            if split > 1 and waves > 1:
                continue
            config = Config(rows, width, wn, wk, block, split, int(waves == 1))
            if config.depth < 3:
                continue
            # rows through the fullest SM, something for each change of tile, and for x where its bytes (from L2) come near the weight's
            cost = waves * (rows / split + 2) * (1 + 0.6 * max(0.0, width / rows - 0.75)) * (1.08 if split > 1 else 1.0)
            if best is None or cost < best[0]:
                best = cost, config
    return best[1] if best else None


def planned(x: torch.Tensor, weight: torch.Tensor, pair: bool) -> Config | None:
    """How x [M, K] · weight [N, K]ᵀ would run here; None: by the library."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype or x.dim() != 2 or x.shape[0] == 0:
        return None
    if torch.cuda.get_device_capability(x.device)[0] != 9 or not weight.is_contiguous() or weight.data_ptr() % 16:
        return None
    return plan(x.shape[0], weight.shape[0], weight.shape[1], pair, _processors(x.device.index))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N]."""
    config = planned(x, weight, False)
    if config is None:
        return functional.linear(x, weight, bias)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    run(config, _rows(x), weight, bias, out)
    return out


def gate_up_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], weight [2I, K] gate then up, bias [2I] → [M, I] silu(gate) · up, each rounded to x's dtype as if they were stored."""
    config = planned(x, weight, True)
    if config is None:
        gate, up = functional.linear(x, weight, bias).chunk(2, dim=-1)
        return functional.silu(gate) * up
    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    run(config, _rows(x), weight, bias, out, pair=True)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()
