"""Which families there are. One row each: architecture name → how its config.json reads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel
from baton.models import llama, qwen
from baton.models.config import ModelConfig, read_json

FAMILIES: dict[str, Callable[[Mapping[str, Any], Path], ModelConfig]] = {
    "LlamaForCausalLM": llama.config,
    "MistralForCausalLM": llama.config,
    "Qwen2ForCausalLM": qwen.config,
    "Qwen3ForCausalLM": qwen.config,
}


def read_config(folder: Path) -> ModelConfig:
    """Raises BrokenCheckpoint or UnsupportedModel."""
    raw = read_json(folder / "config.json")
    architectures = raw.get("architectures") or ["(none named)"]
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise UnsupportedModel(f"{folder}: architecture {architectures[0]} is not supported; supported: {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise UnsupportedModel(f"{folder}: quantized checkpoints are not supported yet; use the bf16 or fp32 version of this model")
    return family(raw, folder)
