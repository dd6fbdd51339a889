"""The CPU kernels beside what torch offers, as tables.

    python benchmarks/cpu_kernels.py [linear] [attention] [step] [--threads 2] [--dtype bfloat16]

Weights rotate through more memory than the caches hold; engines alternate within a run and the medians are printed. Shapes are those of a
Qwen2 of 160 million parameters: 13 layers, hidden 896, 14 / 2 heads of 64, intermediate 3,072, vocabulary 32,000.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from baton.forward import ForwardBatch
from baton.kernels import cpu, torch_ops

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB, BLOCK = 13, 896, 14, 2, 64, 3072, 32000, 16
QKV = (HEADS + 2 * KV_HEADS) * DIM
LINEARS = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
LM_HEAD = (VOCAB, HIDDEN)
ONEDNN = torch.ops.mkldnn._linear_pointwise


def medians(ways: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Seconds per call of each, alternating."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def each(function: Callable[..., object], arguments: Iterable[tuple[object, ...]]) -> None:
    """Calls it with each; results are dropped at once, as a model does."""
    for one in arguments:
        function(*one)


def limits(dtype: torch.dtype) -> None:
    """What the machine itself does: reading memory, and torch's best matrix product."""
    data = torch.ones(2**28, dtype=torch.float32)
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    got = medians({"read": data.sum, "matmul": lambda: a @ b}, 5)
    print(f"torch: sum over 1 GiB {data.nbytes / got['read'] / 1e9:.1f} GB/s, matmul 2048³ {2 * 2048**3 / got['matmul'] / 1e9:.0f} GFLOP/s")


def table_linear(dtype: torch.dtype) -> None:
    shapes = [shape for _ in range(LAYERS) for shape in LINEARS.values()] + [LM_HEAD]
    plain = [torch.randn(shape).to(dtype) * 0.05 for shape in shapes]
    ours = [cpu.pack(w) for w in plain]
    size = sum(w.nbytes for w in plain)
    print(f"\nAll {len(shapes)} linears of a step ({size / 1e6:.0f} MB), {dtype}: ms, GB/s of weights, GFLOP/s")
    print("|    M | F.linear | prepacked oneDNN | ours | ours ÷ best other |\n|---|---|---|---|---|")
    for m in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 512, 1000):
        xs = {k: torch.randn(m, k).to(dtype) for k in (HIDDEN, INTERMEDIATE)}
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda xs=xs: each(functional.linear, ((xs[w.shape[1]], w) for w in plain)),
            "ours": lambda xs=xs: each(cpu.linear, ((xs[w.k], w) for w in ours)),
        }
        if dtype == torch.bfloat16:
            packed = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in plain]
            ways["onednn"] = lambda xs=xs, packed=packed: each(ONEDNN, ((xs[w.shape[1]], w, None, "none", [], "") for w in packed))
        got = medians(ways, 5 if m >= 128 else 9)

        def cell(seconds: float, m: int = m) -> str:
            return f"{seconds * 1e3:.2f} ms, {size / seconds / 1e9:.1f}, {m * size / plain[0].itemsize * 2 / seconds / 1e9:.0f}"

        onednn = cell(got["onednn"]) if "onednn" in got else "–"
        best = min(value for name, value in got.items() if name != "ours")
        print(f"| {m:4} | {cell(got['plain'])} | {onednn} | {cell(got['ours'])} | {got['ours'] / best:.2f} |", flush=True)


def paged(dtype: torch.dtype, lens: list[int], new: int) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = [-(-n // BLOCK) for n in lens]
    order = torch.randperm(sum(counts))
    kv = torch.randn(len(order), LAYERS, 2, KV_HEADS, BLOCK, DIM).to(dtype)
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int64)
    for row, part in zip(tables, order.split(counts), strict=True):
        row[: len(part)] = part
    positions = torch.cat([torch.arange(n - new, n) for n in lens])
    owner = torch.arange(len(lens)).repeat_interleave(new)
    batch = ForwardBatch(
        token_ids=positions,
        positions=positions,
        slots=tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK,
        query_start=torch.arange(0, len(lens) * new + 1, new, dtype=torch.int32),
        context_lens=torch.tensor(lens, dtype=torch.int32),
        block_tables=tables.int(),
        logits_rows=None,
        logits_owners=None,
        max_query_len=new,
        max_context_len=max(lens),
        lengths=None,
        kv=kv,
    )
    q = torch.randn(len(positions), HEADS, DIM).to(dtype)
    return batch, q, batch.block_tables, batch.query_start, batch.context_lens


def table_attention(dtype: torch.dtype) -> None:
    print(f"\nAttention of all {LAYERS} layers, {dtype}: ms (KV read in GB/s)")
    print("| sequences × context, new tokens | torch: gather + SDPA | ours | ours ÷ torch |\n|---|---|---|---|")
    for sequences, context, new in (
        (1, 128, 1), (8, 128, 1), (32, 128, 1), (1, 1024, 1), (8, 1024, 1), (32, 1024, 1), (1, 4096, 1), (8, 4096, 1),
        (1, 1000, 1000), (1, 4096, 512), (4, 512, 512),
    ):  # fmt: skip
        batch, q, tables, start, lens = paged(dtype, [context] * sequences, new)

        def ours(
            batch: ForwardBatch = batch, q: torch.Tensor = q, t: torch.Tensor = tables, s: torch.Tensor = start, c: torch.Tensor = lens
        ) -> None:
            for layer in range(LAYERS):
                cpu.paged_attention(q, batch.kv, layer, t, s, c, 0, 0, None)

        def theirs(
            batch: ForwardBatch = batch, q: torch.Tensor = q, t: torch.Tensor = tables, s: torch.Tensor = start, c: torch.Tensor = lens
        ) -> None:
            for layer in range(LAYERS):
                torch_ops.paged_attention(q, batch.kv, layer, t, s, c, 0, 0, None)

        got = medians({"torch": theirs, "ours": ours}, 5)
        size = sequences * context * KV_HEADS * DIM * 2 * q.itemsize * LAYERS
        print(
            f"| {sequences} × {context}, {new} | {got['torch'] * 1e3:.2f} ({size / got['torch'] / 1e9:.1f}) "
            f"| {got['ours'] * 1e3:.2f} ({size / got['ours'] / 1e9:.1f}) | {got['ours'] / got['torch']:.2f} |",
            flush=True,
        )


def table_step(dtype: torch.dtype) -> None:
    """A whole forward pass and greedy sampling as the decoder runs them, weights random."""
    linears = [
        {name: cpu.pack(torch.randn(shape).to(dtype) * 0.03, gated=name == "gate_up") for name, shape in LINEARS.items()}
        for _ in range(LAYERS)
    ]
    head = cpu.pack(torch.randn(LM_HEAD).to(dtype) * 0.03)
    norm, bias = torch.ones(HIDDEN, dtype=dtype), torch.zeros(QKV, dtype=dtype)
    layers = [(norm, w["qkv"], bias, None, None, w["o"], None, norm, w["gate_up"], None, w["down"], None, 0) for w in linears]
    forward = cpu.decoder(
        head, norm, head, layers, intermediate_size=INTERMEDIATE, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, eps=1e-5
    )
    angles = torch.arange(4096)[:, None] * 1e4 ** -(torch.arange(0, DIM, 2) / DIM)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    print(f"\nA step of the model, {dtype}: ms")
    print("| sequences × context, new tokens | step | linears | attention | other kernels, threads |\n|---|---|---|---|---|")
    for sequences, context, new in ((1, 128, 1), (8, 128, 1), (32, 128, 1), (1, 512, 512), (1, 1000, 1000)):
        batch, _, tables, start, lens = paged(dtype, [context] * sequences, new)
        ids, rows = torch.randint(VOCAB, (sequences * new,)), start[1:].long() - 1

        def step(
            batch: ForwardBatch = batch, tables: torch.Tensor = tables, start: torch.Tensor = start, lens: torch.Tensor = lens,
            ids: torch.Tensor = ids, rows: torch.Tensor = rows,
        ) -> torch.Tensor:  # fmt: skip
            return cpu.argmax(forward(ids, batch.positions, batch.slots, cos_sin, batch.kv, tables, start, lens, rows))

        xs = {k: torch.randn(len(ids), k).to(dtype) for k in (HIDDEN, INTERMEDIATE)}
        q = torch.randn(len(ids), HEADS, DIM).to(dtype)

        def only_linears(xs: dict[int, torch.Tensor] = xs, rows: torch.Tensor = rows) -> None:
            for weights in linears:
                for weight in weights.values():
                    cpu.linear(xs[weight.k], weight)
            cpu.linear(xs[HIDDEN][rows], head)

        def only_attention(
            q: torch.Tensor = q, kv: torch.Tensor = batch.kv, t: torch.Tensor = tables, s: torch.Tensor = start, c: torch.Tensor = lens
        ) -> None:
            for layer in range(LAYERS):
                cpu.paged_attention(q, kv, layer, t, s, c, 0, 0, None)

        got = medians({"step": step, "linears": only_linears, "attention": only_attention}, 5 if new > 1 else 15)
        rest = got["step"] - got["linears"] - got["attention"]
        print(
            f"| {sequences} × {context}, {new} | {got['step'] * 1e3:.2f} | {got['linears'] * 1e3:.2f} "
            f"| {got['attention'] * 1e3:.2f} | {rest * 1e3:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="all when none is named")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--own-threads", action="store_true", help="with OMP_WAIT_POLICY=passive; see cpu.own_threads")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if cpu.load() is None:
        raise SystemExit(f"no CPU kernels here: {cpu.reason()}")
    cpu.own_threads(arguments.own_threads)
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    limits(dtype)
    with torch.inference_mode():
        for table in arguments.tables or ("linear", "attention", "step"):
            {"linear": table_linear, "attention": table_attention, "step": table_step}[table](dtype)


if __name__ == "__main__":
    main()
