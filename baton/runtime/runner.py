"""ModelRunner: computes steps on one device.

What belongs here: a plan's tensors, the forward pass, the draw. What never will: requests' life, block bookkeeping, queues, clocks, KV
transfer. Of a request it keeps its block table, so as not to write it anew each step, and the row of the last step that draws its next
token; so any plan can be computed by any runner whose KV blocks hold what it says, if none of its tokens is pending.
"""

from collections.abc import Callable

import torch

from baton.kernels.table import Kernels
from baton.kv.pool import KVPool
from baton.models.decoder import Decoder
from baton.runtime import sampler
from baton.runtime.inputs import InputBuilder, wanted_positions
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.types import TokenLogprobs

Scores = dict[str, Callable[[], list[TokenLogprobs]]]


class ModelRunner:
    def __init__(self, model: Decoder, kv_pool: KVPool, kernels: Kernels, *, max_num_seqs: int, max_model_len: int) -> None:
        self._model, self._kernels = model, kernels
        self._inputs = InputBuilder(kv_pool.tensor, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self._is_cuda = kv_pool.tensor.is_cuda
        self._drawn: dict[str, int] = {}  # rows of the last step's draw, by request id
        self._drawn_ids = torch.zeros(1, dtype=torch.int64, device=kv_pool.tensor.device)

    @property
    def depth(self) -> int:
        return 1 if self._is_cuda else 0

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Starts a step: its tokens' KV gets written, and tokens are drawn for the requests that sample."""
        batch = self._inputs.batch(plan, self._inputs.arrays(plan, self._drawn if self._is_cuda else {}))
        if self._drawn and self._is_cuda:
            ids = batch.token_ids
            ids.copy_(torch.where(ids < 0, self._drawn_ids[(-1 - ids).clamp_(min=0)], ids))
        logits = self._model(batch)
        counts = [len(wanted_positions(item)) for item in plan.scheduled]
        parts = dict(zip(plan.scheduled, logits.split(counts), strict=True))
        scores = _score_prompts(parts)
        items = [item for item in parts if item.samples]
        self._drawn = {item.request.request_id: row for row, item in enumerate(items)}
        if not items:
            return self._ended(scores)
        last = logits if len(items) == len(logits) else torch.stack([parts[item][-1] for item in items])
        draw = sampler.launch(last, [_row(item) for item in items], self._kernels.argmax)
        self._drawn_ids = draw.ids

        def result() -> StepResult:
            tokens = {item.request.request_id: token for item, token in zip(items, draw.tokens(), strict=True)}
            return StepResult(tokens, {name: score() for name, score in scores.items()})

        return result

    def _ended(self, scores: Scores) -> Callable[[], StepResult]:
        """Of a step that draws nothing: its blocks may be read once it has ended all the same."""
        ended = torch.cuda.Event() if self._is_cuda else None
        if ended is not None:
            ended.record()

        def result() -> StepResult:
            if ended is not None:
                ended.synchronize()
            return StepResult({}, {name: score() for name, score in scores.items()})

        return result


def _row(item: ScheduledRequest) -> sampler.Row:
    request = item.request
    return sampler.Row(
        params=request.sampling,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        eos_token_ids=request.eos_token_ids,
    )


def _score_prompts(parts: dict[ScheduledRequest, torch.Tensor]) -> Scores:
    scores: Scores = {}
    for item, logits in parts.items():
        count, rows = item.request.sampling.prompt_logprobs, len(logits) - item.samples
        if count is not None and rows:
            targets = item.request.token_ids[item.start + 1 : item.start + 1 + rows]
            scores[item.request.request_id] = sampler.score(logits[:rows].float(), targets, [count] * rows)
    return scores
