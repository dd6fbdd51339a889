"""The decoder stack that all supported families share. What differs is in ModelConfig; names are those of Hugging Face checkpoints, with
q, k, v and gate, up merged so that each is one product.

    tokens ─▶ embed ─▶ [ + attention(norm) ─▶ + mlp(norm) ] × num_layers ─▶ norm ─▶ lm_head ─▶ logits

Knows of no quantization, adapters, sampling or scheduling.
"""

import torch
from torch import nn
from torch.nn import functional

from baton.forward import ForwardBatch
from baton.layers import rotary
from baton.layers.attention import AttentionBackend
from baton.layers.norm import RMSNorm
from baton.models.config import ModelConfig


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.sliding_windows[layer]
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotary.rotate(self.q_norm(q), cos, sin), rotary.rotate(self.k_norm(k), cos, sin)
        return self.o_proj(backend.attend(self.layer, q, k, v, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, backend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.inverse_frequencies = torch.empty(0)

    def finish_loading(self) -> None:
        """After the weights: what is computed from the configuration, on the weights' device."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        frequencies = rotary.inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        self.inverse_frequencies = frequencies.to(self.lm_head.weight.device)

    def forward(self, batch: ForwardBatch, backend: AttentionBackend) -> torch.Tensor:
        """Logits [R, vocab_size] fp32 for the rows that the batch asks for; writes the new tokens' KV."""
        backend.begin(batch)
        x = self.model.embed_tokens(batch.token_ids)
        cos, sin = rotary.cos_sin(batch.positions, self.inverse_frequencies, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, backend)
        return self.lm_head(self.model.norm(x[batch.logits_rows])).float()
