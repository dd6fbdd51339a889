"""The engine's operations on the CPU, in C++ with AVX-512 and its bf16 products, for bf16 and fp32.

    kernels = cpu.load()          the compiled kernels, or None: reason() says why (no compiler, a CPU without AVX-512 BF16)

The first call compiles (about 20 seconds, cached); nothing else here may be called before `load` has given kernels. Work is spread
over torch's threads (`torch.set_num_threads`). Every row of every result has the same bits whatever else is in the batch, however
many threads there are, and whether its context is one chunk or many. Knows of no engine, model or configuration.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from baton.kernels.cpu import build

logger = logging.getLogger(__name__)

__all__ = [
    "PackedWeight",
    "add_rms_norm",
    "argmax",
    "decoder",
    "embedding",
    "linear",
    "load",
    "own_threads",
    "pack",
    "paged_attention",
    "reason",
    "rms_norm",
    "rope_write",
    "supports",
]


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    try:
        return build.extension(), ""
    except build.BuildError as error:
        logger.warning("CPU kernels are off, plain torch is used: %s", error)
        return None, str(error)


def load() -> ModuleType | None:
    """Compiles or finds the extension. None: there is none on this machine; said in the log once."""
    return _attempt()[0]


def reason() -> str:
    """Why `load` gives None; empty when it does not."""
    return _attempt()[1]


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels can serve a model of this kind (and are there at all)."""
    return load() is not None and dtype in (torch.bfloat16, torch.float32) and head_dim % 16 == 0 and head_dim <= 256


def _kernels() -> ModuleType:
    module = _attempt()[0]
    assert module is not None, "load() gave no kernels"
    return module


def own_threads(on: bool) -> None:
    """Whether the kernels run on threads of their own, as many as torch is set to, instead of torch's OpenMP threads.

    A call then never waits for a thread that has not begun, and idle threads sleep after 50 µs: faster where other processes share the
    cores. But OpenMP's threads spin for milliseconds after each parallel operation of torch, on the same cores: start the process with
    OMP_WAIT_POLICY=passive.
    """
    _kernels().own_threads(int(on))


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [n, k] in panels of 32 rows; bytes as the plain one, rounded up to whole panels. It serves any number of input rows, and
    `embedding` reads its rows, so that nobody needs the plain weight any more. Gated: n / 2 rows of gate, then those of up."""

    data: torch.Tensor
    n: int
    k: int
    gated: bool = False


def pack(weight: torch.Tensor, *, gated: bool = False) -> PackedWeight:
    """weight [n, k], bf16 or fp32."""
    return PackedWeight(_kernels().pack(weight, int(gated)), weight.shape[0], weight.shape[1], gated)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, k] · weightᵀ + bias [n] → [T, n]; summed in fp32, rounded once. Gated: silu(gate) · up [T, n / 2] of those, each rounded."""
    return _kernels().linear(x, weight.data, weight.n, int(weight.gated), bias)


def embedding(weight: PackedWeight, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows token_ids [T] int64 of the weight → [T, k]."""
    return _kernels().gather(weight.data, weight.n, weight.k, token_ids)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] → the same; rounded to x's dtype before the product with weight [H]."""
    return _kernels().norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of residual + x, residual + x); the sum is written over residual."""
    return _kernels().norm(x, residual, weight, eps), residual


def rope_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    num_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k of qkv [T, (Hq + 2 Hkv) · D], after their RMSNorm where weights [D] are given; writes k and v to their slots [T]
    (negative: nowhere) of kv [blocks, layers, 2, Hkv, block_size, D]. cos_sin [P, D] fp32: by position, cos then sin. → q [T, Hq, D], `out`
    if that is given."""
    q = _kernels().rope_write(qkv, cos_sin, positions, slots, kv, layer, num_heads, q_weight, k_weight, eps)
    return q if out is None else out.copy_(q)


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
) -> torch.Tensor:
    """q [T, Hq, D] → [T, Hq, D]. Sequence s owns rows query_start[s] : query_start[s + 1] (int32), the last of its context_lens[s] tokens,
    whose KV lies in blocks block_tables[s] (int32). Causal; with a window a token sees itself and window - 1 before it. Rows of no
    sequence, or without context, are zero. The two maxima are for kernels that need them; this one does not."""
    return _kernels().paged_attention(q, kv, layer, block_tables, query_start, context_lens, window or 0, out)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] → [R] int64; the lowest id among equals. NaN is never the greatest."""
    return _kernels().argmax(logits)


LayerWeights = tuple[PackedWeight | torch.Tensor | int | None, ...]
"""Of one layer: input norm, qkv and its bias, q norm, k norm, o and its bias, the norm after attention, gate_up and its bias, down and
its bias, window (0: none). Biases and the norms of q and k may be None."""


def decoder(
    embedding: PackedWeight,
    norm: torch.Tensor,
    head: PackedWeight,
    layers: Sequence[LayerWeights],
    *,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> Callable[..., torch.Tensor]:
    """A whole pass in one call, which holds no lock of Python's: the operations above in their order, with the same bits. It takes
    (token_ids, positions, slots, cos_sin, kv, block_tables, query_start, context_lens, rows | None) → logits [rows, vocabulary]."""
    kernels = _kernels()
    flat = [value.data if isinstance(value, PackedWeight) else value for layer in layers for value in layer]
    sizes = (embedding.k, intermediate_size, num_heads, num_kv_heads, head_dim)
    return functools.partial(kernels.forward, kernels.decoder(embedding.data, embedding.n, norm, head.data, *sizes, eps, *flat))
