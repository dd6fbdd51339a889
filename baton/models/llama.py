"""Llama 2 and 3.x, and Mistral, which differs by its sliding window alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.models.config import ModelConfig, common_fields


def config(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    fields = common_fields(raw, folder)
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=raw["architectures"][0],
        **fields,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=False,
        sliding_windows=(raw.get("sliding_window"),) * fields["num_layers"],
    )
