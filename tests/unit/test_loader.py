"""Model folders that can't be served, and tokenizers: each problem says what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.config import EngineConfig
from baton.errors import BrokenCheckpoint, ConfigError, ModelError, UnsupportedModel
from baton.models.create import create_model
from baton.models.loader import load_model, weights_fingerprint
from baton.models.registry import read_config
from baton.runtime import loaded
from baton.tokenizer import Tokenizer


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> None:
    load_model(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_unknown_family(folder: Path) -> None:
    edit(folder, architectures=["GPT9ForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"GPT9ForCausalLM is not supported; supported: LlamaForCausalLM"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints"),
    ],
)
def test_what_is_not_supported_is_named(folder: Path, changes: dict[str, object], says: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UnsupportedModel, match=says):
        read_config(folder)


def test_an_end_that_the_model_cannot_say_is_none(folder: Path) -> None:
    """It would ban another request's token until that has its fewest."""
    edit(folder, eos_token_id=[1, 10**6, -1])
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert read_config(folder).eos_token_ids == {1}


@pytest.mark.parametrize("block_size", [24, 48])
def test_a_block_size_that_kernels_refuse_is_no_setting(folder: Path, block_size: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        loaded.load(folder, EngineConfig(block_size=block_size))


def test_weights_of_somebody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root nothing is closed
    with pytest.raises(BrokenCheckpoint, match=r"model.safetensors cannot be read by user \d+"):
        weights_fingerprint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, int(keep if keep > 1 else path.stat().st_size * keep))
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        load(folder)


def test_missing_unexpected_and_misshapen_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, says in [
        ({key: value for key, value in tensors.items() if key != name}, "tensors are missing: model.layers.1.self_attn.qkv_proj.weight"),
        ({**tensors, "model.layers.0.extra.weight": torch.zeros(1)}, "unexpected tensor model.layers.0.extra.weight"),
        ({**tensors, name: torch.zeros(3, 3)}, r"k_proj.weight has shape \[3, 3\]"),
    ]:
        save_file(change, path)
        with pytest.raises(BrokenCheckpoint, match=says):
            load(folder)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors missing"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match="not valid JSON"):
        read_config(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(folder)


def test_two_random_models_of_one_shape_have_different_fingerprints(tmp_path: Path) -> None:
    prints = set()
    for seed in (0, 1, 0):
        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        create_model(folder, "qwen3", seed=seed)
        load(folder)
        prints.add(weights_fingerprint(folder))
    assert len(prints) == 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_of_every_family_can_be_made(tmp_path: Path, family: str) -> None:
    create_model(tmp_path / "m", family)
    load(tmp_path / "m")
    with pytest.raises(ConfigError, match="holds a model already"):
        create_model(tmp_path / "m", family)


def test_the_tokenizer_is_that_of_transformers(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(demo_model), AutoTokenizer.from_pretrained(demo_model)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi  there\n"},
        {"role": "assistant", "content": "ü🚀"},
    ]
    for prompt in (True, False):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(messages, add_generation_prompt=prompt) == text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = ours.encode("Grüße aus 東京, twice  spaced")
    assert ids == theirs("Grüße aus 東京, twice  spaced")["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
