"""Rotary position embedding (Su et al. 2021): the frequencies of each kind, and the table that kernels rotate by."""

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


def cos_sin_table(num_positions: int, inverse: torch.Tensor) -> torch.Tensor:
    """[num_positions, head_dim] fp32: by position, the cosines of all angles, then their sines."""
    angles = torch.arange(num_positions, dtype=torch.float32, device=inverse.device)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
