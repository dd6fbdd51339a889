"""Request: one sequence inside an engine. Only the engine's thread touches it.

There is no prefill phase and no decode phase: a request has known tokens (prompt, then output) and computed ones, and each step lets
the computed catch up with the known. When all known tokens are computed, the last one's logits give the next token.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from baton.hashing import block_hashes
from baton.types import CacheReport, FinishReason, GenerateRequest, SamplingParams


class RequestStatus(StrEnum):
    LOADING = "loading"  # its KV is coming from the pool; the scheduler has not seen it yet
    WAITING = "waiting"  # queued; holds no blocks
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    request_id: str
    token_ids: list[int]  # all known tokens: prompt, then output
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    max_model_len: int
    salt: str = ""
    arrival: float = 0.0  # time.monotonic()
    status: RequestStatus = RequestStatus.LOADING
    num_computed_tokens: int = 0  # leading tokens whose KV lies in this worker's blocks
    block_ids: list[int] = field(default_factory=list[int])
    block_hashes: list[bytes] = field(default_factory=list[bytes])  # of leading full blocks of token_ids
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cache: CacheReport | None = None  # set at the first admission
    num_preemptions: int = 0

    @classmethod
    def create(
        cls, request: GenerateRequest, *, eos_token_ids: frozenset[int], max_model_len: int, block_size: int, arrival: float
    ) -> "Request":
        """Raises nothing: the engine checks lengths and ids before."""
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        return cls(
            request_id=request.request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            salt=request.salt,
            arrival=arrival,
            block_hashes=block_hashes(token_ids, block_size, request.salt),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Takes the next token of the output, sampled here or by a prefill worker, and decides whether it is the last."""
        self.token_ids.append(token_id)
        stops = self.sampling.stop_token_ids
        if self.num_output_tokens >= self.sampling.min_tokens and (
            token_id in stops or (token_id in self.eos_token_ids and not self.sampling.ignore_eos)
        ):
            self.finish_reason, self.stop_token_id = FinishReason.STOP, token_id
        elif self.num_output_tokens >= self.sampling.max_tokens or self.num_tokens >= self.max_model_len:
            self.finish_reason = FinishReason.LENGTH
