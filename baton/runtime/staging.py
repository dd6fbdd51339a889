"""Small values on their way to the device and back, without making the CPU wait for what the device has to do before."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

_ALIGNED = 256  # bytes: as an allocation of its own would be


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device. On CUDA it goes through pinned memory, behind the work already queued."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Like `to_device` for each; on CUDA all in one copy."""
    if device.type != "cuda":
        return {name: torch.from_numpy(values) for name, values in arrays.items()}
    ends = np.cumsum([-(-values.nbytes // _ALIGNED) * _ALIGNED for values in arrays.values()]).tolist()
    places = dict(zip(arrays, [0, *ends], strict=False))
    there = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    target = there.numpy()
    for name, values in arrays.items():
        target[places[name] : places[name] + values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
    gone = there.to(device, non_blocking=True)
    return {
        name: gone[places[name] : places[name] + values.nbytes].view(torch.from_numpy(values[:0]).dtype).view(values.shape)
        for name, values in arrays.items()
    }


def listed(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=dtype).numpy(), device)


def to_host(*tensors: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Starts to bring them; the answer waits until they are there."""
    if not tensors or not tensors[0].is_cuda:
        return lambda: list(tensors)
    there = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for target, tensor in zip(there, tensors, strict=True):
        target.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[torch.Tensor]:
        done.synchronize()
        return there

    return wait
