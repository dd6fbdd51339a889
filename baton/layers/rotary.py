"""Rotary position embedding (Su et al. 2021), halves convention: (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Of the rotary frequencies. `linear` divides positions by `factor`; `llama3` slows the low frequencies (Llama 3.1)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """[head_dim / 2] fp32. For `llama3`, wavelengths beyond original_max_len / low_freq_factor are divided by `factor`, those below
    original_max_len / high_freq_factor stay, and between the two it is interpolated (Llama 3.1's reference code)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_len / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def cos_sin(positions: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [T] → two of [T, 1, head_dim / 2], to be shared by all layers."""
    angles = positions[:, None].float() * inverse
    return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, head_dim] → the same."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
