"""Kernels: the operations that a forward pass is made of, in the fastest form that this machine can run.

    choose(device, dtype, head_dim) ─▶ C++ (CPU with AVX-512 BF16 and a compiler) | Triton (CUDA) | torch (everywhere)

Signatures and semantics are those of `torch_ops`, which every other form is tested against.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from baton.kernels import torch_ops

logger = logging.getLogger(__name__)
Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    name: str
    pack: Operation = torch_ops.pack  # a weight, into what `linear` and `embedding` take
    pack_gated: Operation = torch_ops.pack  # one whose rows are gate, then up, into what `gated` takes
    linear: Operation = torch_ops.linear
    linear_add: Operation = torch_ops.linear_add
    embedding: Operation = torch_ops.embedding
    rms_norm: Operation = torch_ops.rms_norm
    gated: Operation = torch_ops.gated
    rope_write: Operation = torch_ops.rope_write
    paged_attention: Operation = torch_ops.paged_attention
    argmax: Operation = torch_ops.argmax
    resolve: Operation = torch_ops.resolve
    decoder: Operation | None = None  # a whole pass in one call, where there is such a thing


TORCH = Kernels(name="torch")


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, asked: str = "auto") -> Kernels:
    """`asked`: auto, or torch. Says in the log what was chosen, and why."""
    kernels, reason = (
        (TORCH, "asked for") if asked == "torch" else _cuda(dtype, head_dim) if device.type == "cuda" else _cpu(dtype, head_dim)
    )
    logger.info("kernels: %s (%s)", kernels.name, reason)
    return kernels


def _cpu(dtype: torch.dtype, head_dim: int) -> tuple[Kernels, str]:
    from baton.kernels import cpu

    if cpu.load() is None:
        return TORCH, cpu.reason()
    if not cpu.supports(dtype, head_dim):
        return TORCH, f"the C++ kernels take no {dtype} with heads of {head_dim}"
    cpu.own_threads(True)
    kernels = Kernels(
        name="C++",
        pack=cpu.pack,
        pack_gated=functools.partial(cpu.pack, gated=True),
        linear=cpu.linear,
        linear_add=lambda x, weight, bias, residual: residual.add_(cpu.linear(x, weight, bias)),
        embedding=cpu.embedding,
        rms_norm=cpu.rms_norm,
        gated=cpu.linear,
        rope_write=cpu.rope_write,
        paged_attention=_without_lengths(cpu.paged_attention),
        argmax=cpu.argmax,
        decoder=cpu.decoder,
    )
    return kernels, "compiled for this CPU"


def _cuda(dtype: torch.dtype, head_dim: int) -> tuple[Kernels, str]:
    if importlib.util.find_spec("triton") is None:
        return TORCH, "triton is not installed: pip install baton[gpu]"
    if head_dim not in (16, 32, 64, 128, 256):
        return TORCH, f"the Triton kernels take no heads of {head_dim}"
    if torch.cuda.get_device_capability() < (9, 0):
        return TORCH, "the Triton kernels need a GPU of Hopper's generation or later"
    from baton.kernels import attention, fused, linear, sampling

    kernels = Kernels(
        name="Triton",
        pack=linear.pack,
        pack_gated=linear.pack,
        linear=linear.linear,
        linear_add=linear.linear_add,
        gated=linear.gated,
        embedding=linear.embedding,
        rms_norm=fused.rms_norm,
        rope_write=fused.rope_write,
        paged_attention=attention.paged_attention,
        argmax=sampling.argmax,
        resolve=sampling.resolve,
    )
    return kernels, f"CUDA; attention of prompts: {attention.describe(dtype, head_dim)}"


def _without_lengths(attention: Operation) -> Operation:
    return lambda *arguments, lengths=None: attention(*arguments)
