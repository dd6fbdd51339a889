"""Host memory beside the KV memory of a device, copies between the two (`kv.store.Memory`), and checksums of blocks in either."""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch

from baton.kv.store import SUMS, Buffer, Memory, Summing

_REGISTER_PORTABLE, _REGISTER_READ_ONLY = 1, 8  # flags of cudaHostRegister


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

    def adopt(self, region: Buffer, *, read_only: bool) -> None:
        pass

    def disown(self, region: Buffer) -> None:
        pass

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
        self._regions = [(flat.data_ptr(), flat)]  # replaced, never changed: other threads look things up
        self._lock = threading.Lock()
        self._streams = _Streams(self._device)

    def allocate(self, nbytes: int) -> Buffer:
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._add(pinned)
        return Buffer(pinned.data_ptr(), nbytes)

    def adopt(self, region: Buffer, *, read_only: bool) -> None:
        flags = _REGISTER_PORTABLE | (_REGISTER_READ_ONLY if read_only else 0)
        with torch.cuda.device(self._device):
            _call("cudaHostRegister", region.address, region.nbytes, flags)
        self._add(torch.frombuffer((ctypes.c_uint8 * region.nbytes).from_address(region.address), dtype=torch.uint8))

    def disown(self, region: Buffer) -> None:
        with self._lock:
            self._regions = [(start, tensor) for start, tensor in self._regions if start != region.address]
        with torch.cuda.device(self._device):
            _call("cudaHostUnregister", region.address)

    def copy(self, targets: Sequence[Buffer], sources: Sequence[Buffer]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams.own()):
            for target, source in zip(targets, sources, strict=True):
                self._view(target).copy_(self._view(source), non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        arrived.synchronize()

    def is_host(self, buffer: Buffer) -> bool:
        return self._view(buffer).device.type == "cpu"

    def _add(self, tensor: torch.Tensor) -> None:
        with self._lock:
            self._regions = [*self._regions, (tensor.data_ptr(), tensor)]

    def _view(self, buffer: Buffer) -> torch.Tensor:
        for start, tensor in self._regions:
            if start <= buffer.address < start + tensor.numel():
                return tensor[buffer.address - start : buffer.address - start + buffer.nbytes]
        raise AssertionError(f"{buffer} lies in no memory that is known here")


class CudaSumming(Summing):
    """The device reads the blocks, which lie in its memory or in host memory that it knows (`CudaMemory`); each thread on a stream of its
    own. What is read has been written, as for `CudaMemory.copy`."""

    name = SUMS[1]

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, _Streams(device)

    def sums(self, buffers: Sequence[Buffer]) -> list[int]:
        from baton.kernels.checksum import checksums  # Triton, which a CPU's machine need not have

        if not buffers:
            return []
        (nbytes,) = {buffer.nbytes for buffer in buffers}
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams.own()):
            return [each % 2**64 for each in checksums([buffer.address for buffer in buffers], nbytes, self._device).tolist()]

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)  # a copy from memory that is not pinned, as Mooncake's over TCP, may end after its call


class _Streams:
    def __init__(self, device: torch.device) -> None:
        self._device, self._local = device, threading.local()

    def own(self) -> torch.cuda.Stream:
        """Of the calling thread."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return self._local.stream


def _call(name: str, *arguments: int) -> None:
    """Of the CUDA runtime. Raises RuntimeError."""
    result: Any = getattr(torch.cuda.cudart(), name)(*arguments)
    if result.value:
        raise RuntimeError(f"{name} failed with CUDA error {result.value}")


def memory_beside(device_memory: torch.Tensor) -> Memory:
    return CudaMemory(device_memory) if device_memory.device.type == "cuda" else CpuMemory()


def summing_for(device_memory: torch.Tensor) -> Summing:
    return CudaSumming(device_memory.device) if device_memory.device.type == "cuda" else Summing()
