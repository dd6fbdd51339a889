"""Every CUDA kernel against `torch_ops` in fp64. Run on a GPU with `make test-gpu`."""

import pytest
import torch

from baton.kernels import torch_ops

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 4e-2}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 896), (7, 4096), (130, 5120), (2, 33)])
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    from baton.kernels import fused

    wide, weight = random(rows, size + 8, dtype=dtype), random(size, dtype=dtype, seed=2)
    x = wide[:, :size]  # rows with a stride
    close(fused.rms_norm(x, weight, 1e-5), torch_ops.rms_norm(x.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 11), (5, 3072), (17, 14336)])
def test_silu_mul(dtype: torch.dtype, rows: int, size: int) -> None:
    from baton.kernels import fused

    x = random(rows, 2 * size, dtype=dtype)
    close(fused.silu_mul(x), torch_ops.silu_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (32, 8, 128), (4, 4, 32), (7, 1, 256)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
def test_rotation_writes_what_it_should_and_nothing_else(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, norm: bool, block_size: int
) -> None:
    from baton.kernels import fused

    rows, blocks, layers = 37, 9, 3
    qkv = random(rows, (heads + 2 * kv_heads) * dim + 16, dtype=dtype)[:, :-16]
    cos_sin = torch.randn(4096, dim, generator=torch.Generator().manual_seed(3)).cuda()
    positions = torch.randint(0, 4096, (rows,), generator=torch.Generator().manual_seed(4)).cuda()
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(5))[:rows].cuda()
    slots[::5] = -1
    weights = (random(dim, dtype=dtype, seed=6), random(dim, dtype=dtype, seed=7)) if norm else (None, None)
    kv = torch.full((blocks, layers, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype, device="cuda")
    exact = torch.full(kv.shape, torch.nan, dtype=torch.float64, device="cpu")
    q = fused.rope_write(qkv, cos_sin, positions, slots, kv, 1, heads, *weights, 1e-6)
    double = [None if w is None else w.double().cpu() for w in weights]
    expected = torch_ops.rope_write(
        qkv.double().cpu(), cos_sin.to(dtype).double().cpu(), positions.cpu(), slots.cpu(), exact, 1, heads, *double, 1e-6
    )
    close(q, expected.cuda())
    assert torch.equal(kv.isnan().cpu(), exact.isnan())
    close(kv.nan_to_num(0.0), exact.nan_to_num(0.0).cuda())


BATCHES = {
    "decode": ([1, 17, 16, 500, 5000, 64], [1] * 6),
    "prefill": ([1, 33, 200, 700], [1, 33, 200, 700]),
    "chunks": ([5, 300, 1000, 129], [2, 7, 300, 128]),
    "mixed": ([40, 700, 33, 1, 260], [1, 200, 1, 1, 260]),
    "padded": ([9, 0, 0], [1, 1, 1]),
    "long": ([768, 1024, 20, 1500, 900, 1], [768, 1024, 1, 1500, 30, 1]),
    "alone": ([1500], [1500]),
    "a chunk alone": ([2900], [1100]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (32, 8, 128), (4, 4, 64)])
@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None, block_size: int, batch: str) -> None:
    """What no sequence owns is NaN; the maxima are those of a captured graph."""
    from baton.kernels.attention import paged_attention

    contexts, counts = BATCHES[batch]
    needed = [-(-context // block_size) for context in contexts]
    kv = torch.full((sum(needed) + 3, 2, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype, device="cuda")
    order = torch.randperm(len(kv), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(contexts), 1200, dtype=torch.int32)
    for s, context in enumerate(contexts):
        tables[s, : needed[s]], order = order[: needed[s]], order[needed[s] :]
        filled = random(needed[s] * block_size, 2, kv_heads, dim, dtype=dtype, seed=s)
        filled[context:] = torch.nan
        kv[tables[s, : needed[s]].long().cuda(), 1] = filled.view(-1, block_size, 2, kv_heads, dim).permute(0, 2, 3, 1, 4)
    query_start = torch.tensor([0, *counts]).cumsum(0).int()
    q = random(sum(counts), (heads + 3) * dim, dtype=dtype, seed=99)[:, : heads * dim].view(-1, heads, dim)
    lens = torch.tensor(contexts, dtype=torch.int32)
    expected = torch_ops.paged_attention(q.double(), kv.nan_to_num(0.0).double(), 1, tables.cuda(), query_start, lens, 0, 0, window)
    real = torch.cat([torch.full((count,), context > 0) for count, context in zip(counts, contexts, strict=True)]).cuda()
    for most, lengths in ((max(contexts), list(zip(counts, contexts, strict=True))), (1200 * block_size, None)):
        out = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
        device = [tensor.cuda() for tensor in (tables, query_start, lens)]
        paged_attention(q, kv, 1, *device, max(counts), most, window, out, lengths)
        assert out.isfinite().all()
        close(out[real], expected[real])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33, 64, 65, 200])
@pytest.mark.parametrize(("size_out", "size_in"), [(4096, 4096), (6144, 896), (100, 128), (28672, 4096), (1152, 14336), (40, 72)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, rows: int, size_out: int, size_in: int, bias: bool) -> None:
    from baton.kernels import linear

    x = random(rows, size_in + 64, dtype=dtype)[:, :size_in]
    weight, offset = random(size_out, size_in, dtype=dtype, seed=1) / size_in**0.5, random(size_out, dtype=dtype, seed=2) if bias else None
    exact = torch_ops.linear(x.double(), weight.double(), None if offset is None else offset.double())
    found = linear.linear(x, linear.pack(weight), offset)
    close(found, exact)
    assert torch.equal(found, linear.linear(x, linear.pack(weight), offset))
    residual = random(rows, size_out, dtype=dtype, seed=3)
    both = exact + residual.double()
    assert linear.linear_add(x, linear.pack(weight), offset, residual) is residual
    close(residual, both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 40, 64, 100])
@pytest.mark.parametrize(("size", "size_in"), [(3072, 896), (14336, 4096), (96, 128), (100, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(dtype: torch.dtype, rows: int, size: int, size_in: int, bias: bool) -> None:
    from baton.kernels import linear

    x, weight = random(rows, size_in, dtype=dtype), random(2 * size, size_in, dtype=dtype, seed=1) / size_in**0.5
    offset = random(2 * size, dtype=dtype, seed=2) if bias else None
    exact = torch_ops.gated(x.double(), weight.double(), None if offset is None else offset.double())
    close(linear.gated(x, linear.pack(weight), offset), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 128256), (256, 32000), (3, 8192), (5, 8193), (2, 7)])
def test_argmax_takes_the_lowest_of_equals(dtype: torch.dtype, rows: int, size: int) -> None:
    from baton.kernels import sampling

    logits = random(rows, size, dtype=dtype)
    logits[-1] = 1.0
    logits[0, [size // 2, size - 1]] = 50.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    for _ in range(3):
        assert sampling.argmax(logits).tolist() == expected


def test_pending_ids_are_resolved() -> None:
    from baton.kernels import sampling

    ids, drawn = torch.tensor([5, -1, -3, 0, -2] * 200).cuda(), torch.tensor([100, 200, 300]).cuda()
    sampling.resolve(ids, drawn)
    assert ids.tolist() == [5, 100, 300, 0, 200] * 200
