"""Group: the ranks of one worker, each with a share of every layer, and what they compute together (Shoeybi et al. 2019, Megatron-LM).

All ranks must make the same calls in the same order. On CUDA a call is queued behind what the device has to do, and graphs may capture it.
"""

import socket
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_TIMEOUT = timedelta(minutes=30)  # a rank may load its weights meanwhile; that one has died, or is stuck, others notice (`runtime.crew`)


class Group(Protocol):
    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, written over x."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, n] of each rank → [T, size · n], rank by rank."""
        ...

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's x, written over everybody's."""
        ...

    def meet(self) -> None:
        """What is queued behind this on any rank comes after what was queued before it on all of them."""
        ...

    def least(self, value: int) -> int:
        """Of all ranks' values. Waits."""
        ...


class Alone:
    """The group of a worker that has one rank."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor) -> None:
        pass

    def meet(self) -> None:
        pass

    def least(self, value: int) -> int:
        return value


ALONE = Alone()


class TorchGroup:
    """By torch.distributed: NCCL between GPUs, gloo between CPUs. One for each process, for its whole life."""

    def __init__(self, rank: int, size: int, address: str, device: torch.device, server: socket.socket | None = None) -> None:
        """Waits for all `size` ranks. They find each other at `address`, where rank 0 listens with `server`."""
        self.rank, self.size = rank, size
        host, _, port = address.rpartition(":")
        listening = {"is_master": True, "wait_for_workers": False, "master_listen_fd": server.detach()} if server is not None else {}
        store, cuda = TCPStore(host, int(port), size, **listening), device.type == "cuda"
        own = torch.device("cuda", torch.cuda.current_device()) if cuda else None
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT, device_id=own)
        self._one = torch.ones(1, device=device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        count, width = x.shape
        parts = torch.empty(self.size * count, width, dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts, x.contiguous())
        return parts.view(self.size, count, width).transpose(0, 1).reshape(count, self.size * width)

    def broadcast(self, x: torch.Tensor) -> None:
        dist.broadcast(x, 0)

    def meet(self) -> None:
        dist.all_reduce(self._one, dist.ReduceOp.MAX)

    def least(self, value: int) -> int:
        values = torch.tensor([value], device=self._one.device)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values.item())
