"""Prompt logprobs are transformers', and take the memory of 256 rows of logits, however long the prompts are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.runtime.loaded import load
from baton.scheduling.plan import ScheduledRequest, StepPlan
from baton.scheduling.request import Request
from baton.types import GenerateRequest, SamplingParams
from tests.parity.models import FAMILIES, Family, engine_settings

VOCAB = 321  # like no other size
FAMILY = Family("wide", FAMILIES[0].config, {"vocab_size": VOCAB})


class Rows(TorchDispatchMode):
    """The most rows of logits, or of what is made of them, in one tensor."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,):
                self.most = max(self.most, tensor.numel() // VOCAB)
        return made


def scheduled(count: int, length: int, first_block: int, prompt_logprobs: int | None) -> ScheduledRequest:
    """`count` tokens of a prompt that is `length` long."""
    token_ids = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    wanted = GenerateRequest(
        request_id=f"r{length}", prompt_token_ids=tuple(token_ids),
        sampling=SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=prompt_logprobs),
    )  # fmt: skip
    request = Request.create(wanted, eos_token_ids=frozenset(), max_model_len=2048, block_size=16, arrival=0.0)
    request.block_ids = [*range(first_block, first_block - (-length // 16))]
    return ScheduledRequest(request, 0, count, samples=count == length, block_ids=request.block_ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_long_prompts(dtype: str, tmp_path: Path) -> None:
    model = FAMILY.make(tmp_path)
    loaded = load(tmp_path, engine_settings(dtype=dtype, max_num_batched_tokens=2048))
    items = (scheduled(700, 700, 0, 2), scheduled(40, 40, 50, None), scheduled(300, 500, 60, 0), scheduled(1, 1, 100, 1))
    with Rows() as rows:
        result = loaded.runner.submit(StepPlan(items))()
    assert 0 < rows.most <= 256
    assert {name: len(found) for name, found in result.prompt_logprobs.items()} == {"r700": 699, "r500": 300}
    assert result.tokens.keys() == {"r700", "r40", "r1"}
    for item in items:
        token_ids = item.request.token_ids[: item.end + 1]
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits[0]
        expected = logits.log_softmax(-1)
        for position, found in enumerate(result.prompt_logprobs.get(item.request.request_id, ())):
            assert len(found.top) == item.request.sampling.prompt_logprobs
            wanted = float(expected[position, token_ids[position + 1]])
            assert found.logprob == pytest.approx(wanted, abs=1e-4 if dtype == "float32" else 0.5)
        if item.samples and dtype == "float32":
            assert result.tokens[item.request.request_id].token_id == int(logits[-1].argmax())
