"""What the scheduler decided for one step, and what the step gave. The only words between deciding and computing."""

from dataclasses import dataclass, field

from baton.scheduling.request import Request
from baton.types import OutputToken, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledRequest:
    """`num_new_tokens` known tokens of `request`, from position `start` on, get computed in this step. Their blocks are allocated:
    request.block_ids reaches at least to start + num_new_tokens."""

    request: Request
    start: int
    num_new_tokens: int
    samples: bool  # this step computes the last known token, whose logits give the next one
    block_ids: list[int]  # the request's own list: it grows with it, and is another one after a preemption

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    scheduled: tuple[ScheduledRequest, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)

    @property
    def needs_history(self) -> bool:
        return any(item.samples and item.request.needs_history for item in self.scheduled)

    def work(self) -> tuple[int, int, int, int]:
        """What takes a step's time: prompts' tokens, and the pairs of tokens that attend to each other; rows that decode, and the tokens of
        their contexts."""
        tokens = pairs = rows = context = 0
        for item in self.scheduled:
            count = item.num_new_tokens
            if count > 1:
                tokens += count
                pairs += count * (item.start + count // 2)
            else:
                rows += 1
                context += item.start
        return tokens, pairs, rows, context


@dataclass(frozen=True, slots=True)
class StepResult:
    """By request id. `tokens` has an entry for each scheduled request that samples; `prompt_logprobs` for each that asked, holding
    the logprobs of prompt tokens start + 1 … start + num_new_tokens (those that are prompt tokens)."""

    tokens: dict[str, OutputToken] = field(default_factory=dict[str, OutputToken])
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict[str, list[TokenLogprobs]])
