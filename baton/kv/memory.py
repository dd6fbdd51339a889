"""Host memory beside the KV memory of a device, and copies between the two. Copies return when they are done, and let Python's other
threads run meanwhile."""

import ctypes
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from baton.kv.store import Buffer


class Memory(Protocol):
    def allocate(self, nbytes: int) -> Buffer:
        """Host memory that lives as long as this object."""
        ...

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        """Each source to its target, of equal size; both lie in host memory from here or in the device's KV memory."""
        ...

    def is_host(self, buffer: Buffer) -> bool:
        """Whether the CPU can read and write there."""
        ...


class CpuMemory:
    """The KV is in the CPU's own memory. What is allocated takes real memory as it fills."""

    def __init__(self) -> None:
        self._allocated: list[torch.Tensor] = []

    def allocate(self, nbytes: int) -> Buffer:
        self._allocated.append(torch.empty(nbytes, dtype=torch.uint8))
        return Buffer(self._allocated[-1].data_ptr(), nbytes)

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        for target, source in zip(targets, sources, strict=True):
            ctypes.memmove(target.address, source.address, source.nbytes)

    def is_host(self, buffer: Buffer) -> bool:
        return True


class CudaMemory:
    """The KV is on a CUDA device; what is allocated is pinned. Each thread copies on a stream of its own, all blocks of a call at once, and
    sleeps until the last has arrived. Nothing orders these streams with the engine's: blocks that are copied from have been computed, and
    blocks that are copied to are written by no step (`runtime.flights`)."""

    def __init__(self, device_memory: torch.Tensor) -> None:
        """`device_memory`: all KV blocks, contiguous."""
        flat = device_memory.view(-1).view(torch.uint8)
        self._device = flat.device
        self._regions = [(flat.data_ptr(), flat)]
        self._own = threading.local()

    def allocate(self, nbytes: int) -> Buffer:
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._regions.append((pinned.data_ptr(), pinned))
        return Buffer(pinned.data_ptr(), nbytes)

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream()):
            for target, source in zip(targets, sources, strict=True):
                self._view(target).copy_(self._view(source), non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        arrived.synchronize()

    def is_host(self, buffer: Buffer) -> bool:
        return self._view(buffer).device.type == "cpu"

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return self._own.stream

    def _view(self, buffer: Buffer) -> torch.Tensor:
        for start, tensor in self._regions:
            if start <= buffer.address < start + tensor.numel():
                return tensor[buffer.address - start : buffer.address - start + buffer.nbytes]
        raise AssertionError(f"{buffer} lies in no memory that is known here")


def memory_beside(device_memory: torch.Tensor) -> Memory:
    return CudaMemory(device_memory) if device_memory.device.type == "cuda" else CpuMemory()
