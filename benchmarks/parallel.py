"""One worker on several GPUs: milliseconds per decode step and per prefill at each degree, on random weights of Llama-3.1-8B's shape, bf16.

    python -m benchmarks.parallel [--degrees 1,2] [--json FILE]

Each degree has a process of its own, with the ranks that it starts. A decode step and a prefill are what `benchmarks/engine.py` measures:
of the whole engine. Best of three.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from baton.config import WorkerConfig
from baton.runtime.build import build_engine
from baton.runtime.crew import Crew, Solo
from baton.runtime.launch import LocalLauncher
from baton.runtime.loaded import load
from benchmarks.engine import Driver, write_config

DECODES = ((1, 128), (8, 128), (32, 128), (128, 128), (8, 4096), (64, 4096))  # requests, tokens of context
PREFILLS = ((1, 128), (1, 512), (1, 2048), (1, 8192))
STEPS = 128


async def measure(degree: int, shape: str) -> dict[str, float]:
    """Milliseconds by case, of a worker of `degree` ranks, this process being the first."""
    settings = {"device": "cuda", "load_format": "dummy", "max_model_len": 16384, "gpu_memory_utilization": 0.85}
    folder = write_config(shape)
    config = WorkerConfig.model_validate({"model": str(folder), "engine": {**settings, "tensor_parallel_size": degree}})
    team = Crew(config, LocalLauncher()) if degree > 1 else Solo()
    loaded = load(folder, config.engine, team)
    team.ready(loaded.fingerprint)
    engine = build_engine(loaded, (), budget_s=2, prefix_caching=False)
    engine.on_stopped = team.close
    engine.start()
    driver, found = Driver(engine, loaded.config.vocab_size), {"KV blocks": float(loaded.pool.num_blocks)}
    try:
        for batch, length in DECODES:
            await driver.run(batch, 128, 8)
            steps = [(await driver.run(batch, length, 1 + STEPS)).step for _ in range(3)]
            found[f"decode, {batch} × {length:,} tokens"] = min(steps) * 1e3
        for batch, length in PREFILLS:
            found[f"prefill, {batch} × {length:,} tokens"] = min([(await driver.run(batch, length, 1)).all for _ in range(4)][1:]) * 1e3
    finally:
        await engine.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--degrees", default="1,2")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.json.write_text(json.dumps(asyncio.run(measure(arguments.one, arguments.model))))
        sys.stderr.flush()
        os._exit(0)  # as services end
    columns: dict[str, dict[str, float]] = {}
    for degree in arguments.degrees.split(","):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "found.json"
            command = [sys.executable, "-m", "benchmarks.parallel", "--one", degree, "--model", arguments.model, "--json", str(answer)]
            subprocess.run(command, check=True)
            columns[degree] = json.loads(answer.read_text())
    first = next(iter(columns.values()))
    print("| " + " | ".join(["ms", *(f"{degree} GPU{'s' * (degree != '1')}" for degree in columns)]) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for case in first:
        print("| " + " | ".join([case, *(f"{found[case]:,.2f}" for found in columns.values())]) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(columns, indent=1))


if __name__ == "__main__":
    main()
