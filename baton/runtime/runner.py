"""ModelRunner: computes one step on one device.

What belongs here: a plan's tensors, the forward pass, the draw. What never will: requests' life, block bookkeeping, queues, clocks, KV
transfer. It keeps nothing of a request between steps, so any plan can be executed by any runner whose KV blocks hold what it says.
"""

from collections.abc import Callable

import torch

from baton.forward import ForwardBatch
from baton.kv.pool import KVPool
from baton.layers.attention import AttentionBackend
from baton.models.decoder import Decoder
from baton.runtime import sampler
from baton.runtime.inputs import build_inputs, wanted_positions
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.types import OutputToken, TokenLogprobs


class ModelRunner:
    def __init__(self, model: Decoder, kv_pool: KVPool, backend: AttentionBackend) -> None:
        self._model, self._kv, self._backend = model, kv_pool.tensor, backend

    @property
    def depth(self) -> int:
        return 0

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Computes the plan's tokens: their KV is written, and tokens are drawn for the requests that sample."""
        result = self._execute(plan)
        return lambda: result

    @torch.inference_mode()
    def _execute(self, plan: StepPlan) -> StepResult:
        batch: ForwardBatch = build_inputs(plan, self._kv)
        logits = self._model(batch, self._backend)
        counts = [len(wanted_positions(item)) for item in plan.scheduled]
        parts = dict(zip(plan.scheduled, logits.split(counts), strict=True))
        result = StepResult(self._sample(parts), self._score_prompts(parts))
        if self._kv.is_cuda:  # who reads the blocks next does not wait for this stream
            torch.cuda.current_stream().synchronize()
        return result

    def _sample(self, parts: dict[ScheduledRequest, torch.Tensor]) -> dict[str, OutputToken]:
        items = [item for item in parts if item.samples]
        if not items:
            return {}
        rows = [
            sampler.Row(
                params=item.request.sampling,
                token_ids=item.request.token_ids,
                num_prompt_tokens=item.request.num_prompt_tokens,
                eos_token_ids=item.request.eos_token_ids,
            )
            for item in items
        ]
        tokens = sampler.sample(torch.stack([parts[item][-1] for item in items]), rows)
        return {item.request.request_id: token for item, token in zip(items, tokens, strict=True)}

    def _score_prompts(self, parts: dict[ScheduledRequest, torch.Tensor]) -> dict[str, list[TokenLogprobs]]:
        scores: dict[str, list[TokenLogprobs]] = {}
        for item, logits in parts.items():
            count, rows = item.request.sampling.prompt_logprobs, len(logits) - item.samples
            if count is not None and rows:
                targets = item.request.token_ids[item.start + 1 : item.start + 1 + rows]
                scores[item.request.request_id] = sampler.logprobs(logits[:rows], targets, [count] * rows)
        return scores
