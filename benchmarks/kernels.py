"""Each GPU kernel's time as a share of what the hardware allows, for the shapes of Llama-3.1-8B in bf16. Needs an NVIDIA GPU.

    python benchmarks/kernels.py [--bandwidth 4.3] [--flops 790]

The limit of a kernel is the larger of its bytes (each input read once, each output written once) over the bandwidth (TB/s, a measured copy)
and its products over the rate (TFLOP/s, a measured bf16 product). Times: median of replays of a CUDA graph, calls rotated over layers so
that the second-level cache is cold where a step would find it cold.
"""

import argparse
from collections.abc import Callable

import torch

from baton.kernels import attention, flash, fused

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
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


def attention_row(name: str, attend: Callable[..., torch.Tensor], batch: int, new: int, context: int, block_size: int) -> Row:
    """`batch` sequences of `context` tokens, the last `new` of which are queries."""
    blocks = -(-context // block_size)
    layers = max(1, min(8, 2**33 // (batch * context * 4096)))
    kv = torch.empty(batch * blocks, layers, 2, KV_HEADS, block_size, DIM, dtype=torch.bfloat16, device="cuda").normal_()
    tables = torch.randperm(batch * blocks, device="cuda").view(batch, blocks).int()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * new
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q, more = random(batch * new, HEADS, DIM), {}
    if attend is flash.flash_paged_attention:
        more = {"keys": flash.dense_keys(starts, lens, attention.few_queries(q, kv), batch * context)}
    elif new == 1:
        more = {"workspace": attention.decode_workspace(batch, KV_HEADS, DIM, q.device)}
    size = batch * (context * KV_HEADS * 2 + new * HEADS * 2) * DIM * 2
    pairs = batch * new * (context - new + (new + 1) / 2)
    title = f"{name}, {batch} x {f'{new:,} of ' if new < context else ''}{context:,}, blocks of {block_size}"
    return title, lambda i: attend(q, kv, i % layers, tables, starts, lens, new, context, **more), size, pairs * HEADS * DIM * 4


def fused_rows(tokens: int) -> list[Row]:
    x, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
    gate_up, qkv = random(tokens, 2 * INTERMEDIATE), random(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    kv, table = random(-(-tokens // 16), 2, 2, KV_HEADS, 16, DIM), torch.randn(tokens, DIM, device="cuda")
    where, unit, rope = torch.arange(tokens, device="cuda"), tokens * 2, fused.rope_write
    return [
        (f"rms_norm, {tokens:,} tokens", lambda i: fused.rms_norm(x, weight, 1e-5), unit * HIDDEN * 2, 0),
        (f"add_rms_norm, {tokens:,} tokens", lambda i: fused.add_rms_norm(x, residual, weight, 1e-5), unit * HIDDEN * 4, 0),
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
        random(8192, 8192) @ random(8192, 8192)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; limits: {args.bandwidth} TB/s, {args.flops} TFLOP/s")
    print(f"FlashAttention-3: {flash.unavailable() or 'yes'}\n")
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
    for batch, context in ((1, 128), (8, 128), (32, 128), (128, 128), (256, 128), (1, 4096), (8, 4096), (64, 4096), (1, 100_000)):
        show(attention_row("decode", attention.paged_attention, batch, 1, context, 16))
    show(attention_row("decode", attention.paged_attention, 64, 1, 4096, 64))
    prefill = [("prefill, Triton", attention.paged_attention)]
    if not flash.unavailable():
        prefill.append(("prefill, FlashAttention-3", flash.flash_paged_attention))
    for name, attend in prefill:
        for batch, new, context in ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (8, 8192, 8192), (16, 2048, 2048), (1, 2048, 32_768)):
            show(attention_row(name, attend, batch, new, context, 16))
        show(attention_row(name, attend, 1, 8192, 8192, 64))


if __name__ == "__main__":
    main()
