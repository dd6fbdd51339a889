"""Products for few rows and the greedy choice, against fp64, on a Hopper GPU: `python -m pytest tests/kernels`."""

import gc
from typing import Any

import pytest
import torch
from torch.nn import functional

from baton.runtime.graphs import nothing_collected

linear: Any = None
sampling: Any = None
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def kernels():
    """They can be imported on a GPU machine only."""
    global linear, sampling
    from baton.kernels import linear, sampling


TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
# N, K: Llama-3.1-8B's, Qwen2.5-0.5B's, and sizes that no tile divides.
SHAPES = [(6144, 4096), (4096, 14336), (1152, 896), (896, 4864), (333, 72), (17, 200), (4097, 1000), (20001, 264)]


def inputs(m, n, k, dtype, seed=0):
    torch.manual_seed(seed + m * 7 + n)
    x = torch.randn(m, k, device="cuda").to(dtype)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)
    return x, weight, torch.randn(n, device="cuda").to(dtype)


def close(out, reference, dtype, roundings=1):
    error = (out.double() - reference).norm() / reference.norm()
    assert error < TOLERANCE[dtype] * roundings, error


@pytest.fixture
def poisoned(monkeypatch):
    """Results are made in memory full of NaN."""
    real = torch.empty

    def empty(*size, **kw):
        made = real(*size, **kw)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(99)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_is_the_product(n, k, dtype, poisoned):
    for m in (1, 2, 3, 8, 9, 16, 31, 33, 64, 65, 130, 256):
        x, weight, bias = inputs(m, n, k, dtype)
        reference = x.double() @ weight.double().t()
        close(linear.linear(x, weight), reference, dtype)
        close(linear.linear(x, weight, bias), reference + bias.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (9728, 896), (2 * 1000, 264), (2 * 171, 72)])
def test_gate_up_silu_rounds_as_separate_steps_do(n, k, dtype, poisoned):
    for m in (1, 5, 16, 24, 64, 100):
        x, weight, bias = inputs(m, n, k, dtype)
        for b in (None, bias):
            both = x.double() @ weight.double().t() + (0 if b is None else b.double())
            gate, up = both.to(dtype).chunk(2, dim=-1)
            close(linear.gated(x, weight, b), (functional.silu(gate) * up).double(), dtype, roundings=2)


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 96, 112, 128, 224])
def test_every_shape_of_few_rows(rows, poisoned):
    for tokens in (8, 16, 32):
        for n, k in ((rows * 132, 776), (rows * 140 + 1, 264)):
            config = linear.Skinny(rows, tokens, *linear.SHAPES[rows], alias=int(n == rows * 132))
            check(config, tokens - 1, n, k)


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 232, 248, 256])
def test_every_shape_of_many_rows(rows, poisoned):
    for boxes, share, k in ((1, 2, 1032), (2, 2, 776), (2, 4, 2056), (1, 2, 64)):
        config = linear.Wide(rows, 64, boxes, 1, share)
        if rows % (8 * share) == 0 and config.stages[1] >= 2:
            check(config, 63, rows * (132 // share) - 7, k)
            check(config, 64, rows * 20 + 1, k)
    for tokens, boxes, split in ((64, 1, 1), (64, 4, 1), (64, 2, 2), (128, 1, 1), (192, 1, 1), (256, 1, 1)):
        config = linear.Wide(rows, tokens, boxes, split)
        if rows % (8 * split) == 0 and rows * tokens <= 224 * 128 and config.stages[1] >= 2:
            check(config, tokens - 1, rows * 140 + 1, 264)
        if rows % (16 * split) == 0 and rows * tokens <= 224 * 128 and config.stages[1] >= 2:
            check_pair(config, tokens - 1, rows * 70 + 1, 264)


def check(config, m, n, k):
    x, weight, bias = inputs(m, n, k, torch.bfloat16)
    out, before = torch.empty(m, n, device="cuda", dtype=torch.bfloat16), torch.randn(m, n, device="cuda").to(torch.bfloat16)
    exact = x.double() @ weight.double().t() + bias.double()
    linear.run(config, x, weight, bias, out)
    close(out, exact, torch.bfloat16)
    out.copy_(before)
    linear.run(config, x, weight, bias, out, add=True)
    close(out, exact + before.double(), torch.bfloat16)


def check_pair(config, m, n, k):
    x, weight, bias = inputs(m, 2 * n, k, torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    linear.run(config, x, weight, bias, out, pair=True)
    gate, up = (x.double() @ weight.double().t() + bias.double()).to(torch.bfloat16).chunk(2, dim=-1)
    close(out, (functional.silu(gate) * up).double(), torch.bfloat16, roundings=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (896, 4864), (1152, 896)])
def test_products_of_a_long_chunk(n, k, dtype, poisoned):
    """Chosen at the first number of rows, used with others."""
    for m in (5000, 4096, 4097, 8192, 1024, 2048, 3001):
        x, weight, _ = inputs(m, n, k, dtype)
        assert linear.blas.serves(x, weight)
        exact = x.double() @ weight.double().t()
        close(linear.linear(x, weight), exact, dtype)
        residual = torch.randn(m, n, device="cuda").to(dtype)
        both = exact + residual.double()
        close(linear.linear_add(x, weight, None, residual), both, dtype)


def test_rows_of_a_wider_tensor_and_of_odd_addresses():
    x, weight, _ = inputs(12, 512, 256, torch.bfloat16)
    wide = torch.full((12, 700), float("nan"), device="cuda", dtype=torch.bfloat16)
    for start in (0, 8, 3):
        wide[:, start : start + 256] = x
        close(linear.linear(wide[:, start : start + 256], weight), x.double() @ weight.double().t(), torch.bfloat16)


def test_a_graph_that_is_garbage_does_not_break_the_capture_of_another():
    class Gone:
        def __init__(self, x):
            self.itself, self.graph = self, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = x + 1

    x = torch.zeros(1 << 20, device="cuda")
    x + 1
    threshold = gc.get_threshold()
    gc.collect()
    for _ in range(3):
        Gone(x)
    try:
        graph = torch.cuda.CUDAGraph()
        with nothing_collected(), torch.cuda.graph(graph):
            gc.set_threshold(1, 1, 1)
            outs = [[x + i] for i in range(100)]
    finally:
        gc.set_threshold(*threshold)
    graph.replay()
    assert [float(out.sum()) for (out,) in outs[:3]] == [0, 1 << 20, 2 << 20]


def test_the_same_bits_again_and_in_a_graph():
    for m, n, k in ((1, 6144, 4096), (8, 4096, 14336), (40, 4096, 4096)):
        x, weight, _ = inputs(m, n, k, torch.bfloat16)
        first = linear.linear(x, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with nothing_collected(), torch.cuda.graph(graph):
            middle = functional.relu(linear.linear(x, weight))
            outs = [linear.linear(x, weight) for _ in range(20)] + [linear.linear(middle, weight)] * (n == k)
        for _ in range(5):
            graph.replay()
            assert all(torch.equal(out, first) for out in outs[:20])
            if n == k:
                assert torch.equal(outs[20], linear.linear(functional.relu(first), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 7, 8192, 50257, 151936])
def test_argmax_takes_the_lowest_of_equals(vocab, dtype):
    for m in (1, 3, 64):
        logits = torch.randn(m, vocab + 5, device="cuda").to(dtype)[:, :vocab]
        expected = (logits.cpu().float() == logits.cpu().float().max(1, keepdim=True).values).int().argmax(1)
        assert sampling.argmax(logits).tolist() == expected.tolist()
    flat = torch.zeros(4, vocab, device="cuda", dtype=dtype)
    flat[1] = float("-inf")
    flat[2, -1] = 1
    flat[3] = float("nan")
    flat[3, vocab // 2] = -3
    assert sampling.argmax(flat).tolist() == [0, 0, vocab - 1, vocab // 2]
