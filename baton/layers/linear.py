"""Products with a weight, and rows of it. Both hold the weight as it was loaded until `prepare` hands it to the kernels.

Where a group's ranks share a model, each has some rows of the weights that widen (a plain Linear) and the columns of those that narrow
which go with them (PartialLinear), so that they meet once for both; of the vocabulary each has some rows."""

from typing import Any

import torch
from torch import nn

from baton.kernels.table import Kernels
from baton.parallel.group import ALONE, Group


class Linear(nn.Module):
    def __init__(self, size_in: int, size_out: int, *, bias: bool, gated: bool = False) -> None:
        """`gated`: the output's halves are gate and up, and silu(gate) · up is what comes out."""
        super().__init__()
        self._gated = gated
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(size_out, size_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size_out), requires_grad=False) if bias else None

    def prepare(self, kernels: Kernels, packed: Any = None) -> Any:
        """`packed`: another module's, where they share one weight."""
        pack, self._linear = (kernels.pack_gated, kernels.gated) if self._gated else (kernels.pack, kernels.linear)
        self._linear_add = kernels.linear_add
        self.packed, self.weight = pack(self.weight) if packed is None else packed, None
        return self.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, size_in] → [T, size_out], or half of it."""
        return self._linear(x, self.packed, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [T, size_out] += of x [T, size_in]."""
        self._linear_add(x, self.packed, self.bias, residual)


class PartialLinear(Linear):
    """A product to which each rank gives its part: that of its share of the input. The bias is rank 0's."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool, group: Group) -> None:
        """`size_in`: of this rank's share."""
        super().__init__(size_in, size_out, bias=bias and group.rank == 0)
        self._group = group

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        if self._group.size == 1:
            super().add_to(residual, x)
        else:
            residual.add_(self._group.all_reduce(self._linear(x, self.packed, self.bias)))


class Embedding(nn.Module):
    def __init__(self, count: int, size: int, group: Group = ALONE) -> None:
        """`count`: of this rank's rows, those from rank · count on."""
        super().__init__()
        self._group, self._first, self._count = group, group.rank * count, count
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(count, size), requires_grad=False)

    def prepare(self, kernels: Kernels) -> Any:
        self.packed = kernels.pack(self.weight)
        self._embedding, self.weight = kernels.embedding, None
        return self.packed

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, size]."""
        if self._group.size == 1:
            return self._embedding(self.packed, token_ids)
        rows = token_ids - self._first
        elsewhere = (rows < 0) | (rows >= self._count)
        found = self._embedding(self.packed, rows.masked_fill(elsewhere, 0))
        return self._group.all_reduce(found.masked_fill_(elsewhere[:, None], 0))
