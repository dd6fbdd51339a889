"""Kernels against their obvious twins in kernels/reference.py, in fp64."""

import pytest
import torch

from baton.kernels import reference, torch_ops
from baton.layers import rotary


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
    most = max(map(len, tables))
    padded = torch.stack([torch.cat([table, table.new_zeros(most - len(table))]) for table in tables]).int()
    kv = kv.nan_to_num(0.0)  # padded table entries point at a block whose keys are masked, but must be finite
    q = torch.randn(starts[-1], heads, dim, dtype=torch.float64)
    out = torch_ops.paged_attention(q, kv, 1, padded, torch.tensor(starts).int(), torch.tensor(contexts).int(), 10, 40, window)
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        expected = reference.paged_attention(q[rows], kv, 1, tables[s], context, window)
        torch.testing.assert_close(out[rows], expected, atol=1e-10, rtol=0)


def test_rms_norm() -> None:
    weight, x = torch.randn(32), torch.randn(7, 32)
    torch.testing.assert_close(torch_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5).float())


@pytest.mark.parametrize(
    "scaling",
    [None, rotary.RopeScaling(kind="linear", factor=4.0), rotary.RopeScaling(kind="llama3", factor=8.0, original_max_len=64)],
)
def test_rotary(scaling: rotary.RopeScaling | None) -> None:
    inverse = rotary.inverse_frequencies(16, 10000.0, scaling)
    positions, heads, kv_heads = torch.tensor([0, 1, 77, 1000]), 3, 2
    qkv, slots = torch.randn(4, (heads + 2 * kv_heads) * 16), torch.tensor([5, 0, -1, 3])
    kv = torch.zeros(2, 1, 2, kv_heads, 4, 16)
    q = torch_ops.rope_write(qkv, rotary.cos_sin_table(1024, inverse), positions, slots, kv, 0, heads)
    split = qkv.view(4, -1, 16).split((heads, kv_heads, kv_heads), dim=1)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        turned = [reference.rotary(part[row].double(), position, inverse.double()) for part in split[:2]]
        torch.testing.assert_close(q[row].double(), turned[0], atol=1e-4, rtol=0)
        if slot >= 0:
            torch.testing.assert_close(kv[slot // 4, 0, 0, :, slot % 4].double(), turned[1], atol=1e-4, rtol=0)
            assert torch.equal(kv[slot // 4, 0, 1, :, slot % 4], split[2][row])
    assert kv.abs().sum(-1).count_nonzero() == 3 * 2 * kv_heads
