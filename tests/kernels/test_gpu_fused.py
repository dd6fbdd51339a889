"""Fused kernels on the GPU against the torch twins in fp64, and bit for bit (but for ties) in their own dtype."""

import pytest
import torch

from baton.kernels import torch_ops
from tests.kernels.gpu_cases import assert_near, poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
sizes = pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 100), (5, 896), (300, 4096), (2, 11008)])


def rows_of(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[rows, size], a slice of a wider tensor whose rest is NaN."""
    wide = poison((rows, size + 24), dtype)
    part = wide[:, 8 : 8 + size]
    part.copy_(torch.randn(part.shape, generator=torch.Generator(device="cuda").manual_seed(seed), device="cuda"))
    return part


@dtypes
@sizes
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    from baton.kernels import fused

    x, residual, weight = rows_of(rows, size, dtype), rows_of(rows, size, dtype, 1), rows_of(1, size, dtype, 2)[0].contiguous()
    assert_near(fused.rms_norm(x, weight, 1e-5), torch_ops.rms_norm(x.double(), weight.double(), 1e-5))
    total = residual + x
    expected = torch_ops.rms_norm(total.double(), weight.double(), 1e-5)
    normed, new_residual = fused.add_rms_norm(x, residual, weight, 1e-5)
    assert_near(normed, expected)
    assert torch.equal(new_residual, total)


@dtypes
@sizes
def test_silu_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    from baton.kernels import fused

    gate_up = rows_of(rows, 2 * size, dtype)
    assert_near(fused.silu_mul(gate_up), torch_ops.silu_mul(gate_up.double()))


@dtypes
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(4, 4, 64, 16), (7, 1, 128, 64), (32, 8, 128, 16), (6, 2, 80, 16)])
@pytest.mark.parametrize("rows", [1, 37, 130])
def test_rope_write(heads: int, kv_heads: int, dim: int, size: int, norm: bool, dtype: torch.dtype, rows: int) -> None:
    """Only the tokens' own slots of the layer are written; a negative slot is padding."""
    from baton.kernels import fused

    rng = torch.Generator(device="cuda").manual_seed(3)
    qkv = rows_of(rows, (heads + 2 * kv_heads) * dim, dtype)
    angles = torch.rand(500, dim // 2, generator=rng, device="cuda") * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(dtype).float()
    positions = torch.randint(0, 500, (rows,), generator=rng, device="cuda")
    blocks = 300 // size + 2
    slots = torch.randperm(blocks * size, generator=rng, device="cuda")[:rows]
    slots[rows // 2] = -1 if rows > 1 else slots[0]
    weights = (rows_of(1, dim, dtype, 5)[0].contiguous(), rows_of(1, dim, dtype, 6)[0].contiguous()) if norm else (None, None)
    kv = torch.full((blocks, 2, 2, kv_heads, size, dim), 7.0, dtype=dtype, device="cuda")
    exact = kv.double()
    wide = (weight if weight is None else weight.double() for weight in weights)
    expected = torch_ops.rope_write(qkv.double(), cos_sin.double(), positions, slots, exact, 1, heads, *wide, 1e-6)
    q = fused.rope_write(qkv, cos_sin, positions, slots, kv, 1, heads, *weights, 1e-6)
    assert_near(q, expected)
    assert_near(kv, exact)
    untouched = exact == 7.0
    assert torch.equal(kv[untouched].double(), exact[untouched])
