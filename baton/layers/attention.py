"""Attention over paged KV. A backend writes the new tokens' K and V into their slots and attends over the sequences' blocks.

`begin` is called once per forward pass, `attend` once per layer. This file has the backend of plain torch; it runs everywhere.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

from baton.forward import ForwardBatch


class AttentionBackend(Protocol):
    def begin(self, batch: ForwardBatch) -> None:
        """Prepares what all layers share."""
        ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim] of the new tokens → [T, num_heads, head_dim].

        A token at position p sees positions p - window + 1 … p of its sequence (window None: 0 … p). Scaled by head_dim ** -0.5.
        """
        ...


@dataclass(slots=True)
class _Group:
    """Sequences that are attended together: all with one new token (rows), or a single one with many."""

    rows: torch.Tensor | slice
    blocks: torch.Tensor  # [S, B] block ids
    positions: torch.Tensor  # [S, L] of the queries
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict[int | None, torch.Tensor])

    def mask(self, window: int | None, block_size: int) -> torch.Tensor:
        """[S, L, B * block_size] bool: True where a query sees a key."""
        if window not in self.masks:
            keys = torch.arange(self.blocks.shape[1] * block_size, device=self.blocks.device)
            distance = self.positions[:, :, None] - keys
            self.masks[window] = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return self.masks[window]


class TorchAttention:
    """Gathers each sequence's blocks and calls torch's scaled_dot_product_attention."""

    def begin(self, batch: ForwardBatch) -> None:
        self._kv, self._size = batch.kv, batch.block_size
        self._block, self._offset = batch.slots // batch.block_size, batch.slots % batch.block_size
        starts, lens = batch.query_start, batch.context_lens
        single = [s for s in range(batch.num_sequences) if starts[s + 1] - starts[s] == 1]
        self._groups: list[_Group] = []
        if single:
            rows = torch.tensor([starts[s] for s in single], device=batch.slots.device)
            most = -(-max(lens[s] for s in single) // self._size)
            blocks = batch.block_tables[torch.tensor(single, device=batch.slots.device), :most]
            self._groups.append(_Group(rows, blocks, batch.positions[rows][:, None]))
        for s in range(batch.num_sequences):
            if starts[s + 1] - starts[s] > 1:
                part = slice(starts[s], starts[s + 1])
                blocks = batch.block_tables[s : s + 1, : -(-lens[s] // self._size)]
                self._groups.append(_Group(part, blocks, batch.positions[part][None]))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        cache = self._kv[:, layer]
        cache[self._block, 0, :, self._offset] = k
        cache[self._block, 1, :, self._offset] = v
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.rows] = self._attend_group(cache, group, q[group.rows], window)
        return out

    def _attend_group(self, cache: torch.Tensor, group: _Group, q: torch.Tensor, window: int | None) -> torch.Tensor:
        sequences, length = group.positions.shape
        heads, dim = q.shape[1:]
        kv_heads = cache.shape[2]
        # Query heads that share a KV head are stacked along the query axis, so that no head of K or V is repeated.
        q = q.view(sequences, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, -1, dim)
        kv = cache[group.blocks].permute(2, 0, 3, 1, 4, 5).reshape(2, sequences, kv_heads, -1, dim)
        mask = group.mask(window, self._size)[:, None].repeat(1, 1, heads // kv_heads, 1)
        out = functional.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        out = out.view(sequences, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(sequences * length, heads, dim)
