"""Small kernels on CUDA (Triton) around the draw."""

import torch
import triton
import triton.language as tl

from baton.kernels.scratch import counters

_CHUNK = 8192


@triton.jit
def _argmax_kernel(
    logits_ptr, best_ptr, ids_ptr, counts_ptr, out_ptr, stride, size, CHUNKS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    values = tl.load(logits_ptr + row * stride + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
    best, index = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + row * CHUNKS + chunk, best)
    tl.store(ids_ptr + row * CHUNKS + chunk, chunk * CHUNK + index)
    tl.debug_barrier()
    if tl.atomic_add(counts_ptr + row, 1, sem="acq_rel", scope="gpu") < CHUNKS - 1:
        return
    tl.store(counts_ptr + row, 0)
    chunks = tl.arange(0, PADDED)
    inside = chunks < CHUNKS
    values = tl.load(best_ptr + row * CHUNKS + chunks, mask=inside, other=float("-inf"), volatile=True)
    _, winner = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out_ptr + row, tl.load(ids_ptr + row * CHUNKS + winner, volatile=True).to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V], rows contiguous → [R] int64; the lowest id among equals."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        chunks = triton.cdiv(size, _CHUNK)
        best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
        ids = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
        _argmax_kernel[(rows, chunks)](
            logits, best, ids, counters(logits.device, rows), out, logits.stride(0), size, chunks, triton.next_power_of_2(chunks), _CHUNK,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return out


@triton.jit
def _resolve_kernel(ids_ptr, drawn_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    ids = tl.load(ids_ptr + places, mask=inside, other=0)
    drawn = tl.load(drawn_ptr - 1 - ids, mask=inside & (ids < 0), other=0)
    tl.store(ids_ptr + places, tl.where(ids < 0, drawn, ids), mask=inside)


def resolve(ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """Replaces each negative id of ids [T] int64 by drawn[-1 - id]."""
    _resolve_kernel[(triton.cdiv(len(ids), 256),)](ids, drawn, len(ids), 256, num_warps=4, launch_pdl=True)
