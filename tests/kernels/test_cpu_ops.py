"""The C++ kernels against fp64 references and against what torch's layers compute. Results are written over poison; what no test reads
of the KV cache is poison too."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from baton.kernels import cpu, reference, torch_ops
from baton.kernels.cpu import build
from baton.layers import rotary

DTYPES = [torch.float32, torch.bfloat16]
needs_avx512 = pytest.mark.skipif(bool(build.missing_cpu_flags()), reason="the kernels are for CPUs with AVX-512 BF16")


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leaves NaN in memory that the next result of this shape is likely to get."""
    torch.full(shape, torch.nan, dtype=dtype)


def check(got: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    """Within a few roundings of the type, at the magnitude `scale` of what was summed."""
    step = torch.finfo(got.dtype).eps * (2 if got.dtype == torch.bfloat16 else 16)
    torch.testing.assert_close(got.double(), exact.double(), rtol=step, atol=step * scale)


@needs_avx512
class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 17), (33, 64), (130, 512), (64, 1025), (96, 2048), (70, 4099), (48, 9000)])
    @pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 25, 48, 97, 130])
    def test_product(self, dtype: torch.dtype, n: int, k: int, rows: int) -> None:
        w, x, b = torch.randn(n, k).to(dtype), torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        packed = cpu.pack(w)
        for bias in (None, b):
            exact = functional.linear(x.double(), w.double(), None if bias is None else bias.double())
            poison(rows, n, dtype=dtype)
            check(cpu.linear(x, packed, bias), exact, k**0.5)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("size", "k"), [(1, 17), (30, 64), (33, 1025), (704, 2100)])
    @pytest.mark.parametrize("rows", [1, 12, 40, 130])
    def test_gated(self, dtype: torch.dtype, size: int, k: int, rows: int) -> None:
        w, x, b = torch.randn(2 * size, k).to(dtype), torch.randn(rows, k).to(dtype), torch.randn(2 * size).to(dtype)
        x[0], x[-1] = x[0] * 20, x[-1] * -20
        for bias in (None, b):
            gate, up = cpu.linear(x, cpu.pack(w), bias).double().chunk(2, -1)
            poison(rows, size, dtype=dtype)
            check(cpu.linear(x, cpu.pack(w, gated=True), bias), functional.silu(gate) * up)
            check(torch_ops.silu_mul(torch.cat((gate, up), -1).to(dtype)), functional.silu(gate) * up)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strided_rows(self, dtype: torch.dtype) -> None:
        w, wide = torch.randn(40, 2 * 48).to(dtype)[:, 48:], torch.randn(30, 101).to(dtype)
        x = wide[::2, 3:51]
        check(cpu.linear(x, cpu.pack(w)), x.double() @ w.double().T, 7)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [896, 2048, 5000])
    def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(self, dtype: torch.dtype, k: int) -> None:
        x, packed = torch.randn(200, k).to(dtype), cpu.pack(torch.randn(333, k).to(dtype))
        torch.set_num_threads(1)
        whole = cpu.linear(x, packed)
        torch.set_num_threads(2)
        for rows in (1, 3, 12, 13, 32, 96, 97, 200):
            assert torch.equal(cpu.linear(x[:rows], packed), whole[:rows])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_embedding_reads_the_packed_weight(self, dtype: torch.dtype) -> None:
        w, ids = torch.randn(77, 35).to(dtype), torch.randint(77, (50,))
        assert torch.equal(cpu.embedding(cpu.pack(w), ids), w[ids])
        with pytest.raises(ValueError, match="out of range"):
            cpu.embedding(cpu.pack(w), torch.tensor([77]))

    def test_refuses_what_does_not_fit(self) -> None:
        packed = cpu.pack(torch.randn(8, 64))
        for bad in (torch.randn(2, 62), torch.randn(2, 64).bfloat16(), torch.randn(64)):
            with pytest.raises(ValueError, match=r"do not fit|two-dimensional"):
                cpu.linear(bad, packed)
        assert cpu.linear(torch.randn(0, 64), packed).shape == (0, 8)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@needs_avx512
@pytest.mark.parametrize("dtype", DTYPES)
class TestElementwise:
    @pytest.mark.parametrize("size", [1, 15, 64, 100, 896, 4096])
    @pytest.mark.parametrize("rows", [1, 3, 50])
    def test_norms(self, dtype: torch.dtype, size: int, rows: int) -> None:
        x, residual = torch.randn(rows, 2 * size).to(dtype)[:, :size] * 3, torch.randn(rows, size).to(dtype)
        weight = torch.randn(size).to(dtype)
        poison(rows, size, dtype=dtype)
        normed = cpu.rms_norm(x, weight, 1e-5)
        check(normed, reference.rms_norm(x.double(), weight.double(), 1e-5), 3)
        check(normed, torch_ops.rms_norm(x, weight, 1e-5), 3)
        total = residual + x
        both, updated = cpu.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(updated, total)
        check(both, torch_ops.rms_norm(total, weight, 1e-5), 3)
        assert torch.equal(both, cpu.rms_norm(total, weight, 1e-5))

    @pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(16, 4, 4), (32, 4, 1), (64, 14, 2), (128, 8, 2), (80, 2, 2)])
    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("block_size", [1, 16, 64])
    def test_rope_write(self, dtype: torch.dtype, dim: int, heads: int, kv_heads: int, normed: bool, block_size: int) -> None:
        tokens, layers, blocks = 21, 2, 64 // block_size + 1
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim + 32).to(dtype)[:, :-32]
        angles = torch.arange(100)[:, None] * rotary.inverse_frequencies(dim, 1e4, None)
        table = torch.cat((angles.cos(), angles.sin()), 1)
        positions, slots = torch.randint(100, (tokens,)), torch.randperm(blocks * block_size)[:tokens]
        slots[4] = -1
        kv = torch.full((blocks, layers, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype)
        norms = [torch.randn(dim).to(dtype) for _ in range(2)]
        weights = [weight if normed else None for weight in norms]
        got = cpu.rope_write(qkv, table, positions, slots, kv, 1, heads, *weights, 1e-6)

        q, k, v = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        if normed:
            q, k = (torch_ops.rms_norm(part, weight, 1e-6) for part, weight in zip((q, k), norms, strict=True))
        cos, sin = table[positions][:, None].to(dtype).chunk(2, -1)
        expected_q, expected_k = rotate(q, cos, sin), rotate(k, cos, sin)
        kept = torch.tensor([t for t in range(tokens) if t != 4])
        written = kv[slots[kept] // block_size, 1, :, :, slots[kept] % block_size]
        assert torch.equal(written[:, 1], v[kept])
        if normed:
            check(got, expected_q, 4)
            check(written[:, 0], expected_k[kept], 4)
        else:
            assert torch.equal(got, expected_q)
            assert torch.equal(written[:, 0], expected_k[kept])
        again = torch.full_like(kv, torch.nan)
        assert torch.equal(torch_ops.rope_write(qkv, table, positions, slots, again, 1, heads, *weights, 1e-6), expected_q)
        check(kv.nan_to_num(0.0), again.nan_to_num(0.0), 4)
        assert kv[:, 0].isnan().all()
        assert (~kv.isnan()).sum() == 2 * kv_heads * dim * len(kept)

    @pytest.mark.parametrize("size", [1, 16, 257, 32000, 151936])
    @pytest.mark.parametrize("rows", [1, 9])
    def test_argmax(self, dtype: torch.dtype, size: int, rows: int) -> None:
        logits = torch.randn(rows, size + 3).to(dtype)[:, :size]
        top = logits.double().max(1, keepdim=True).values
        lowest = (logits.double() == top).long().argmax(1)
        assert torch.equal(cpu.argmax(logits), lowest)
        assert cpu.argmax(torch.full((rows, size), -torch.inf, dtype=dtype)).tolist() == [0] * rows


def exact_attention(q: torch.Tensor, kv: torch.Tensor, blocks: torch.Tensor, context: int, window: int | None) -> torch.Tensor:
    """fp64, one sequence; see kernels/reference.py."""
    dim, heads, kv_heads = q.shape[2], q.shape[1], kv.shape[3]
    keys, values = (kv[blocks, 1, i].double().transpose(1, 2).reshape(-1, kv_heads, dim)[:context] for i in (0, 1))
    keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * dim**-0.5
    distance = torch.arange(context - len(q), context)[:, None] - torch.arange(context)
    unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values)


class Paged:
    """Ragged sequences over poisoned blocks in random order, and what attention should make of them."""

    def __init__(
        self, contexts: list[int], new: list[int], dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, dim: int
    ) -> None:
        counts = [-(-n // block_size) for n in contexts]
        self.kv = torch.full((sum(counts) + 1, 2, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype)
        self.blocks = torch.randperm(sum(counts) + 1)[: sum(counts)].split(counts)
        self.tables = torch.full((len(contexts), max(counts) + 2), 2**30, dtype=torch.int32)
        for s, (blocks, context) in enumerate(zip(self.blocks, contexts, strict=True)):
            self.tables[s, : len(blocks)] = blocks
            at = torch.arange(context)
            self.kv[blocks[at // block_size], 1, :, :, at % block_size] = torch.randn(context, 2, kv_heads, dim).to(dtype)
        self.contexts, self.new = contexts, new
        self.start = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        self.q = torch.randn(sum(new), heads, dim).to(dtype)

    def run(self, window: int | None, sequences: slice = slice(None), out: torch.Tensor | None = None) -> torch.Tensor:
        first, last = sequences.indices(len(self.new))[:2]
        start = self.start[first : last + 1]
        lens = torch.tensor(self.contexts[sequences], dtype=torch.int32)
        q = self.q[start[0] : start[-1]]
        return cpu.paged_attention(
            q, self.kv, 1, self.tables[sequences], start - start[0], lens, max(self.new), max(self.contexts), window, out
        )

    def exact(self, window: int | None) -> torch.Tensor:
        parts = self.q.split(self.new)
        return torch.cat([exact_attention(q, self.kv, b, c, window) for q, b, c in zip(parts, self.blocks, self.contexts, strict=True)])


@needs_avx512
@pytest.mark.parametrize("dtype", DTYPES)
class TestAttention:
    @pytest.mark.parametrize("window", [None, 1, 20, 100, 600])
    @pytest.mark.parametrize("block_size", [1, 16, 64])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (14, 2, 64), (8, 2, 128), (4, 1, 32), (2, 2, 16), (4, 2, 80)])
    def test_ragged(self, dtype: torch.dtype, window: int | None, block_size: int, heads: int, kv_heads: int, dim: int) -> None:
        paged = Paged([1, 33, 700, 64, 150, 90], [1, 33, 1, 3, 150, 40], dtype, block_size, heads, kv_heads, dim)
        out = torch.full_like(paged.q, torch.nan)
        assert paged.run(window, out=out) is out
        check(out, paged.exact(window), 1.0)
        lens = torch.tensor(paged.contexts, dtype=torch.int32)
        twin = torch_ops.paged_attention(paged.q, paged.kv, 1, paged.tables, paged.start, lens, 150, 700, window)
        check(out, twin, 2.0)

    @pytest.mark.parametrize("window", [None, 300])
    def test_few_long_sequences(self, dtype: torch.dtype, window: int | None) -> None:
        paged = Paged([2000], [1], dtype, 16, 14, 2, 64)
        torch.set_num_threads(2)
        poison(1, 14, 64, dtype=dtype)
        check(paged.run(window), paged.exact(window), 0.2)

    @pytest.mark.parametrize("window", [None, 70])
    def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(self, dtype: torch.dtype, window: int | None) -> None:
        paged = Paged([1500, 40, 700, 200], [1, 40, 5, 200], dtype, 16, 14, 2, 64)
        torch.set_num_threads(1)
        whole = paged.run(window).split(paged.new)
        torch.set_num_threads(2)
        for s in range(4):
            assert torch.equal(paged.run(window, slice(s, s + 1)), whole[s])

    def test_chunks_have_the_bits_of_the_whole(self, dtype: torch.dtype) -> None:
        whole, context = Paged([700], [700], dtype, 16, 14, 2, 64), 700
        expected = whole.run(None)
        for size in (1, 13, 256):
            for first in range(0, context, size * 7):
                rows = slice(first, min(first + size, context))
                lens, start = torch.tensor([rows.stop], dtype=torch.int32), torch.tensor([0, rows.stop - first], dtype=torch.int32)
                chunk = cpu.paged_attention(whole.q[rows], whole.kv, 1, whole.tables, start, lens, size, context, None)
                assert torch.equal(chunk, expected[rows])

    def test_padding_is_harmless(self, dtype: torch.dtype) -> None:
        paged = Paged([50, 20], [1, 1], dtype, 16, 4, 2, 32)
        start, lens = torch.tensor([0, 1, 1, 2, 3, 4], dtype=torch.int32), torch.tensor([50, 7, 20, 0, 0], dtype=torch.int32)
        tables = torch.zeros(5, 6, dtype=torch.int32)
        tables[[0, 2]] = paged.tables[:2, :6]
        q = torch.cat((paged.q, torch.full((4, 4, 32), torch.nan, dtype=dtype)))
        out = cpu.paged_attention(q, paged.kv, 1, tables, start, lens, 1, 50, None, torch.full_like(q, torch.nan))
        assert torch.equal(out[:2], paged.run(None))
        assert out.isfinite().all()

    def test_refuses_tables_that_are_too_short(self, dtype: torch.dtype) -> None:
        paged = Paged([50], [1], dtype, 16, 4, 2, 32)
        with pytest.raises(ValueError, match="out of range"):
            cpu.paged_attention(paged.q, paged.kv, 1, paged.tables[:, :3], paged.start, torch.tensor([50], dtype=torch.int32), 1, 50, None)


@needs_avx512
def test_own_threads_give_the_same_bits() -> None:
    x, packed = torch.randn(150, 700).bfloat16(), cpu.pack(torch.randn(1000, 700).bfloat16())
    expected = cpu.linear(x, packed)
    try:
        cpu.own_threads(True)
        for threads in (2, 4, 1, 3):
            torch.set_num_threads(threads)
            for _ in range(200):
                assert torch.equal(cpu.linear(x[:20], packed), expected[:20])
            with ThreadPoolExecutor(3) as pool:  # callers that meet do not wait for each other
                assert all(torch.equal(y, expected) for y in pool.map(lambda _: cpu.linear(x, packed), range(50)))
    finally:
        cpu.own_threads(False)


@needs_avx512
def test_builds_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is loaded without a compiler's work."""
    assert cpu.load() is not None
    target = build.cache_folder() / f"{build.NAME}-{build.fingerprint()}.so"
    (tmp_path / target.name).write_bytes(target.read_bytes())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.extension(tmp_path).linear


@pytest.mark.parametrize("lack", ["compiler", "cpu", "headers"])
def test_falls_back_with_one_line(lack: str, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu._attempt.cache_clear()
    if lack == "compiler":
        monkeypatch.setattr(build, "missing_cpu_flags", list)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif lack == "cpu":
        monkeypatch.setattr(build, "missing_cpu_flags", lambda: ["avx512_bf16"])
    else:
        monkeypatch.setattr(build, "missing_cpu_flags", list)
        monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
        failed = subprocess.CompletedProcess([], 1, "", "x.cpp:1: error: no such file")
        monkeypatch.setattr(build.subprocess, "run", lambda command, **_: failed)
    try:
        assert cpu.load() is None
        assert cpu.load() is None
        assert not cpu.supports(torch.bfloat16, 64)
        assert cpu.reason()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    finally:
        cpu._attempt.cache_clear()
