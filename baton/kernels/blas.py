"""cuBLASLt's products for the many rows of a prompt's chunk, by the algorithm that is the fastest on this GPU when it is hot.

cuBLAS chooses by a model of the GPU that knows nothing of its power limit, at which prompts run: another of its proposals can be 2 to 10 %
faster there. They are timed once for each weight's shape and class of rows, at the first call with so many rows or more, which is the step
that warms a worker up.
"""

import ctypes
import logging
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

LEAST = 1024  # rows
_STEP, _MANY = 512, 4096  # one choice for so many rows; for all from there on
_WORKSPACE = 32 << 20  # bytes
_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_FLOAT, _COMPUTE_FLOAT, _TRANSPOSE_A, _MAX_WORKSPACE = 0, 68, 3, 1  # of cublasLt.h
_HEAT_S, _ROUNDS = 0.5, 5
logger = logging.getLogger(__name__)


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def _library() -> Any:
    """The one that torch has loaded."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcublasLt.so" in line}
    return ctypes.CDLL(min(paths)) if paths else None


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


@cache
def _handle(device: torch.device) -> tuple[ctypes.c_void_p, torch.Tensor]:
    """With its workspace. One stream uses them."""
    handle = ctypes.c_void_p()
    _check(_library().cublasLtCreate(ctypes.byref(handle)))
    return handle, torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)


@cache
def _operation() -> ctypes.c_void_p:
    made, transposed = ctypes.c_void_p(), ctypes.c_int(1)
    _check(_library().cublasLtMatmulDescCreate(ctypes.byref(made), _COMPUTE_FLOAT, _FLOAT))
    _check(_library().cublasLtMatmulDescSetAttribute(made, _TRANSPOSE_A, ctypes.byref(transposed), ctypes.c_size_t(4)))
    return made


@cache
def _layout(kind: int, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
    """Column-major: our rows are its columns. One for each number of rows that a step may have, and each weight's shape."""
    made = ctypes.c_void_p()
    sizes = (ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(stride))
    _check(_library().cublasLtMatrixLayoutCreate(ctypes.byref(made), kind, *sizes))
    return made


def _layouts(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> list[ctypes.c_void_p]:
    return [_layout(_TYPES[each.dtype], *each.shape, each.stride(0)) for each in (weight, x, out)]


def _proposals(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> list[_Proposal]:
    preference, most = ctypes.c_void_p(), ctypes.c_uint64(_WORKSPACE)
    _check(_library().cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    _check(_library().cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, ctypes.byref(most), ctypes.c_size_t(8)))
    found, count = (_Proposal * 16)(), ctypes.c_int()
    a, b, c = _layouts(x, weight, out)
    handle, _ = _handle(x.device)
    status = _library().cublasLtMatmulAlgoGetHeuristic(handle, _operation(), a, b, c, c, preference, len(found), found, ctypes.byref(count))
    _library().cublasLtMatmulPreferenceDestroy(preference)
    _check(status)
    return [proposal for proposal in found[: count.value] if proposal.state == 0]


def _run(proposal: _Proposal, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> bool:
    """False where it does not fit these sizes; then nothing was written."""
    (handle, workspace), (a, b, c) = _handle(x.device), _layouts(x, weight, out)
    one, before, to = ctypes.c_float(1), ctypes.c_float(add), ctypes.c_void_p(out.data_ptr())
    status: int = _library().cublasLtMatmul(
        handle, _operation(), ctypes.byref(one), ctypes.c_void_p(weight.data_ptr()), a, ctypes.c_void_p(x.data_ptr()), b,
        ctypes.byref(before), to, c, to, c, ctypes.byref(proposal.algorithm), ctypes.c_void_p(workspace.data_ptr()),
        ctypes.c_size_t(_WORKSPACE), ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )  # fmt: skip
    return status == 0


_chosen: dict[tuple[object, ...], _Proposal | None] = {}


def _choose(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> _Proposal | None:
    """For x's rows; and, where they are many, for fewer, whose first step is somebody's prompt."""
    size = min(-(-len(x) // _STEP) * _STEP, _MANY)
    key = (weight.shape, weight.dtype, add, x.device, size)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return None
        for fewer in range(LEAST, min(size, len(x)), _STEP):
            _choose(x[:fewer], weight, out[:fewer], add)
        scratch = torch.zeros_like(out)
        proposals = [proposal for proposal in _proposals(x, weight, scratch) if _run(proposal, x, weight, scratch, add)]
        if not proposals:
            _chosen[key] = None
            return None
        until = time.monotonic() + _HEAT_S * (not _chosen)
        while time.monotonic() < until:
            _run(proposals[0], x, weight, scratch, False)
            torch.cuda.synchronize(x.device)
        times: list[list[float]] = [[] for _ in proposals]
        for _ in range(_ROUNDS):
            for proposal, taken in zip(proposals, times, strict=True):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                _run(proposal, x, weight, scratch, add)
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end))
        medians = [statistics.median(taken) for taken in times]
        best = medians.index(min(medians))
        logger.info(
            "product of %d rows with %s: proposal %d of %d takes %.0f µs, the first %.0f",
            len(x), tuple(weight.shape), best + 1, len(medians), medians[best] * 1e3, medians[0] * 1e3,
        )  # fmt: skip
        _chosen[key] = proposals[best]
    return _chosen[key]


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if len(x) < LEAST or x.dtype not in _TYPES or weight.dtype is not x.dtype:
        return False
    aligned = all(each.stride(1) == 1 and each.data_ptr() % 256 == 0 and each.stride(0) % 128 == 0 for each in (x, weight))
    return aligned and weight.shape[0] % 8 == 0 and _library() is not None


def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> bool:
    """out [M, N] = x [M, K] · weight [N, K]ᵀ, or += that, of what it serves. False where it can't be done, as in a graph that is captured
    before the algorithm was chosen; then nothing was written."""
    proposal = _choose(x, weight, out, add)
    return proposal is not None and _run(proposal, x, weight, out, add)
