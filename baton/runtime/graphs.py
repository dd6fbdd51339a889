"""DecodeGraphs: steps of one token for each request, captured as CUDA graphs, and the only owner of the memory that they read and write.

    sizes 1, 2, 4, 8, 16, 24, 32, 64, 128, … max_num_seqs, largest first, all in one memory pool; a step runs in the smallest that holds
    it, padded with rows that write nowhere and see nothing

A graph also takes pending tokens from the draw before it, and draws greedily; who draws otherwise starts from its logits. Of several ranks
each captures its own, with what they compute together.
"""

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from baton.forward import ForwardBatch
from baton.kernels.table import Kernels
from baton.models.decoder import Decoder
from baton.runtime.staging import to_device
from baton.scheduling.plan import StepPlan

logger = logging.getLogger(__name__)
_COLLECTOR = threading.Lock()  # the process has one
_WORDS = 7  # int32 words of input for each request: token id, position and slot are int64, the context's length is int32


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Around captures: a graph that the garbage collector finds meanwhile, of an engine that is gone, can't be taken apart ("operation not
    permitted when stream is capturing"), breaks the capture and gives up its memory. torch 2.11 does not collect before it captures."""
    with _COLLECTOR:
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


class Graphs(Protocol):
    def fit(self, plan: StepPlan) -> bool: ...

    def run(self, arrays: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]: ...


class NoGraphs:
    """Every step is computed by separate calls."""

    def fit(self, plan: StepPlan) -> bool:
        return False

    def run(self, arrays: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nothing fits")


class DecodeGraphs:
    def __init__(
        self, model: Decoder, kernels: Kernels, kv: torch.Tensor, drawn: torch.Tensor, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        """`drawn` [max_num_seqs] int64 is where each step's draw lies, by row: read and written by the graphs."""
        self._model, self._kernels, self._kv, self._drawn, self._max_model_len = model, kernels, kv, drawn, max_model_len
        device = kv.device
        self._inputs = torch.zeros(_WORDS * max_num_seqs, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_num_seqs, -(-max_model_len // kv.shape[4]), dtype=torch.int32, device=device)
        self._query_start = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._last_tables: np.ndarray | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # with its logits
        self._sizes = _sizes(max_num_seqs)

    @nothing_collected()
    @torch.inference_mode()
    def capture(self) -> None:
        started, pool = time.monotonic(), None
        for size in reversed(self._sizes):
            batch = self._batch(size)
            self._compute(size, batch)  # compiles what is to be compiled
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._compute(size, batch)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, logits)
        logger.info("captured decode steps of %s requests in %.1f s", ", ".join(map(str, self._sizes)), time.monotonic() - started)

    def fit(self, plan: StepPlan) -> bool:
        return plan.num_tokens == len(plan.scheduled) <= self._sizes[-1] and all(item.samples for item in plan.scheduled)

    def run(self, arrays: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, vocab_size] and greedy ids [S], both overwritten by the next run."""
        count, device = len(arrays["token_ids"]), self._kv.device
        size = next(size for size in self._sizes if size >= count)
        there = torch.zeros(_WORDS * size, dtype=torch.int32, pin_memory=True)
        token_ids, positions, slots, context_lens = (part.numpy() for part in _split(there, size))
        token_ids[:count], positions[:count], context_lens[:count] = arrays["token_ids"], arrays["positions"], arrays["context_lens"]
        slots[:count], slots[count:] = arrays["slots"], -1
        self._inputs[: _WORDS * size].copy_(there, non_blocking=True)
        tables = arrays["block_tables"]
        if self._last_tables is None or not np.array_equal(tables, self._last_tables):
            self._tables[:count, : tables.shape[1]].copy_(to_device(tables, device))
            self._last_tables = tables
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count], self._drawn[:count]

    def _batch(self, size: int) -> ForwardBatch:
        token_ids, positions, slots, context_lens = _split(self._inputs, size)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_start=self._query_start[: size + 1],
            context_lens=context_lens,
            block_tables=self._tables[:size],
            logits_rows=None,
            logits_owners=None,
            max_query_len=1,
            max_context_len=self._max_model_len,
            lengths=None,
            kv=self._kv,
        )

    def _compute(self, size: int, batch: ForwardBatch) -> torch.Tensor:
        self._model.group.broadcast(self._drawn)  # rank 0 may have drawn otherwise
        self._kernels.resolve(batch.token_ids, self._drawn)
        logits = self._model(batch)
        self._drawn[:size].copy_(self._kernels.argmax(logits))
        return logits


def _split(words: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions, slots and context lengths [size] of a step, in the words [at least 7 · size] that hold them."""
    token_ids, positions, slots = words[: 6 * size].view(torch.int64).view(3, size)
    return token_ids, positions, slots, words[6 * size : 7 * size]


def _sizes(most: int) -> list[int]:
    sizes = [1, 2, 4, 8, 16, 24, 32, *range(64, most + 64, 64)]  # from 64 on, what products with weights take best
    return [*(size for size in sizes if size < most), most]
