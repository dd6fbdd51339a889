"""What a request must satisfy before an engine takes it. Pure: raises InvalidRequest, whose message tells the caller what to change."""

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from baton.errors import InvalidRequest, PromptTooLong
from baton.types import GenerateRequest, SamplingParams

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS = 1024, 128  # entries; as in vLLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    vocab_size: int
    max_model_len: int  # tokens, prompt and output; what the model allows and the KV cache can hold
    max_queued: int = 4096  # requests inside the engine


def validate(request: GenerateRequest, limits: Limits, live: Collection[str]) -> None:
    """`live` are the ids of the requests that the engine has now."""
    if request.request_id in live:
        raise InvalidRequest(f"request id {request.request_id!r} is in use; give each request its own", param="request_id")
    prompt, output = request.prompt_token_ids, request.output_token_ids
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    if not (_within(prompt, limits.vocab_size) and _within(output, limits.vocab_size)):
        token_id = next(token_id for token_id in (*prompt, *output) if not 0 <= token_id < limits.vocab_size)
        raise InvalidRequest(f"token id {token_id} is outside the model's vocabulary (0 to {limits.vocab_size - 1})", param="prompt")
    if len(prompt) + len(output) >= limits.max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(prompt) + len(output)} tokens; this model takes at most {limits.max_model_len} tokens, prompt and "
            "output together: shorten the prompt",
            param="prompt",
        )
    _validate_sampling(request.sampling, limits, len(output))


def _within(token_ids: Sequence[int], size: int) -> bool:
    """Whether all are from 0 to size - 1. By words: a long prompt has its first kernel to wait for."""
    try:
        words = array("I", token_ids)
    except OverflowError:
        return False
    return not words or int(np.frombuffer(words, np.uint32).max()) < size


def _validate_sampling(sampling: SamplingParams, limits: Limits, num_output: int) -> None:
    def check(good: bool, name: str, rule: str) -> None:
        if not good:
            raise InvalidRequest(f"{name} must be {rule}, not {getattr(sampling, name)}", param=name)

    check(sampling.max_tokens > num_output, "max_tokens", f"more than {num_output}")
    check(0 <= sampling.seed < 2**63, "seed", "from 0 to 2**63 - 1")
    check(0 <= sampling.temperature < float("inf"), "temperature", "0 or more")
    check(sampling.top_k >= 0, "top_k", "0 (off) or more")
    check(0 < sampling.top_p <= 1, "top_p", "above 0 and at most 1")
    check(0 <= sampling.min_p <= 1, "min_p", "from 0 to 1")
    check(0 < sampling.repetition_penalty < float("inf"), "repetition_penalty", "above 0")
    check(-2 <= sampling.presence_penalty <= 2, "presence_penalty", "from -2 to 2")
    check(-2 <= sampling.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2")
    check(0 <= sampling.min_tokens <= sampling.max_tokens, "min_tokens", "from 0 to max_tokens")
    check(sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_LOGPROBS, "logprobs", f"from 0 to {MAX_LOGPROBS}")
    check(sampling.prompt_logprobs is None or 0 <= sampling.prompt_logprobs <= MAX_LOGPROBS, "prompt_logprobs", f"from 0 to {MAX_LOGPROBS}")
    for name, most in (("logit_bias", MAX_LOGIT_BIAS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
        count = len(getattr(sampling, name))
        if count > most:
            raise InvalidRequest(f"{name} has {count} entries; at most {most} are taken: send fewer", param=name)
    known = range(limits.vocab_size)
    check(all(token_id in known for token_id in sampling.logit_bias), "logit_bias", f"about token ids below {limits.vocab_size}")
    check(all(token_id in known for token_id in sampling.stop_token_ids), "stop_token_ids", f"token ids below {limits.vocab_size}")
