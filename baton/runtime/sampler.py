"""Sampler: logits → tokens.

Raw logits → penalties and bias → / temperature → min_p → top_k → top_p → draw. Draws are Gumbel-max (argmax of logits plus Gumbel noise is
a draw from their softmax; Gumbel 1954, Maddison et al. 2014) with noise from a counter-based generator: a hash of (seed, position, token
id). So a draw depends on nothing else: not on the batch, the worker, the process, or what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.types import OutputToken, SamplingParams, TokenLogprobs

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one row of logits is to be drawn by. The drawn token's position is len(token_ids)."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt, then output
    num_prompt_tokens: int
    eos_token_ids: frozenset[int]

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that would end the sequence before min_tokens are out."""
        if len(self.token_ids) - self.num_prompt_tokens >= self.params.min_tokens:
            return ()
        return (*self.params.stop_token_ids, *self.eos_token_ids)


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[OutputToken]:
    """One token for each row of logits [R, vocab_size] fp32, which are left as they are."""
    adjusted = logits.clone()
    for index, row in enumerate(rows):
        _penalise(adjusted[index], row)
    chosen = adjusted.argmax(-1)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(adjusted[drawn], [rows[index] for index in drawn])
    token_ids: list[int] = chosen.tolist()
    wanting = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanting:
        return [OutputToken(token_id) for token_id in token_ids]
    counts = [rows[index].params.logprobs or 0 for index in wanting]
    found = dict(zip(wanting, logprobs(logits[wanting], [token_ids[index] for index in wanting], counts), strict=True))
    return [OutputToken(token_id, found.get(index)) for index, token_id in enumerate(token_ids)]


def logprobs(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits [R, vocab_size], the logprob of its token and the `counts[r]` likeliest tokens with theirs."""
    values = logits.log_softmax(-1)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    own = values.gather(1, ids)
    ranks = (values > own).sum(-1) + 1
    top = values.topk(min(max(counts), logits.shape[-1]), dim=-1)
    columns = (own[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), counts)
    return [
        TokenLogprobs(value, rank, tuple(zip(indices[:count], tops[:count], strict=True)))
        for value, rank, indices, tops, count in zip(*columns, strict=True)
    ]


def _penalise(logits: torch.Tensor, row: Row) -> None:
    """In place on one row [vocab_size]; vLLM's semantics: repetition counts prompt and output, presence and frequency the output."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = row.token_ids[row.num_prompt_tokens :] if params.presence_penalty or params.frequency_penalty else ()
    if output:
        seen, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[seen] -= params.frequency_penalty * counts + params.presence_penalty
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    if banned := row.banned:
        logits[list(banned)] = -torch.inf


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Token ids [R]; logits are changed in place."""
    params = [row.params for row in rows]
    logits /= _column([p.temperature for p in params], logits)
    if any(p.min_p for p in params):
        threshold = logits.amax(-1, keepdim=True) + _column([p.min_p for p in params], logits).log()
        logits.masked_fill_(logits < threshold, -torch.inf)
    filtered = [index for index, p in enumerate(params) if 0 < p.top_k < logits.shape[-1] or p.top_p < 1]
    if filtered:
        logits[filtered] = _top(logits[filtered], [params[index] for index in filtered])
    keys = [_mix(row.params.seed * _GOLDEN + _mix(len(row.token_ids) + 1)) for row in rows]
    return (logits - exponential_noise(keys, logits.shape[-1], logits.device).log()).argmax(-1)


def _top(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keeps the top_k likeliest (and their equals), then of those the fewest that hold a probability of top_p."""
    size = logits.shape[-1]
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    last = _column([min(p.top_k or size, size) - 1 for p in params], logits).long()
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= _column([p.top_p for p in params], logits)
    outside[:, 0] = False
    outside &= (_column([p.top_p for p in params], logits) < 1).expand_as(outside)
    ordered = ordered.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)


def exponential_noise(keys: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """[len(keys), size] fp32, each entry exponentially distributed (mean 1), a function of (key, column) alone. -log of it is Gumbel.

    Bits are those of splitmix64 (Steele et al. 2014) at counter = column; a uniform in (0, 1) is made of 63 of them.
    """
    counter = torch.arange(1, size + 1, device=device) * _signed(_GOLDEN)
    bits = torch.tensor([_signed(key) for key in keys], device=device)[:, None] + counter
    bits = (bits ^ _shift(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift(bits, 27)) * _signed(_MIX2)
    bits = _shift(bits ^ _shift(bits, 31), 1)
    uniform = (bits.float() * 2.0**-63).clamp(2.0**-64, 1 - 2.0**-24)
    return -torch.log1p(-uniform)


def _mix(value: int) -> int:
    """splitmix64's finaliser, on Python integers."""
    value &= _MASK64
    value = (value ^ (value >> 30)) * _MIX1 & _MASK64
    value = (value ^ (value >> 27)) * _MIX2 & _MASK64
    return value ^ (value >> 31)


def _shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
