"""The decoder stack that all supported families share. What differs is in ModelConfig; names are those of Hugging Face checkpoints, with
q, k, v and gate, up merged so that each is one product.

    tokens ─▶ embed ─▶ [ + attention(norm) ─▶ + mlp(norm) ] × num_layers ─▶ norm ─▶ lm_head ─▶ logits

The residual stream is one tensor, into which products are added in place. The ranks of a group have it whole, and share heads, the width
of the MLP, and the vocabulary.

Knows of no quantization, adapters, sampling or scheduling.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn

from baton.forward import ForwardBatch
from baton.kernels.table import Kernels, Operation
from baton.layers import rotary
from baton.layers.linear import Embedding, Linear, PartialLinear
from baton.layers.norm import RMSNorm
from baton.models.config import ModelConfig
from baton.parallel.group import ALONE, Group

SCORED_ROWS = 256  # whose logits exist at once
Look = Callable[[torch.Tensor], None]
"""Sees logits [SCORED_ROWS at most, vocab_size]."""


def unseen(logits: torch.Tensor) -> None:
    pass


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, group: Group) -> None:
        super().__init__()
        self.layer, self.window = layer, config.sliding_windows[layer]
        self.heads, self.dim, self.eps = config.num_heads // group.size, config.head_dim, config.norm_eps
        kv_heads = config.num_kv_heads // group.size
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * kv_heads) * self.dim, bias=config.attention_bias)
        self.o_proj = PartialLinear(self.heads * self.dim, config.hidden_size, bias=config.output_bias, group=group)
        self.q_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else None

    def queries(
        self, x: torch.Tensor, batch: ForwardBatch, cos_sin: torch.Tensor, kernels: Kernels, out: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, H] → rotated queries [T, Hq, D]; writes its KV."""
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        return kernels.rope_write(
            self.qkv_proj(x), cos_sin, batch.positions, batch.slots, batch.kv, self.layer, self.heads, q_weight, k_weight, self.eps, out
        )

    def attend(self, q: torch.Tensor, batch: ForwardBatch, kernels: Kernels, out: torch.Tensor | None) -> torch.Tensor:
        """Queries [T, Hq, D] → the same."""
        return kernels.paged_attention(
            q, batch.kv, self.layer, batch.block_tables, batch.query_start, batch.context_lens, batch.max_query_len,
            batch.max_context_len, self.window, out, lengths=batch.lengths,
        )  # fmt: skip


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        width = config.intermediate_size // group.size
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, bias=config.mlp_bias, gated=True)
        self.down_proj = PartialLinear(width, config.hidden_size, bias=config.mlp_bias, group=group)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Of x [T, H], into residual [T, H]."""
        self.down_proj.add_to(residual, self.gate_up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, group)


class Stack(nn.Module):
    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocabulary_share(config, group), config.hidden_size, group)
        self.layers = nn.ModuleList(Layer(config, i, group) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, group: Group = ALONE) -> None:
        """`group`: whose ranks share the model; this one builds its part."""
        super().__init__()
        self.config, self.group = config, group
        self.model = Stack(config, group)
        self.lm_head = Linear(config.hidden_size, vocabulary_share(config, group), bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def prepare(self, kernels: Kernels, num_positions: int) -> None:
        """After the weights: hands them to the kernels, and computes what follows from the configuration. Called once."""
        self._kernels = kernels
        for module in self.modules():
            if isinstance(module, Linear) and module is not self.lm_head:
                module.prepare(kernels)
        packed = self.model.embed_tokens.prepare(kernels)
        self.lm_head.prepare(kernels, packed if self.config.tie_embeddings else None)
        inverse = rotary.inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        self._cos_sin = rotary.cos_sin_table(num_positions, inverse.to(self.model.norm.weight.device))
        self._whole = None if kernels.decoder is None else self._in_one_call(kernels.decoder)

    def forward(self, batch: ForwardBatch, look: Look = unseen) -> torch.Tensor:
        """Logits [R, vocab_size] for the rows that the batch asks for; writes the new tokens' KV. `look` gets the logits of the rows to be
        scored, in their order."""
        if self._whole is not None and batch.scored_rows is None:
            return self._whole(
                batch.token_ids, batch.positions, batch.slots, self._cos_sin, batch.kv, batch.block_tables, batch.query_start,
                batch.context_lens, batch.logits_rows,
            )  # fmt: skip
        residual = self.embed(batch)
        for layer in range(self.config.num_layers - 1):
            q = self.before(layer, residual, batch)
            self.after(layer, self.attend(layer, q, batch), residual)
        return self.last(self.before(self.config.num_layers - 1, residual, batch), residual, batch, look)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """The residual stream [T, H]."""
        return self.model.embed_tokens(batch.token_ids)

    def before(self, layer: int, residual: torch.Tensor, batch: ForwardBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        """A layer up to its attention: queries [T, Hq, D], in `out` if that is given; the new tokens' KV is written."""
        layer_ = cast(Layer, self.model.layers[layer])
        x = self._norm(layer_.input_layernorm, residual)
        return layer_.self_attn.queries(x, batch, self._cos_sin, self._kernels, out)

    def attend(self, layer: int, q: torch.Tensor, batch: ForwardBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Its attention: queries [T, Hq, D] → the same."""
        return cast(Layer, self.model.layers[layer]).self_attn.attend(q, batch, self._kernels, out)

    def after(self, layer: int, attended: torch.Tensor, residual: torch.Tensor) -> None:
        """From its attention [T, Hq, D] on, into residual [T, H]."""
        layer_ = cast(Layer, self.model.layers[layer])
        layer_.self_attn.o_proj.add_to(residual, attended.flatten(1))
        layer_.mlp(self._norm(layer_.post_attention_layernorm, residual), residual)

    def last(self, q: torch.Tensor, residual: torch.Tensor, batch: ForwardBatch, look: Look) -> torch.Tensor:
        """From the last layer's queries [T, Hq, D] to the logits [R, vocab_size]. All KV is written: only the wanted rows go on, unless
        some are to be scored."""
        if batch.logits_owners is not None and batch.scored_rows is None:
            q, residual, batch = q[batch.logits_rows], residual[batch.logits_rows], batch.wanted()
            if not len(q):
                self.group.meet()  # rank 0 tells that the KV is written once this has ended
                return residual.new_empty(0, self.config.vocab_size)
        layer = self.config.num_layers - 1
        self.after(layer, self.attend(layer, q, batch), residual)
        if batch.scored_rows is not None:
            for rows in batch.scored_rows.split(SCORED_ROWS):
                look(self._logits(residual[rows]))
        return self._logits(residual if batch.logits_rows is None else residual[batch.logits_rows])

    def _logits(self, residual: torch.Tensor) -> torch.Tensor:
        """[R, H] → [R, vocab_size]."""
        if not len(residual):
            return residual.new_empty(0, self.config.vocab_size)
        logits = self.group.all_gather(self.lm_head(self._norm(self.model.norm, residual)))
        return logits if logits.shape[1] == self.config.vocab_size else logits[:, : self.config.vocab_size].contiguous()

    def _in_one_call(self, make: Operation) -> Operation:
        layers = [
            (
                layer.input_layernorm.weight, layer.self_attn.qkv_proj.packed, layer.self_attn.qkv_proj.bias,
                layer.self_attn.q_norm and layer.self_attn.q_norm.weight, layer.self_attn.k_norm and layer.self_attn.k_norm.weight,
                layer.self_attn.o_proj.packed, layer.self_attn.o_proj.bias, layer.post_attention_layernorm.weight,
                layer.mlp.gate_up_proj.packed, layer.mlp.gate_up_proj.bias, layer.mlp.down_proj.packed, layer.mlp.down_proj.bias,
                layer.self_attn.window or 0,
            )
            for layer in cast(Iterable[Layer], self.model.layers)
        ]  # fmt: skip
        config = self.config
        return make(
            self.model.embed_tokens.packed, self.model.norm.weight, self.lm_head.packed, layers,
            intermediate_size=config.intermediate_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, eps=config.norm_eps,
        )  # fmt: skip

    def _norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, norm.weight, norm.eps)


def vocabulary_share(config: ModelConfig, group: Group) -> int:
    """Rows that each rank has of the embedding and of the head; the last ones of the last rank may be nobody's."""
    return -(-config.vocab_size // group.size)
