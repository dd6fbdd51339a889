"""Choosing tokens on the GPU."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _argmax_parts(logits, values, ids, stride, vocab, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, 0)
    tl.store(values + row * parts + part, top)
    tl.store(ids + row * parts + part, tl.min(tl.where((x == top) & (at < vocab), at, 2147483647), 0))


@triton.jit
def _argmax_rows(values, ids, out, parts, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.arange(0, PARTS)
    x = tl.load(values + row * parts + at, mask=at < parts, other=float("-inf"))
    best = tl.load(ids + row * parts + at, mask=at < parts, other=2147483647)
    tl.store(out + row, tl.min(tl.where(x == tl.max(x, 0), best, 2147483647), 0).to(tl.int64))


def argmax(logits: torch.Tensor, overlap: bool = True) -> torch.Tensor:
    """logits [M, V] → [M] int64, the lowest id among equals; NaN is never chosen before a number.

    overlap: the launches wait for the kernel before them themselves (programmatic dependent launch).
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, BLOCK)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    _argmax_parts[(rows, parts)](
        logits, values, ids, logits.stride(0), vocab, parts, BLOCK=BLOCK, OVERLAP=overlap, num_warps=8, launch_pdl=overlap
    )
    _argmax_rows[(rows,)](values, ids, out, parts, PARTS=triton.next_power_of_2(parts), OVERLAP=overlap, num_warps=1, launch_pdl=overlap)
    return out
