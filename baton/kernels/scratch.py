"""What CUDA kernels share: the processors' number, and counters by which the last program of several finds out that it is."""

import functools

import torch

_COUNT = 1 << 16


@functools.cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _memory(device: torch.device) -> torch.Tensor:
    return torch.zeros(_COUNT, dtype=torch.int32, device=device)


def counters(device: torch.device, count: int) -> torch.Tensor:
    """[at least `count`] int32, all zero; who uses them leaves them so. Kernels of one stream share them."""
    assert count <= _COUNT, f"{count} counters wanted, {_COUNT} there"
    return _memory(device)
