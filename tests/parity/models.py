"""Tiny random models of every family, made by transformers' own classes, and our engine pieces around them."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from baton.config import EngineConfig
from baton.forward import ForwardBatch
from baton.kernels.table import choose
from baton.kv.layout import KVLayout
from baton.kv.pool import KVPool
from baton.models.loader import load_model
from baton.models.registry import read_config

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # spreads the logits, so that greedy choices are no near ties
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    name: str
    config: str
    options: dict[str, Any]

    def make(self, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Any:
        """The transformers model, saved to `folder`."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.config}Config")(**{**COMMON, **self.options})
        model = getattr(transformers, f"{self.config}ForCausalLM")(config).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder, max_shard_size=shard)
        return model


FAMILIES = [
    Family("llama2", "Llama", {}),
    Family("llama-mha-tied", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Family("llama3.1", "Llama", {"rope_parameters": LLAMA3_ROPE}),
    Family("llama-linear-rope", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    Family("mistral", "Mistral", {"sliding_window": 50}),
    Family("mistral-full", "Mistral", {"sliding_window": None, "head_dim": 32}),
    Family("qwen2.5", "Qwen2", {"tie_word_embeddings": True}),
    Family("qwen2-window", "Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    Family("qwen3", "Qwen3", {"head_dim": 32}),
]


class Forward:
    """One sequence through our model, in whatever chunks."""

    def __init__(
        self, folder: Path, *, block_size: int = 16, dtype: torch.dtype = torch.float32, kernels: str = "auto", one_call: bool = True
    ) -> None:
        config = read_config(folder)
        self.model = load_model(folder, config, dtype=dtype, device=torch.device("cpu"))
        chosen = choose(torch.device("cpu"), dtype, config.head_dim, kernels)
        self.model.prepare(chosen if one_call else dataclasses.replace(chosen, decoder=None), 2048)
        name = "float32" if dtype is torch.float32 else "bfloat16"
        layout = KVLayout(
            num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, block_size=block_size, dtype=name
        )
        self.block_size = block_size
        self.pool = KVPool(layout, 2048 // block_size, torch.device("cpu"))
        self.blocks = torch.randperm(self.pool.num_blocks, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int, end: int, rows: list[int] | None = None) -> torch.Tensor:
        """Of the positions start … end - 1, or of some rows of them; those before were given in earlier calls."""
        positions = torch.arange(start, end)
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids[start:end]),
            positions=positions,
            slots=self.blocks[positions // self.block_size] * self.block_size + positions % self.block_size,
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=self.blocks[None, : -(-end // self.block_size)].int(),
            logits_rows=None if rows is None else torch.tensor(rows, dtype=torch.int64),
            logits_owners=None if rows is None else torch.zeros(len(rows), dtype=torch.int64),
            max_query_len=end - start,
            max_context_len=end,
            lengths=((end - start, end),),
            kv=self.pool.tensor,
        )
        return self.model(batch).float()


def engine_settings(**changes: Any) -> EngineConfig:
    return EngineConfig.model_validate({"device": "cpu", "num_blocks": 400, "num_threads": 1, **changes})
