"""A worker's rank 0 for test_gpu_parallel.py, in a process of its own, for a group is for a process's life: model folder, number of ranks,
device. Prints what the engine gave for each of CASES as a line of JSON."""

import asyncio
import json
import sys
from pathlib import Path

from baton.config import WorkerConfig
from baton.runtime.build import build_engine
from baton.runtime.crew import Crew, Solo
from baton.runtime.launch import LocalLauncher
from baton.runtime.loaded import load
from baton.types import GenerateRequest, SamplingParams

LENGTHS = (1, 15, 16, 17, 100, 161, 700)
KINDS = ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}, {"temperature": 0, "repetition_penalty": 1.3}, {"logprobs": 3})
NEW_TOKENS = 40


def prompt(length: int) -> tuple[int, ...]:
    return tuple((31 * i * i + 7 * length + i) % 250 + 2 for i in range(length))


def requests() -> list[GenerateRequest]:
    """All together: steps with prompts of all sizes, captured decode steps, draws that are not greedy among those that are."""
    return [
        GenerateRequest(
            request_id=f"{length}-{kind}",
            prompt_token_ids=prompt(length),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **{"temperature": 0, **KINDS[kind]}),
        )
        for length in LENGTHS
        for kind in range(len(KINDS))
    ]


async def main(folder: str, size: int, device: str, budget: int) -> None:
    engine_settings = {
        "device": device, "dtype": "float32", "tensor_parallel_size": size, "num_blocks": 400, "max_num_seqs": 8,
        "max_num_batched_tokens": budget, "num_threads": 1,
    }  # fmt: skip
    config = WorkerConfig.model_validate({"model": folder, "engine": engine_settings})
    team = Crew(config, LocalLauncher()) if size > 1 else Solo()
    loaded = load(Path(folder), config.engine, team)
    team.ready(loaded.fingerprint)
    engine = build_engine(loaded, (), budget_s=2)
    engine.on_stopped = team.close
    engine.start()

    async def tokens(request: GenerateRequest) -> list[int]:
        return [token.token_id async for output in engine.submit(request) for token in output.tokens]

    try:
        print(json.dumps(await asyncio.gather(*map(tokens, requests()))), flush=True)
        assert await engine.check_integrity() == []
    finally:
        await engine.stop()


if __name__ == "__main__":
    import os

    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    os._exit(0)  # as services end
