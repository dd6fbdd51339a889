"""Makes a model folder with random weights: for tests and measurements, where weights can't be had or don't matter."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
from safetensors.torch import save_file

from baton.errors import ConfigError
from baton.models.decoder import Decoder
from baton.models.registry import read_config

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": False}),
    "qwen3": ("Qwen3ForCausalLM", {"use_sliding_window": False}),
}
_EOS, _BOS = 1, 0


def create_model(
    folder: Path,
    family: str,
    *,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_len: int = 2048,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    seed: int = 0,
) -> None:
    """Writes a Hugging Face folder. Weights are scaled so that logits spread by about 1.5 and greedy choices are no near ties.

    Raises ConfigError for what can't be.
    """
    if family not in _FAMILIES:
        raise ConfigError(f"there is no family {family!r}; there are {', '.join(_FAMILIES)}")
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ConfigError("hidden_size must be a multiple of num_heads, and num_heads of num_kv_heads")
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds a model already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _copy_tokenizer(tokenizer, folder) if tokenizer is not None else _make_tokenizer(folder)
    architecture, extra = _FAMILIES[family]
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": max_len,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        **extra,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": _BOS, "eos_token_id": _EOS}))
    save_file(
        _weights(folder, torch.float32 if dtype == "float32" else torch.bfloat16, seed), folder / "model.safetensors", {"format": "pt"}
    )


def _weights(folder: Path, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names: merged parameters are split again."""
    config = read_config(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    q, kv, up = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    splits = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), (q, kv, kv)), "gate_up_proj": (("gate_proj", "up_proj"), (up, up))}
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensor = torch.ones(shape, dtype=dtype)
        else:
            scale = 1.0 if name == "model.embed_tokens.weight" else 1.5 * shape[-1] ** -0.5
            tensor = (torch.randn(shape, generator=generator) * scale).to(dtype)
        module = name.split(".")[-2]
        if module not in splits:
            weights[name] = tensor
            continue
        names, rows = splits[module]
        for part, piece in zip(names, tensor.split(rows), strict=True):
            weights[name.replace(module, part)] = piece.contiguous()
    return weights


def _copy_tokenizer(source: Path, folder: Path) -> int:
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"{source} has no tokenizer.json to copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()


def _make_tokenizer(folder: Path) -> int:
    """A byte-level one without merges: every text is its UTF-8 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|bos|>", "<|eos|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": special[0], "eos_token": special[1], "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
        )
    )
    return len(vocab)
