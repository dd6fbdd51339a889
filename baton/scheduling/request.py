"""Request: one sequence inside an engine. Only the engine's thread touches it, but for `ends_with`.

There is no prefill phase and no decode phase: a request has known tokens (prompt, then output) and computed ones, and each step lets
the computed catch up with the known. When all known tokens are computed, the last one's logits give the next token.

The next step may be decided before a step has ended: then the token that it draws is known to exist, but not its id (PENDING).
"""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from baton.hashing import block_hashes
from baton.types import CacheReport, FinishReason, GenerateRequest, SamplingParams

PENDING = -1


class RequestStatus(StrEnum):
    LOADING = "loading"  # its KV is coming from the pool; the scheduler has not seen it yet
    WAITING = "waiting"  # queued; holds no blocks
    FETCHING = "fetching"  # holds blocks; they are filled from tiers
    RUNNING = "running"  # holds blocks
    ENDING = "ending"  # holds blocks; its last token is being drawn
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
    num_preemptions: int = 0  # how often its blocks were taken from it
    words: "array[int]" = field(default_factory=lambda: array("I"))  # the token ids known at first, as 32-bit words: quick to copy

    @classmethod
    def create(
        cls, request: GenerateRequest, *, eos_token_ids: frozenset[int], max_model_len: int, block_size: int, arrival: float
    ) -> "Request":
        """Raises nothing: the engine checks lengths and ids before."""
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        words = array("I", token_ids)
        return cls(
            request_id=request.request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            salt=request.salt,
            arrival=arrival,
            block_hashes=block_hashes(words, block_size, request.salt),
            words=words,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_full(self) -> bool:
        """It may have no more tokens than it has."""
        return self.num_output_tokens >= self.sampling.max_tokens or self.num_tokens >= self.max_model_len

    @property
    def needs_history(self) -> bool:
        """Its next token can't be drawn before the ids of all known ones are there."""
        sampling = self.sampling
        return sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)

    def append(self, token_id: int) -> None:
        """Takes the next token of the output, drawn by a prefill worker, and decides whether it is the last."""
        self.token_ids.append(PENDING)
        self.resolve(len(self.token_ids) - 1, token_id)

    def resolve(self, position: int, token_id: int) -> None:
        """Takes the id of a pending token, and decides whether it is the last; those behind it are dropped then."""
        self.token_ids[position] = token_id
        reason = self.ends_with(position, token_id)
        if reason is None:
            return
        self.finish_reason = reason
        if reason is FinishReason.STOP:
            self.stop_token_id = token_id
            del self.token_ids[position + 1 :]

    def ends_with(self, position: int, token_id: int) -> FinishReason | None:
        """Why an output token at this position would be the last, if it would. For any thread: what it reads never changes."""
        num_output = position + 1 - self.num_prompt_tokens
        if num_output >= self.sampling.min_tokens and (
            token_id in self.sampling.stop_token_ids or (token_id in self.eos_token_ids and not self.sampling.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= self.sampling.max_tokens or position + 1 >= self.max_model_len else None
