"""A decode step without attention's reading of KV: 32 layers of Llama-3.1-8B (random weights, bf16) in one CUDA graph.

    PYTHONPATH=. python benchmarks/decode_step.py [batch ...]

`library`: F.linear, each kernel after the one before. `own, in turn`: baton.kernels.linear, likewise. `own`: every kernel may start
before the one before it has ended, so that weights are asked for early. Rope and attention are stand-ins that only pass their rows on.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch.nn import functional

from baton.kernels import linear as kernels
from baton.kernels.sampling import argmax

LAYERS, HIDDEN, INTERMEDIATE, QKV, VOCAB = 32, 4096, 14336, 6144, 128256


@triton.jit
def _add_norm(x, residual, weight, out, eps, H: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr):
    at = tl.arange(0, H)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + at)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * H
    total = tl.load(residual + row + at)
    if ADD:
        total = total + tl.load(x + row + at)
        tl.store(residual + row + at, total)
    wide = total.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    tl.store(out + row + at, normed.to(total.dtype) * w)


@triton.jit
def _pass_on(x, out, stride, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * N + at, tl.load(x + row * stride + at))


@triton.jit
def _silu_mul(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * SIZE + at).to(tl.float32)
    up = tl.load(x + row * 2 * SIZE + SIZE + at)
    tl.store(out + row * SIZE + at, (gate * tl.sigmoid(gate)).to(up.dtype) * up)


class Step:
    def __init__(self) -> None:
        torch.manual_seed(0)

        def weight(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02

        self.layers = [
            (weight(QKV, HIDDEN), weight(HIDDEN, HIDDEN), weight(2 * INTERMEDIATE, HIDDEN), weight(HIDDEN, INTERMEDIATE))
            for _ in range(LAYERS)
        ]
        self.head, self.scale = weight(VOCAB, HIDDEN), torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.bytes = 2 * (sum(w.numel() for layer in self.layers for w in layer) + self.head.numel())

    def norm(self, x: torch.Tensor | None, residual: torch.Tensor, overlap: bool) -> torch.Tensor:
        out = torch.empty_like(residual)
        add = x is not None
        _add_norm[(len(residual),)](
            x if add else residual, residual, self.scale, out, 1e-5, H=HIDDEN, ADD=add, OVERLAP=overlap, num_warps=8, launch_pdl=overlap
        )
        return out

    def pass_on(self, x: torch.Tensor, overlap: bool) -> torch.Tensor:
        out = torch.empty(len(x), HIDDEN, device="cuda", dtype=x.dtype)
        _pass_on[(len(x), 4)](x, out, x.stride(0), N=HIDDEN, BLOCK=1024, OVERLAP=overlap, num_warps=4, launch_pdl=overlap)
        return out

    def gate_up(self, x: torch.Tensor, w: torch.Tensor, own: bool) -> torch.Tensor:
        if own and kernels.planned(x, w, True):
            return kernels.gate_up_silu(x, w)
        both = functional.linear(x, w)
        out = torch.empty(len(x), INTERMEDIATE, device="cuda", dtype=x.dtype)
        _silu_mul[(len(x), INTERMEDIATE // 1024)](both, out, SIZE=INTERMEDIATE, BLOCK=1024, num_warps=4)
        return out

    def __call__(self, embedded: torch.Tensor, own: bool, overlap: bool) -> torch.Tensor:
        product: Callable[..., torch.Tensor] = kernels.linear if own else functional.linear
        residual, x = embedded.clone(), None
        for qkv, o, gate_up, down in self.layers:
            heads = product(self.norm(x, residual, overlap), qkv)
            attended = self.pass_on(self.pass_on(heads, overlap), overlap)
            x = product(attended, o)
            x = product(self.gate_up(self.norm(x, residual, overlap), gate_up, own), down)
        return argmax(product(self.norm(x, residual, overlap), self.head), overlap)


def time_graph(step: Callable[[], torch.Tensor], repeats: int = 21) -> tuple[float, torch.Tensor]:
    """Milliseconds, median over replays of one graph, and what it gives."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 4)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events[3:])), out


def main() -> None:
    step = Step()
    variants = {"library": (False, False), "own, in turn": (True, False), "own": (True, True)}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {step.bytes / 1e9:.2f} GB of weights; ms a step (GB/s of weights)")
    print("| batch | " + " | ".join(variants) + " | same tokens |\n|---|" + "---|" * (len(variants) + 1))
    for batch in [int(a) for a in sys.argv[1:]] or [1, 2, 4, 8, 16, 32, 64, 128, 256]:
        embedded = torch.randn(batch, HIDDEN, device="cuda", dtype=torch.bfloat16)
        cells, tokens = [], []
        for own, overlap in variants.values():
            kernels.OVERLAP = overlap
            took, out = time_graph(partial(step, embedded, own, overlap))
            cells.append(f"{took:.3f} ({step.bytes / took / 1e6:.0f})")
            tokens.append(out.tolist())
        same = sum(a == b for a, b in zip(tokens[0], tokens[-1], strict=True))
        print(f"| {batch} | " + " | ".join(cells) + f" | {same} of {batch} |", flush=True)


if __name__ == "__main__":
    main()
