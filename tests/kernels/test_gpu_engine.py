"""The whole engine on a GPU, with captured steps and steps in flight: greedy tokens are those of transformers on the CPU, in fp32."""

import asyncio
from pathlib import Path

import pytest
import torch

from baton.config import EngineConfig
from baton.runtime.build import build_engine
from baton.runtime.loaded import load
from baton.types import GenerateOutput, GenerateRequest, SamplingParams
from tests.parity.models import FAMILIES, Family

pytestmark = pytest.mark.gpu
LENGTHS = (1, 15, 16, 17, 100, 161, 700)
NEW_TOKENS = 40


def prompt(length: int) -> list[int]:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


async def generate(folder: Path, requests: list[GenerateRequest], **settings: object) -> list[list[int]]:
    return list(map(ids, await outputs(folder, requests, **settings)))


def ids(outputs: list[GenerateOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


async def outputs(folder: Path, requests: list[GenerateRequest], **settings: object) -> list[list[GenerateOutput]]:
    loaded = load(folder, EngineConfig.model_validate({"device": "cuda", "num_blocks": 400, "max_num_seqs": 8, **settings}))
    engine = build_engine(loaded, (), budget_s=2)
    engine.start()

    async def told(request: GenerateRequest) -> list[GenerateOutput]:
        return [output async for output in engine.submit(request)]

    try:
        torch.cuda.reset_peak_memory_stats()
        found = await asyncio.gather(*map(told, requests))
        assert await engine.check_integrity() == []
        assert engine.load.blocks_free == engine.load.blocks_total
        return found
    finally:
        await engine.stop()


def request(length: int, **sampling: object) -> GenerateRequest:
    params = SamplingParams(max_tokens=NEW_TOKENS, **{"temperature": 0, "ignore_eos": True, **sampling})
    return GenerateRequest(request_id=f"r{length}-{sorted(sampling)}", prompt_token_ids=tuple(prompt(length)), sampling=params)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_greedy_tokens_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    model = family.make(tmp_path)
    found = await generate(tmp_path, [request(length) for length in LENGTHS], max_num_batched_tokens=100)
    for length, tokens in zip(LENGTHS, found, strict=True):
        ids = torch.tensor([prompt(length)])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == whole[0, length:].tolist(), length


@pytest.mark.parametrize("budget", [1024, 2048, 4096], ids=["captured between attentions", "the largest captured", "called"])
async def test_large_steps_give_the_tokens_of_small_ones(budget: int, tmp_path: Path) -> None:
    FAMILIES[0].make(tmp_path)
    requests = [request(length) for length in (*LENGTHS, 1100)]  # one step of the larger budget holds it whole, which no graph does
    small = await generate(tmp_path, requests, max_num_batched_tokens=64)
    assert await generate(tmp_path, requests, max_num_batched_tokens=budget) == small


async def test_sampled_and_penalised_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    FAMILIES[0].make(tmp_path)
    kinds = ({"temperature": 0.9, "seed": 7, "top_p": 0.9}, {"repetition_penalty": 1.3, "presence_penalty": 0.5}, {"logprobs": 3}, {})
    requests = [request(length, **kind) for length in (17, 100) for kind in kinds]
    on_gpu = await generate(tmp_path, requests)
    on_cpu = await generate(tmp_path, requests, device="cpu")
    assert on_gpu == on_cpu


@pytest.mark.parametrize("budget", [1024, 4096], ids=["captured between attentions", "called"])
async def test_prompt_logprobs_are_those_of_the_cpu_and_take_little_memory(budget: int, tmp_path: Path) -> None:
    Family("wide", "Llama", {"vocab_size": 100_000}).make(tmp_path)
    requests = [request(length, prompt_logprobs=1) for length in (17, 1900)]
    before = torch.cuda.memory_allocated()
    on_gpu = await outputs(tmp_path, requests, max_num_batched_tokens=budget)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 650e6  # model, KV and graphs among it; logits of 1900 rows alone: 760e6
    for ours, theirs in zip(on_gpu, await outputs(tmp_path, requests, device="cpu"), strict=True):
        (found,), (wanted,) = ([output.prompt_logprobs for output in each if output.prompt_logprobs] for each in (ours, theirs))
        assert len(found) == len(wanted)
        for one, other in zip(found[1:], wanted[1:], strict=True):
            assert one is not None
            assert other is not None
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert ids(ours) == ids(theirs)
