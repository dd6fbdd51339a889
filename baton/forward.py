"""ForwardBatch: all that a forward pass may read. Built by `runtime.inputs`, read by models and kernels; nothing else crosses."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """A ragged batch: the new tokens of all sequences, one after the other.

    With S sequences and T new tokens in all; sequence s owns rows query_start[s] : query_start[s + 1]. Its context (all tokens up to and
    with the new ones) has context_lens[s] tokens, whose KV lies in the blocks block_tables[s]. The maxima may be larger than what is in
    the batch (a captured graph's are), never smaller.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, absolute
    slots: torch.Tensor  # [T] int64: block_id * block_size + offset, where each new token's KV is written; negative: nowhere
    query_start: torch.Tensor  # [S + 1] int32
    context_lens: torch.Tensor  # [S] int32
    block_tables: torch.Tensor  # [S, most blocks of any sequence] int32, padded with 0
    logits_rows: torch.Tensor | None  # [R] int64: rows whose logits are wanted; None: all
    logits_owners: torch.Tensor | None  # [R] int64: the sequences that they belong to, one of each at most; None: they are not told
    scored_rows: torch.Tensor | None = None  # [P] int64: rows whose logits are wanted too, but only to look at, some at a time
    max_query_len: int
    max_context_len: int
    lengths: tuple[tuple[int, int], ...] | None  # S pairs: query and context length; None: they are known on the device alone
    kv: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]

    def wanted(self) -> "ForwardBatch":
        """The rows whose logits are wanted, each as a sequence of its own with one new token: what is left to compute once all KV is
        written. Of a batch that has `logits_owners`."""
        assert self.logits_rows is not None
        assert self.logits_owners is not None
        positions = self.positions[self.logits_rows]
        return replace(
            self,
            token_ids=self.token_ids[self.logits_rows],
            positions=positions,
            slots=self.slots[self.logits_rows],
            query_start=torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device),
            context_lens=(positions + 1).int(),
            block_tables=self.block_tables[self.logits_owners],
            logits_rows=None,
            logits_owners=None,
            max_query_len=1,
            lengths=None,
        )
