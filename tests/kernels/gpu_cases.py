"""Paged batches with known answers, for the GPU kernels' tests: all that must not be read is NaN."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from baton.kernels import torch_ops

LAYER, LAYERS = 1, 2
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 6e-3}  # of the relative error's norm


@dataclass(frozen=True, slots=True)
class Case:
    q: torch.Tensor  # [T, Hq, D], a slice of a wider tensor
    kv: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    max_context_len: int

    def expected(self, window: int | None) -> torch.Tensor:
        """In fp64."""
        lists = (self.block_tables, self.query_start, self.context_lens, self.max_query_len, self.max_context_len)
        return torch_ops.paged_attention(self.q.double(), self.kv.double(), LAYER, *lists, window)


def paged_case(
    contexts: list[int], new: list[int], heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype, seed: int = 0
) -> Case:
    """Sequences with so many tokens, of which the last `new` are queries; blocks in random order, table entries past the end name a
    block of NaN, as are all slots without a token, the other layer and the rows' neighbours."""
    rng = torch.Generator(device="cuda").manual_seed(seed)
    needed = [-(-context // size) for context in contexts]
    kv = torch.full((sum(needed) + 1, LAYERS, 2, kv_heads, size, dim), torch.nan, dtype=dtype, device="cuda")
    order = torch.randperm(sum(needed), generator=rng, device="cuda")
    tables = torch.full((len(contexts), max(needed) + 3), sum(needed), dtype=torch.int32, device="cuda")
    used = 0
    for s, context in enumerate(contexts):
        blocks = order[used : used + needed[s]]
        used += needed[s]
        tables[s, : needed[s]] = blocks
        tokens = torch.arange(context, device="cuda")
        values = torch.randn(context, 2, kv_heads, dim, generator=rng, device="cuda")
        kv[:, LAYER][blocks[tokens // size], :, :, tokens % size] = values.to(dtype)
    rows = torch.full((sum(new), (heads + 3) * dim), torch.nan, dtype=dtype, device="cuda")
    q = rows[:, dim : (heads + 1) * dim]
    q.copy_(torch.randn(q.shape, generator=rng, device="cuda"))
    starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32, device="cuda")
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return Case(q.unflatten(1, (heads, dim)), kv, tables, starts, lens, max(new), max(contexts))


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert error <= LIMITS[got.dtype], f"relative error {error}"
