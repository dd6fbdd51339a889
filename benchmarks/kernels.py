"""Each GPU kernel's time as a share of what the hardware allows, for the shapes of Llama-3.1-8B in bf16. Needs an NVIDIA GPU.

    python benchmarks/kernels.py [--bandwidth 4.3] [--flops 790]

The limit of a kernel is the larger of its bytes (each input read once, each output written once) over the bandwidth (TB/s, a measured copy)
and its products over the rate (TFLOP/s, a measured bf16 product). Times: median of replays of a CUDA graph, calls rotated over layers so
that the second-level cache is cold where a step would find it cold.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from baton.kernels import attention, flash, fused, hopper, linear

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 4096, 14336, 128256
Row = tuple[str, Callable[[int], object], float, float]  # name, i-th call, bytes, products


def microseconds(call: Callable[[int], object], calls: int = 12, replays: int = 7) -> float:
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[replays // 2]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def attention_row(kind: str, batch: int, new: int, context: int, block_size: int = 64) -> Row:
    """`batch` sequences of `context` tokens, the last `new` of which are queries."""
    blocks = -(-context // block_size)
    layers = max(1, min(8, 2**33 // (batch * context * 4096)))
    kv = torch.empty(batch * blocks, layers, 2, KV_HEADS, block_size, DIM, dtype=torch.bfloat16, device="cuda").normal_()
    tables = torch.randperm(batch * blocks, device="cuda").view(batch, blocks).int()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * new
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q, lengths = random(batch * new, HEADS, DIM), [(new, context)] * batch
    out, lists = torch.empty_like(q), (tables, starts, lens)

    def call(i: int) -> None:
        if kind == "prefill, FlashAttention-3":
            flash.attend(q, kv, i % layers, *lists, lengths, out)
        elif kind == "prefill, Gluon":
            hopper.attend(q, kv, i % layers, *lists, None, out)
        else:
            attention.paged_attention(q, kv, i % layers, *lists, new, context, None, out, lengths)

    size = batch * (context * KV_HEADS * 2 + new * HEADS * 2) * DIM * 2
    pairs = batch * new * (context - new + (new + 1) / 2)
    title = f"{kind}, {batch} x {f'{new:,} of ' if new < context else ''}{context:,}, blocks of {block_size}"
    return title, call, size, pairs * HEADS * DIM * 4


def linear_rows(tokens: int) -> list[Row]:
    rows: list[Row] = []
    qkv = (HEADS + 2 * KV_HEADS) * DIM
    for name, size_out, size_in in (
        ("qkv", qkv, HIDDEN),
        ("o", HIDDEN, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
        ("lm_head", VOCAB, HIDDEN),
    ):
        weights, x = [random(size_out, size_in) for _ in range(2 if name == "lm_head" else 8)], random(tokens, size_in)
        call = partial(lambda weights, x, i: linear.linear(x, weights[i % len(weights)]), weights, x)
        if name in ("o", "down"):
            residual = random(tokens, size_out)
            call = partial(lambda weights, x, r, i: linear.linear_add(x, weights[i % 8], None, r), weights, x, residual)
        rows.append((f"{name}, {tokens:,} tokens", call, 2 * size_out * size_in, 2 * tokens * size_out * size_in))
    weights, x = [random(2 * INTERMEDIATE, HIDDEN) for _ in range(4)], random(tokens, HIDDEN)
    size = 2 * INTERMEDIATE * HIDDEN
    rows.append((f"gate, up, silu, {tokens:,} tokens", lambda i: linear.gated(x, weights[i % 4]), 2 * size, 2 * tokens * size))
    return rows


def fused_rows(tokens: int) -> list[Row]:
    x, weight = random(tokens, HIDDEN), random(HIDDEN)
    gate_up, qkv = random(tokens, 2 * INTERMEDIATE), random(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    kv, table = random(-(-tokens // 16), 2, 2, KV_HEADS, 16, DIM), torch.randn(tokens, DIM, device="cuda")
    where, unit, rope = torch.arange(tokens, device="cuda"), tokens * 2, fused.rope_write
    return [
        (f"rms_norm, {tokens:,} tokens", lambda i: fused.rms_norm(x, weight, 1e-5), unit * HIDDEN * 2, 0),
        (f"silu_mul, {tokens:,} tokens", lambda i: fused.silu_mul(gate_up), unit * INTERMEDIATE * 3, 0),
        (
            f"rope_write, {tokens:,} tokens",
            lambda i: rope(qkv, table, where, where, kv, i % 2, HEADS),
            unit * qkv.shape[1] * 2,
            0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--flops", type=float, default=790.0, help="TFLOP/s, bf16")
    args = parser.parse_args()
    for _ in range(30):
        _ = random(8192, 8192) @ random(8192, 8192)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; limits: {args.bandwidth} TB/s, {args.flops} TFLOP/s")
    print(f"attention of prompts: {attention.describe(torch.bfloat16, DIM)}\n")
    print(
        f"| {'kernel':<58} | {'µs':>9} | {'TB/s':>5} | {'TFLOP/s':>7} | of limit |\n|{'-' * 60}|{'-' * 11}|{'-' * 7}|{'-' * 9}|{'-' * 10}|"
    )

    def show(row: Row) -> None:
        name, call, size, products = row
        long = products > 1e11
        taken = microseconds(call, *((2, 3) if long else (12, 7)))
        limit = max(size / args.bandwidth, products / args.flops) / 1e6
        print(
            f"| {name:<58} | {taken:>9.1f} | {size / taken / 1e6:>5.2f} | {products / taken / 1e6:>7.0f} | {limit / taken:>8.0%} |",
            flush=True,
        )

    for tokens in (1, 32, 256, 8192):
        for row in fused_rows(tokens):
            show(row)
    for tokens in (1, 8, 32, 64, 128, 256, 8192):
        for row in linear_rows(tokens):
            show(row)
    for batch, context in ((1, 128), (8, 128), (32, 128), (128, 256), (256, 256), (1, 4096), (8, 4096), (64, 4096), (1, 100_000)):
        show(attention_row("decode", batch, 1, context))
    for kind in ("prefill, Gluon", "prefill, FlashAttention-3")[: 2 if flash.package() else 1]:
        for batch, new, context in ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (16, 512, 512), (1, 2048, 32_768)):
            show(attention_row(kind, batch, new, context))


if __name__ == "__main__":
    main()
