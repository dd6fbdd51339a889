"""StepPlan → arrays → ForwardBatch: the tensors of one step. The arrays are all that a rank needs to compute its part."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch

from baton.forward import ForwardBatch
from baton.runtime.staging import all_to_device
from baton.scheduling.plan import ScheduledRequest, StepPlan
from baton.scheduling.request import PENDING


class BlockTables:
    """Block tables as rows of one array, kept between steps so that only new blocks are written."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        """`num_rows`: at least as many as a plan can have requests."""
        self._array = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._rows = OrderedDict[str, tuple[int, list[int], int]]()  # by request id: row, the list it mirrors, how much of it
        self._free = list(range(num_rows))

    def gather(self, plan: StepPlan) -> np.ndarray:
        """[S, most blocks] int32. What is beyond a request's own blocks is whatever was there: some block's id."""
        rows, most = np.empty(len(plan.scheduled), dtype=np.int64), 1
        for index, item in enumerate(plan.scheduled):
            rows[index] = self._update(item)
            most = max(most, len(item.block_ids))
        return self._array[rows, :most]

    def _update(self, item: ScheduledRequest) -> int:
        name, block_ids = item.request.request_id, item.block_ids
        row, mirrored, count = self._rows.get(name) or (-1, None, 0)
        if mirrored is block_ids and count == len(block_ids):
            self._rows.move_to_end(name)
            return row
        if row < 0:
            row = self._free.pop() if self._free else self._rows.popitem(last=False)[1][0]
        start = count if mirrored is block_ids else 0
        self._array[row, start : len(block_ids)] = block_ids[start:]
        self._rows[name] = (row, block_ids, len(block_ids))
        self._rows.move_to_end(name)
        return row


class InputBuilder:
    def __init__(self, kv: torch.Tensor, *, max_num_seqs: int, max_model_len: int) -> None:
        self._kv, self._size = kv, kv.shape[4]
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // self._size))

    def arrays(self, plan: StepPlan, drawn: Mapping[str, int]) -> dict[str, np.ndarray]:
        """What a ForwardBatch is made of, in its words, but for what is `wanted`. A pending token is given as -1 - drawn[request_id], the
        row of the step before that draws it."""
        items = plan.scheduled
        counts = np.fromiter((item.num_new_tokens for item in items), np.int64, len(items))
        starts = np.fromiter((item.start for item in items), np.int64, len(items))
        query_start = np.zeros(len(items) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        tables = self._tables.gather(plan)
        if len(items) == query_start[-1]:  # one token each
            token_ids = np.fromiter((item.request.token_ids[item.start] for item in items), np.int64, len(items))
            owners, positions = np.arange(len(items)), starts
        else:
            token_ids = np.concatenate([_tokens(item) for item in items])
            owners = np.repeat(np.arange(len(items)), counts)
            positions = np.arange(query_start[-1]) - query_start[owners] + starts[owners]
        if drawn:
            last = query_start[1:] - 1
            for index in np.flatnonzero(token_ids[last] == PENDING).tolist():
                if items[index].samples:
                    token_ids[last[index]] = -1 - drawn[items[index].request.request_id]
        return {
            "token_ids": token_ids,
            "positions": positions,
            "slots": tables[owners, positions // self._size].astype(np.int64) * self._size + positions % self._size,
            "query_start": query_start,
            "context_lens": (starts + counts).astype(np.int32),
            "block_tables": tables,
        }

    def wanted(self, plan: StepPlan, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`logits_rows`, `logits_owners` and `scored_rows`, where they are not None. Wanted: each sampling request's last row. Scored: all
        of the prompt where prompt logprobs are asked for. In the plan's order."""
        query_start = arrays["query_start"]
        owners = np.array([index for index, item in enumerate(plan.scheduled) if item.samples], np.int64)
        if len(owners) == len(arrays["token_ids"]):
            return {}
        found = {"logits_rows": query_start[1:].astype(np.int64)[owners] - 1, "logits_owners": owners}
        starts = zip(query_start.tolist(), plan.scheduled, strict=False)
        scored = [start + position - item.start for start, item in starts for position in scored_positions(item)]
        return {**found, "scored_rows": np.array(scored, np.int64)} if scored else found

    def batch(self, arrays: Mapping[str, np.ndarray]) -> ForwardBatch:
        """Of what `arrays` and `wanted` have given."""
        counts, ends = np.diff(arrays["query_start"]).tolist(), arrays["context_lens"].tolist()
        tensors = all_to_device(arrays, self._kv.device)
        return ForwardBatch(
            **{"logits_rows": None, "logits_owners": None, **tensors},
            max_query_len=max(counts),
            max_context_len=max(ends),
            lengths=tuple(zip(counts, ends, strict=True)),
            kv=self._kv,
        )


def _tokens(item: ScheduledRequest) -> np.ndarray:
    """int64."""
    request = item.request
    if item.end <= len(request.words):
        return np.frombuffer(request.words, np.uint32, item.num_new_tokens, 4 * item.start).astype(np.int64)
    return np.array(request.token_ids[item.start : item.end], np.int64)


def scored_positions(item: ScheduledRequest) -> range:
    """Those that predict a prompt token whose logprob is asked for."""
    request = item.request
    return range(item.start, item.start if request.sampling.prompt_logprobs is None else min(item.end, request.num_prompt_tokens - 1))
