"""ModelConfig: what a Hugging Face config.json says, in our words. A field here has at least two families that use it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baton.errors import BrokenCheckpoint, UnsupportedModel
from baton.layers.rotary import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    attention_bias: bool  # of q, k, v
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # per layer: a token sees itself and window - 1 before; None sees all
    dtype: Literal["float32", "bfloat16"]
    eos_token_ids: frozenset[int]


def read_json(path: Path) -> dict[str, Any]:
    """Raises BrokenCheckpoint."""
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise BrokenCheckpoint(f"cannot read {path}: {error.strerror}; --model must be a Hugging Face model folder") from error
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is not valid JSON ({error}); download the model again") from error
    if not isinstance(loaded, dict):
        raise BrokenCheckpoint(f"{path} holds no JSON object; download the model again")
    return loaded


def common_fields(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of ModelConfig that every family spells the same way."""
    heads = _need(config, "num_attention_heads", folder)
    hidden = _need(config, "hidden_size", folder)
    theta, scaling = _rope(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {
        "vocab_size": _need(config, "vocab_size", folder),
        "hidden_size": hidden,
        "intermediate_size": _need(config, "intermediate_size", folder),
        "num_layers": _need(config, "num_hidden_layers", folder),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "max_model_len": _need(config, "max_position_embeddings", folder),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": "float32" if dtype == "float32" else "bfloat16",
        "eos_token_ids": _eos(config, folder) & frozenset(range(_need(config, "vocab_size", folder))),
    }


def _need(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise BrokenCheckpoint(f"{folder / 'config.json'}: {key} must be a positive integer, not {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`."""
    spec = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(spec.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = spec.get("rope_type") or spec.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(spec["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(spec["factor"]),
            low_freq_factor=float(spec["low_freq_factor"]),
            high_freq_factor=float(spec["high_freq_factor"]),
            original_max_len=int(spec["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def _eos(config: Mapping[str, Any], folder: Path) -> frozenset[int]:
    """generation_config.json wins: that is where chat models name their end-of-turn ids. Some name ids that they can't produce."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = config.get("eos_token_id")
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
