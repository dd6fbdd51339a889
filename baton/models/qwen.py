"""Qwen2 and 2.5 (biases on q, k, v) and Qwen3 (norms on q and k); both may use a sliding window in their upper layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.models.config import ModelConfig, common_fields


def config(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    fields = common_fields(raw, folder)
    architecture = raw["architectures"][0]
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        **fields,
        attention_bias=is_qwen2 or bias,
        output_bias=not is_qwen2 and bias,
        mlp_bias=False,
        qk_norm=not is_qwen2,
        sliding_windows=_windows(raw, fields["num_layers"]),
    )


def _windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types") or [
        "full_attention" if i < raw.get("max_window_layers", 28) else "sliding_attention" for i in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
