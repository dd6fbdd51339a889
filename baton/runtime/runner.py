"""ModelRunner: computes steps on one device.

What belongs here: a plan's tensors, the forward pass, the draw. What never will: requests' life, block bookkeeping, queues, clocks, KV
transfer. Of a request it keeps its block table and what its tokens are drawn by, so as not to make them anew each step, and the row of the
last step that draws its next token; so any plan can be computed by any runner whose KV blocks hold what it says, if none of its tokens is
pending.

Where ranks share the model, rank 0's runner has the plans and draws; `team` tells the others what to `compute`, and theirs do that alone.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

import numpy as np
import torch

from baton.forward import ForwardBatch
from baton.kernels.table import Kernels
from baton.kv.pool import KVPool
from baton.models.decoder import Decoder, Look, unseen
from baton.runtime import sampler
from baton.runtime.crew import Team
from baton.runtime.flights import DeviceLost
from baton.runtime.graphs import DecodeGraphs, Graphs, NoGraphs
from baton.runtime.inputs import InputBuilder, scored_positions
from baton.runtime.piecewise import PiecewiseGraphs
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.scheduling.request import Request
from baton.types import TokenLogprobs


class PromptScores:
    """Logprobs of a step's prompt tokens, that are being computed."""

    def __init__(self, items: Sequence[ScheduledRequest]) -> None:
        self._positions = {item.request: positions for item in items if (positions := scored_positions(item))}
        self._token_ids = [request.token_ids[position + 1] for request, positions in self._positions.items() for position in positions]
        self._counts = [request.sampling.prompt_logprobs or 0 for request, positions in self._positions.items() for _ in positions]
        self._scores: list[sampler.Score] = []
        self._seen = 0

    def look(self, logits: torch.Tensor) -> None:
        """Of the next scored rows."""
        rows = slice(self._seen, self._seen + len(logits))
        self._seen = rows.stop
        self._scores.append(sampler.score(logits, self._token_ids[rows], self._counts[rows]))

    def result(self) -> dict[str, list[TokenLogprobs]]:
        """By request id. Waits for them."""
        found = chain.from_iterable(score() for score in self._scores)
        return {request.request_id: list(islice(found, len(positions))) for request, positions in self._positions.items()}


class ModelRunner:
    def __init__(
        self,
        model: Decoder,
        kv_pool: KVPool,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        graphs: bool,
        team: Team,
    ) -> None:
        """`graphs`: capture steps as CUDA graphs, now."""
        kv = kv_pool.tensor
        self._team, self._group, self._kernels = team, model.group, kernels
        self._inputs = InputBuilder(kv, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self._is_cuda = kv.is_cuda
        self._rows: dict[str, int] = {}  # of the last step's draw, by request id
        self._drawing: dict[Request, sampler.Row] = {}  # by what the last step drew for
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=kv.device)
        self._forward: Callable[[ForwardBatch, Look], torch.Tensor] = model
        self._graphs: Graphs = NoGraphs()
        if graphs:
            captured = DecodeGraphs(model, kernels, kv, self._drawn, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
            captured.capture()
            self._graphs = captured
            pieces = PiecewiseGraphs(model, kv, max_tokens=max_num_batched_tokens)
            pieces.capture()
            self._forward = pieces

    @property
    def depth(self) -> int:
        return 1 if self._is_cuda else 0

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Starts a step: its tokens' KV gets written, and tokens are drawn for the requests that sample."""
        try:
            return self._launch(plan)
        except Exception as error:
            self._settle(error)
            raise

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        arrays = self._inputs.arrays(plan, self._rows)
        items = [item for item in plan.scheduled if item.samples]
        graphed = self._graphs.fit(plan)
        if not graphed:
            arrays |= self._inputs.wanted(plan, arrays)
        scores = PromptScores(plan.scheduled if "scored_rows" in arrays else ())
        with self._team.step(arrays, graphed):
            logits, greedy = self.compute(arrays, graphed, scores.look)
        self._rows = {item.request.request_id: row for row, item in enumerate(items)} if self._is_cuda else {}
        if not items:
            return self._ended(scores)
        if all(sampler.is_plain(item.request.sampling) for item in items):
            self._drawing = {}
            draw = sampler.plain(logits, self._kernels.argmax, greedy)
        else:
            self._drawing = {item.request: self._drawing.get(item.request) or _row(item.request) for item in items}
            draw = sampler.launch(logits, list(self._drawing.values()), self._kernels.argmax, greedy)
        if draw.ids is not greedy:
            self._drawn[: len(items)].copy_(draw.ids)

        def result() -> StepResult:
            tokens = {item.request.request_id: token for item, token in zip(items, draw.tokens(), strict=True)}
            return StepResult(tokens, scores.result())

        return self._settling(result)

    def _settling(self, result: Callable[[], StepResult]) -> Callable[[], StepResult]:
        def settling() -> StepResult:
            try:
                return result()
            except Exception as error:
                self._settle(error)
                raise

        return settling

    def _settle(self, error: Exception) -> None:
        """What was launched before it has ended: it writes into blocks that are others' soon. Raises DeviceLost."""
        if self._is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as lost:  # no CUDA call of this process succeeds after that
                raise DeviceLost(str(lost)) from error

    @torch.inference_mode()
    def compute(self, arrays: Mapping[str, np.ndarray], graphed: bool, look: Look = unseen) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step's forward pass: the logits wanted [R, vocab_size], and their argmax where it costs nothing more (`graphed`). Those to be
        scored are gone when `look` has seen them: of a long prompt they would take gigabytes."""
        if graphed:
            return self._graphs.run(arrays)
        batch = self._inputs.batch(arrays)
        if self._is_cuda and (arrays["token_ids"] < 0).any():
            self._group.broadcast(self._drawn)
            self._kernels.resolve(batch.token_ids, self._drawn)
        return self._forward(batch, look), None

    def _ended(self, scores: PromptScores) -> Callable[[], StepResult]:
        """Of a step that draws nothing: its blocks may be read once it has ended all the same."""
        ended = torch.cuda.Event() if self._is_cuda else None
        if ended is not None:
            ended.record()

        def result() -> StepResult:
            if ended is not None:
                ended.synchronize()
            return StepResult({}, scores.result())

        return self._settling(result)


def _row(request: Request) -> sampler.Row:
    return sampler.Row(
        params=request.sampling,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        eos_token_ids=request.eos_token_ids,
    )
