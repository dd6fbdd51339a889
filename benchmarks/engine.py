"""The engine alone on one GPU: milliseconds per decode step and per prefill, on random weights of a model's shape in bf16.

    python benchmarks/engine.py [--model llama-3.1-8b|qwen3-8b] [--json FILE] [--profile] [--only REGEX]
    python benchmarks/engine.py --first-token FOLDER     seconds until a checkpoint's first token, from the start of the process

A decode step is measured from the first to the last token of the request that comes last, while all others still run; a prefill is the
time until all have their first token. Best of several, after warming up. The prefix cache is off. `benchmarks/engine_peer.py` does the
same with vLLM, and prints both side by side.
"""

import argparse
import time

STARTED = time.perf_counter()

import asyncio
import json
import random
import re
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from baton.config import EngineConfig
from baton.runtime.build import build_engine
from baton.runtime.loaded import load
from baton.runtime.engine import Engine
from baton.types import GenerateRequest, SamplingParams

_COMMON = {
    "vocab_size": 128256, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
MODELS = {
    "llama-3.1-8b": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 14336, "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
        "bos_token_id": 151643, "eos_token_id": 151645,
    },
}  # fmt: skip
DECODES = ((1, 128, 256), (8, 128, 256), (32, 128, 256), (128, 128, 256), (256, 128, 256), (8, 4096, 256), (64, 4096, 256))
PREFILLS = ((1, 512), (1, 2048), (1, 8192), (16, 2048), (8, 8192))
MAX_MODEL_LEN = 16384


def write_config(name: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"shape-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder


class Times(NamedTuple):
    """Seconds: until all requests have all their tokens; of a decode step."""

    all: float
    step: float


def tokens_of(index: int, batch: int, new_tokens: int) -> int:
    """How many tokens the index-th request wants: those before the last go on until it has ended."""
    return new_tokens if new_tokens == 1 or index == batch - 1 else new_tokens + 48


class Driver:
    def __init__(self, engine: Engine, vocab: int) -> None:
        self.engine, self._vocab, self._rng, self._count = engine, vocab, random.Random(0), 0

    async def run(self, batch: int, length: int, new_tokens: int) -> Times:
        """Of `batch` random prompts of `length` tokens."""
        requests = [
            GenerateRequest(
                request_id=f"r{self._count + i}",
                prompt_token_ids=tuple(self._rng.randrange(10, self._vocab - 300) for _ in range(length)),
                sampling=SamplingParams(max_tokens=tokens_of(i, batch, new_tokens), temperature=0, ignore_eos=True),
            )
            for i in range(batch)
        ]
        self._count += batch
        started = time.perf_counter()
        sequences = [self.engine.submit(request) for request in requests]
        *_, (first, last) = await asyncio.gather(*(self._drain(sequence) for sequence in sequences))
        return Times(time.perf_counter() - started, (last - first) / max(new_tokens - 1, 1))

    async def _drain(self, sequence: object) -> tuple[float, float]:
        """When the first token came, and the last."""
        first = last = 0.0
        async for output in sequence:  # type: ignore[attr-defined]
            if output.tokens:  # else a part of its prompt was computed
                last = time.perf_counter()
                first = first or last
        return first, last


async def measure(run: Callable[[int, int, int], Awaitable[Times]], only: str = "") -> dict[str, float]:
    """Milliseconds by case, of those in whose names `only` is found."""
    found: dict[str, float] = {}
    await run(8, 128, 16)
    for batch, length, steps in DECODES:
        if not re.search(only, f"decode {batch} x {length}"):
            continue
        await run(batch, 128, 8)
        best = min([(await run(batch, length, 1 + steps)).step for _ in range(3)]) * 1e3
        found[f"decode {batch} x {length}"] = best
        print(f"decode batch={batch} context={length}: {best:.3f} ms/step", flush=True)
    for batch, length in PREFILLS:
        if not re.search(only, f"prefill {batch} x {length}"):
            continue
        best = min([(await run(batch, length, 1)).all for _ in range(4)])
        found[f"prefill {batch} x {length}"] = best * 1e3
        print(f"prefill batch={batch} length={length}: {best * 1e3:.1f} ms {batch * length / best:.0f} tok/s", flush=True)
    return found


async def steps(driver: Driver, batch: int, length: int) -> None:
    seen: list[str] = []
    driver.engine.on_step = lambda plan, seconds: seen.append(f"{plan.num_tokens} tokens {seconds * 1e3:.1f} ms")
    took = (await driver.run(batch, length, 1)).all
    print(f"\n-- steps of {batch} x {length}, {took * 1e3:.1f} ms in all: {'; '.join(seen)}")


async def profile(driver: Driver, batch: int, length: int, new_tokens: int) -> None:
    """Where the time goes: the longest kernels, and when the GPU had nothing to do."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        took = (await driver.run(batch, length, new_tokens)).all
    print(f"\n-- profile: {batch} x {length} tokens, {new_tokens} new, {took * 1e3:.1f} ms")
    for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:12]:
        total = event.self_device_time_total
        print(f"{event.key[:60]:60} {total / 1e3:9.2f} ms {event.count:6} x {total / event.count:8.1f} us")
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in profiler.events() or () if event.device_time)
    end, last, gaps, idle = spans[0][0], "", [], 0.0
    for start, stop, name in spans:
        if start > end:
            idle += start - end
            gaps.append((start - end, last, name))
        if stop > end:
            end, last = stop, name
    whole = end - spans[0][0]
    print(f"from the first kernel to the last {whole / 1e3:.2f} ms, idle {idle / 1e3:.2f} ms in {len(gaps)} gaps; the longest:")
    for gap, before, after in sorted(gaps, reverse=True)[:5]:
        print(f"  {gap:8.1f} us between {before[:40]} and {after[:40]}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--first-token", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    settings = EngineConfig(
        device="cuda",
        load_format="safetensors" if arguments.first_token else "dummy",
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
    )
    loaded = load(arguments.first_token or write_config(arguments.model), settings)
    engine = build_engine(loaded, (), budget_s=2, prefix_caching=False)
    engine.start()
    driver = Driver(engine, loaded.config.vocab_size)
    await driver.run(1, 128, 1)
    print(f"first token after {time.perf_counter() - STARTED:.1f} s; {loaded.pool.num_blocks} KV blocks", flush=True)
    try:
        if arguments.first_token:
            return
        found = await measure(driver.run, arguments.only)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
        if arguments.profile:
            await steps(driver, 16, 2048)
            for case in ((8, 128, 20), (256, 128, 20), (8, 4096, 40), (64, 4096, 20), (1, 2048, 1), (16, 2048, 1), (1, 8192, 1)):
                await profile(driver, *case)
    finally:
        await engine.stop()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
