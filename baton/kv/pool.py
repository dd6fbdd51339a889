"""KVPool: the memory of all KV blocks of one rank, as one tensor. Which block holds what is `scheduling.blocks`'s business."""

import torch

from baton.errors import ConfigError
from baton.kv.layout import KVLayout
from baton.kv.store import Buffer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PAGE = 4096


class KVPool:
    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        """Allocates and touches everything now, so that no step pays for it."""
        self.layout = layout
        dtype = DTYPES[layout.dtype]
        count = num_blocks * layout.block_bytes
        self._memory = torch.zeros(count + _PAGE, dtype=torch.uint8, device=device)
        start = -self._memory.data_ptr() % _PAGE
        self.tensor = self._memory[start : start + count].view(dtype).view(num_blocks, *layout.block_shape)
        """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]"""
        self.region = Buffer(self.tensor.data_ptr(), count)
        """All blocks, for registration with a store."""
        self._block_bytes = layout.block_bytes

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[0]

    def buffer(self, block_id: int) -> Buffer:
        return Buffer(self.region.address + block_id * self._block_bytes, self._block_bytes)


def num_blocks_for(layout: KVLayout, memory: int) -> int:
    """Blocks that fit into `memory` bytes. Raises ConfigError when not even two do."""
    count = memory // layout.block_bytes
    if count < 2:
        raise ConfigError(f"engine.kv_memory={memory} holds {count} blocks of {layout.block_bytes} bytes; give at least two blocks' worth")
    return count
