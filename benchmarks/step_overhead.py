"""What a step and a streamed token cost beside the model: a model of one layer, batches of 32, on the CPU.

    python benchmarks/step_overhead.py [--batch 32] [--rounds 5]

First the engine alone in this process: µs per step, and the share of it in the model's forward pass. Then a cluster of one unified worker
and a router under `baton bench`'s load: CPU µs per streamed token of each process, which does not depend on who waits for whom. Medians.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import psutil

from baton.cli.bench import Load, drive
from baton.cli.cluster import Cluster, Plan
from baton.config import EngineConfig
from baton.runtime.build import build_engine
from baton.runtime.loaded import load
from baton.types import GenerateRequest, SamplingParams

DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
NEW_TOKENS = 256
SETTINGS = {"device": "cpu", "load_format": "dummy", "prefix_caching": True}


def one_layer(folder: Path) -> Path:
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return folder


async def engine_alone(folder: Path, batch: int, rounds: int) -> None:
    loaded = load(folder, EngineConfig.model_validate(SETTINGS))
    forward, inside = loaded.runner._forward, 0.0

    def timed(*step: Any) -> Any:
        nonlocal inside
        begun = time.perf_counter()
        out = forward(*step)
        inside += time.perf_counter() - begun
        return out

    loaded.runner._forward = timed
    engine = build_engine(loaded, (), budget_s=2.0)
    engine.start()

    async def drain(name: str) -> None:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        prompt = tuple(hash((name, i)) % 2000 + 10 for i in range(16))
        async for _ in engine.submit(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)):
            pass

    seen: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        steps, inside = 0, 0.0

        def count(plan: object, seconds: float) -> None:
            nonlocal steps
            steps += 1

        engine.on_step = count
        begun = time.perf_counter()
        await asyncio.gather(*(drain(f"{number}-{i}") for i in range(batch)))
        seen.append(((time.perf_counter() - begun) / steps * 1e6, inside / steps * 1e6))
    await engine.stop()
    whole, model = (statistics.median(column) for column in zip(*seen[1:], strict=True))
    rest = f"{whole - model:.0f} beside it, {(whole - model) / batch:.1f} a token"
    print(f"engine alone, batch {batch}: µs per step {whole:.0f}: {model:.0f} in the forward pass, {rest}")


async def streamed(folder: Path, batch: int, rounds: int) -> None:
    settings = tuple(f"unified.engine.{key}={value}" for key, value in SETTINGS.items())
    one_worker: dict[str, Any] = {"prefill": 0, "decode": 0, "unified": 1, "kvstore": 0, "etcd": "none"}
    cluster = Cluster(Plan(model=folder, http_port=0, grpc_port=0, settings=settings, **one_worker))
    await cluster.start()
    try:
        processes = {p["role"]: psutil.Process(p["pid"]) for p in cluster.describe()["processes"]} | {"load generator": psutil.Process()}
        seen: dict[str, list[float]] = {name: [] for name in (*processes, "wall")}
        for number in range(rounds + 1):
            load = Load(
                num_requests=2 * batch, concurrency=batch, rate=None, input_len=(16, 16), output_len=(NEW_TOKENS, NEW_TOKENS),
                shared_prefix=0, repeat_prompts=1, seed=number,
            )  # fmt: skip
            before, begun = {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}, time.perf_counter()
            await drive(cluster.http, load)
            spent = {name: sum(p.cpu_times()[:2]) - before[name] for name, p in processes.items()} | {"wall": time.perf_counter() - begun}
            for name, seconds in spent.items():
                seen[name].append(seconds / (load.num_requests * NEW_TOKENS) * 1e6)
        costs = ", ".join(f"{name} {statistics.median(values[1:]):.0f}" for name, values in seen.items())
        print(f"streamed, {batch} at a time: µs per token: {costs}")
    finally:
        await cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = one_layer(Path(name) / "one-layer")
        asyncio.run(engine_alone(folder, arguments.batch, arguments.rounds))
        asyncio.run(streamed(folder, arguments.batch, arguments.rounds))


if __name__ == "__main__":
    main()
