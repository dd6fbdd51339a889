"""Our models against transformers', on tiny random weights in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.models import FAMILIES, Family, Forward

LENGTHS = (1, 2, 15, 16, 17, 33, 130, 700)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family.name)
    return family.make(folder), folder


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def reference(model: Any, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def test_logits_equal_those_of_transformers(pair: tuple[Any, Path]) -> None:
    model, folder = pair
    for length in LENGTHS:
        prompt = tokens(length, seed=length)
        torch.testing.assert_close(Forward(folder).logits(prompt, 0, length), reference(model, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("borders", [(0, 1, 2, 3), (0, 16, 32), (0, 7, 64, 65, 66), (0, 100)])
def test_chunks_and_single_tokens_give_the_same_logits(pair: tuple[Any, Path], borders: tuple[int, ...]) -> None:
    model, folder = pair
    prompt = tokens(130)
    forward = Forward(folder, block_size=8)
    ends = (*borders[1:], 130)
    parts = [forward.logits(prompt, start, end) for start, end in zip(borders, ends, strict=True)]
    torch.testing.assert_close(torch.cat(parts), reference(model, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_one_call_has_the_bits_of_many_and_rows_those_of_all(pair: tuple[Any, Path], dtype: torch.dtype, kernels: str) -> None:
    prompt, chunks = tokens(130), ((0, 70, [69]), (70, 129, []), (129, 130, None))
    many = Forward(pair[1], dtype=dtype, kernels=kernels, one_call=False)
    whole = many.logits(prompt, 0, 130)
    for forward in (Forward(pair[1], dtype=dtype, kernels=kernels), many):
        if kernels == "auto":
            assert torch.equal(forward.logits(prompt, 0, 130), whole)
            found = [forward.logits(prompt, start, end, rows) for start, end, rows in chunks]
            assert torch.equal(torch.cat(found), whole[[69, 129]])
        assert forward.logits(prompt, 0, 130, []).shape == (0, 320)
        near = 1e-4 if dtype is torch.float32 else 0.2
        torch.testing.assert_close(forward.logits(prompt, 0, 130, [3, 129]), whole[[3, 129]], atol=near, rtol=0)


def test_bf16_logits_stay_close_to_fp32(tmp_path: Path) -> None:
    model = FAMILIES[0].make(tmp_path)
    prompt = tokens(100)
    exact, rounded = reference(model, prompt), Forward(tmp_path, dtype=torch.bfloat16).logits(prompt, 0, 100)
    theirs = model.to(torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    assert (rounded - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    FAMILIES[0].make(tmp_path / "one")
    FAMILIES[0].make(tmp_path / "many", shard="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    prompt = tokens(20)
    whole, sharded = Forward(tmp_path / "one").logits(prompt, 0, 20), Forward(tmp_path / "many").logits(prompt, 0, 20)
    assert torch.equal(whole, sharded)
