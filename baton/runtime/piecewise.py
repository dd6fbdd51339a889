"""PiecewiseGraphs: steps with prompts of few tokens, captured as CUDA graphs between their attentions.

    sizes 64, 128, … 512, 640, … 1024, 1280, … 2048 tokens; a step runs in the smallest that holds it, padded with rows that write nowhere,
    but from 1024 on only if they are few

    piece 0      embed, layer 0 up to its queries          ─▶ attention 0, called
    piece i      layer i - 1 from its attention on, layer i up to its queries          ─▶ attention i, called
    last layer   called: of the rows that are wanted alone, unless some are to be scored

A layer is some nine kernels, which a host takes longer to launch one by one than a GPU to compute for so few tokens; up to 2048 a slow host
still falls behind in the small ones around attention. Attention's grid follows from what is in the step, so it stays outside. Larger steps
keep a GPU busy by themselves.
"""

import logging
import time

import torch

from baton.forward import ForwardBatch
from baton.models.decoder import Decoder, Look, unseen
from baton.runtime.graphs import nothing_collected

logger = logging.getLogger(__name__)
_SIZES = (*range(64, 512, 64), *range(512, 1025, 128), *range(1280, 2049, 256))  # tokens
_FREELY, _FEW = 1024, 32  # up to so many tokens padding costs less than launches; beyond, up to one row in so many does


class PiecewiseGraphs:
    def __init__(self, model: Decoder, kv: torch.Tensor, *, max_tokens: int) -> None:
        """`max_tokens` of a step: nothing larger is captured."""
        config = model.config
        self._model = model
        self._sizes = [size for size in _SIZES if size < max_tokens] + [size for size in _SIZES if size >= max_tokens][:1]
        most = self._sizes[-1]
        self._inputs = torch.zeros(3, most, dtype=torch.int64, device=kv.device)  # token ids, positions, slots
        self._inputs[2] = -1
        self._q = torch.zeros(most, config.num_heads // model.group.size, config.head_dim, dtype=kv.dtype, device=kv.device)
        self._attended = torch.zeros_like(self._q)
        self._kv = kv
        self._graphs: dict[int, tuple[list[torch.cuda.CUDAGraph], torch.Tensor]] = {}  # pieces, and the residual stream that they share

    @nothing_collected()
    @torch.inference_mode()
    def capture(self) -> None:
        started, pool = time.monotonic(), torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            batch = self._batch(size)
            residual = self._piece(0, None, batch)  # compiles what is to be compiled
            for layer in range(1, self._model.config.num_layers):
                self._piece(layer, residual, batch)
            torch.cuda.synchronize()
            pieces, residual = list[torch.cuda.CUDAGraph](), None
            for layer in range(self._model.config.num_layers):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    residual = self._piece(layer, residual, batch)
                pieces.append(graph)
            assert residual is not None
            self._graphs[size] = (pieces, residual)
        logger.info(
            "captured steps of %s tokens with prompts, between attentions, in %.1f s",
            ", ".join(map(str, self._sizes)), time.monotonic() - started,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, look: Look = unseen) -> torch.Tensor:
        """As the model's: logits [R, vocab_size]."""
        count = len(batch.token_ids)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None or (size > _FREELY and (size - count) * _FEW > count):
            return self._model(batch, look)
        for row, values in zip(self._inputs, (batch.token_ids, batch.positions, batch.slots), strict=True):
            row[:count].copy_(values)
        self._inputs[2, count:size].fill_(-1)
        pieces, residual = self._graphs[size]
        for layer, piece in enumerate(pieces):
            if layer:
                self._model.attend(layer - 1, self._q[:count], batch, self._attended[:count])
            piece.replay()
        return self._model.last(self._q[:count], residual[:count], batch, look)

    def _piece(self, layer: int, residual: torch.Tensor | None, batch: ForwardBatch) -> torch.Tensor:
        size = len(batch.token_ids)
        if residual is None:
            residual = self._model.embed(batch)
        else:
            self._model.after(layer - 1, self._attended[:size], residual)
        self._model.before(layer, residual, batch, self._q[:size])
        return residual

    def _batch(self, size: int) -> ForwardBatch:
        """What the pieces read of a step; attention's part is not theirs."""
        token_ids, positions, slots = self._inputs[:, :size]
        nothing = torch.empty(0, dtype=torch.int32, device=self._kv.device)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_start=nothing,
            context_lens=nothing,
            block_tables=nothing,
            logits_rows=None,
            logits_owners=None,
            max_query_len=size,
            max_context_len=size,
            lengths=None,
            kv=self._kv,
        )
