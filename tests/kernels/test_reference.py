"""Kernels against their obvious twins in kernels/reference.py, in fp64."""

import pytest
import torch
from baton.layers.attention import TorchAttention

from baton.forward import ForwardBatch
from baton.kernels import reference
from baton.layers import rotary
from baton.layers.norm import RMSNorm


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_attention_over_ragged_paged_sequences(window: int | None, heads: int, kv_heads: int, block_size: int) -> None:
    """Prompts, chunks and single tokens in one batch; blocks in random order; the rest of the cache is poison."""
    torch.manual_seed(block_size * heads)
    contexts, new, dim, layers = [1, 7, 33, 40, 18], [1, 7, 10, 1, 1], 8, 2
    kv = torch.full((64 * 16 // block_size, layers, 2, kv_heads, block_size, dim), torch.nan, dtype=torch.float64)
    order = torch.randperm(kv.shape[0])
    tables, used = [], 0
    for context in contexts:
        count = -(-context // block_size)
        tables.append(order[used : used + count])
        used += count
        kv[tables[-1]] = torch.randn(count, layers, 2, kv_heads, block_size, dim, dtype=torch.float64)
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(context - count, context) for context, count in zip(contexts, new, strict=True)])
    slots = torch.cat(
        [
            table[torch.arange(context - count, context) // block_size] * block_size + torch.arange(context - count, context) % block_size
            for table, context, count in zip(tables, contexts, new, strict=True)
        ]
    )
    most = max(map(len, tables))
    batch = ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slots=slots,
        query_start=tuple(starts),
        context_lens=tuple(contexts),
        block_tables=torch.stack([torch.cat([table, table.new_zeros(most - len(table))]) for table in tables]),
        logits_rows=positions[:0],
        kv=kv.nan_to_num(0.0),  # padded table entries point at a block whose keys are masked, but must be finite
    )
    q = torch.randn(starts[-1], heads, dim, dtype=torch.float64)
    k, v = torch.randn(2, starts[-1], kv_heads, dim, dtype=torch.float64)
    backend = TorchAttention()
    backend.begin(batch)
    out = backend.attend(1, q, k, v, window)
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        expected = reference.paged_attention(q[rows], batch.kv, 1, tables[s], context, window)
        torch.testing.assert_close(out[rows], expected, atol=1e-10, rtol=0)


def test_rms_norm() -> None:
    norm = RMSNorm(32, 1e-5)
    norm.weight.copy_(torch.randn(32))
    x = torch.randn(7, 32)
    torch.testing.assert_close(norm(x), reference.rms_norm(x.double(), norm.weight.double(), 1e-5).float())


@pytest.mark.parametrize(
    "scaling",
    [None, rotary.RopeScaling(kind="linear", factor=4.0), rotary.RopeScaling(kind="llama3", factor=8.0, original_max_len=64)],
)
def test_rotary(scaling: rotary.RopeScaling | None) -> None:
    inverse = rotary.inverse_frequencies(16, 10000.0, scaling)
    positions, x = torch.tensor([0, 1, 77, 1000]), torch.randn(4, 3, 16)
    out = rotary.rotate(x, *rotary.cos_sin(positions, inverse, torch.float32))
    for row, position in enumerate(positions.tolist()):
        expected = reference.rotary(x[row].double(), position, inverse.double())
        torch.testing.assert_close(out[row].double(), expected, atol=1e-4, rtol=0)
