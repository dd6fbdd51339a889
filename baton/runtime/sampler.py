"""Sampler: logits → tokens.

Raw logits → bias and bans → penalties → / temperature → min_p → top_k → top_p → draw, the order of vLLM v1. Draws are Gumbel-max (argmax of
logits plus Gumbel noise is a draw from their softmax; Gumbel 1954, Maddison et al. 2014) with noise from a counter-based generator: a hash
of (seed, position, token id). So a draw depends on nothing else: not on the batch, the worker, the process, or what was drawn before.

Each stage works on the rows that asked for it, all of them at once, and costs nothing when there is none.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from baton.kernels import torch_ops
from baton.runtime.staging import listed, to_device, to_host
from baton.types import OutputToken, SamplingParams, TokenLogprobs

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK64 = 2**64 - 1
_GREEDY = 1e-5  # temperatures below it are greedy: dividing by them would overflow fp32


class Tally:
    """The distinct ids of a sequence and how often each occurs. It may grow between two readings: what was counted is not counted again."""

    def __init__(self, token_ids: Sequence[int], start: int) -> None:
        """Of token_ids[start:]."""
        self._token_ids, self._end = token_ids, start
        self._places: dict[int, int] = {}  # by id
        self._ids, self._counts = array("q"), array("q")

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counts, [D] int64, in the order in which the ids came. Views, to be dropped before the next reading: arrays can't grow
        under them."""
        for token_id in self._token_ids[self._end :]:
            place = self._places.setdefault(token_id, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token_id)
                self._counts.append(0)
            self._counts[place] += 1
        self._end = len(self._token_ids)
        return np.frombuffer(self._ids, np.int64), np.frombuffer(self._counts, np.int64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one row of logits is to be drawn by. The drawn token's position is len(token_ids). A row that is kept while its sequence grows
    computes what is new alone."""

    params: SamplingParams
    token_ids: Sequence[int]  # prompt, then output
    num_prompt_tokens: int
    eos_token_ids: frozenset[int]

    @cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [B] int64, and what is added to their logits [B] fp32."""
        biases = self.params.logit_bias
        return np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)

    @cached_property
    def known(self) -> Tally:
        return Tally(self.token_ids, 0)

    @cached_property
    def output(self) -> Tally:
        return Tally(self.token_ids, self.num_prompt_tokens)

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that would end the sequence before min_tokens are out."""
        if len(self.token_ids) - self.num_prompt_tokens >= self.params.min_tokens:
            return ()
        return (*self.params.stop_token_ids, *self.eos_token_ids)


class Draw:
    """Tokens that are being drawn."""

    def __init__(self, ids: torch.Tensor, logprobs: dict[int, "Score"]) -> None:
        self.ids = ids
        """[R] int64, on the logits' device."""
        self._ids, self._logprobs = to_host(ids), logprobs

    def tokens(self) -> list[OutputToken]:
        """Waits for them."""
        token_ids: list[int] = self._ids()[0].tolist()
        found = {index: score()[0] for index, score in self._logprobs.items()}
        return [OutputToken(token_id, found.get(index)) for index, token_id in enumerate(token_ids)]


Score = Callable[[], list[TokenLogprobs]]
"""Waits for logprobs that are being computed."""


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[OutputToken]:
    """One token for each row of logits [R, vocab_size], which stay as they are. Greedy takes the lowest of equal ids."""
    return launch(logits, rows).tokens()


def is_plain(params: SamplingParams) -> bool:
    """The greatest logit, and nothing else is wanted."""
    return (
        params.temperature < _GREEDY
        and params.logprobs is None
        and params.repetition_penalty == 1
        and not (params.presence_penalty or params.frequency_penalty or params.logit_bias or params.min_tokens)
    )


def plain(logits: torch.Tensor, argmax: Callable[[torch.Tensor], torch.Tensor], greedy: torch.Tensor | None) -> Draw:
    """As `launch`, of rows that are all plain."""
    return Draw(argmax(logits) if greedy is None else greedy, {})


def launch(
    logits: torch.Tensor,
    rows: Sequence[Row],
    argmax: Callable[[torch.Tensor], torch.Tensor] = torch_ops.argmax,
    greedy: torch.Tensor | None = None,
) -> Draw:
    """Starts to draw. Plain greedy rows are taken from logits of any dtype as they are; all else is computed in fp32. `greedy` [R]: the
    logits' argmax, where it is known; drawn tokens are written over it."""
    if all(is_plain(row.params) for row in rows):
        return plain(logits, argmax, greedy)
    adjusted = _penalise(_bias(logits, rows), rows)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature >= _GREEDY]
    if len(drawn) == len(rows):
        chosen = _draw(adjusted.float() if adjusted.dtype is not torch.float32 else adjusted.clone(), rows)
    else:
        chosen = argmax(adjusted) if greedy is None or adjusted is not logits else greedy
        if drawn:
            places = listed(drawn, torch.int64, logits.device)
            chosen[places] = _draw(adjusted[places].float(), [rows[index] for index in drawn])
    counts = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    return Draw(chosen, {index: _score(logits[index : index + 1].float(), chosen[index : index + 1], [n]) for index, n in counts.items()})


def logprobs(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits [R, vocab_size], the logprob of its token and the `counts[r]` likeliest tokens with theirs, in fp32."""
    return score(logits, token_ids, counts)()


def score(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> Score:
    """Starts to compute what `logprobs` gives."""
    return _score(logits.float(), listed(token_ids, torch.int64, logits.device), counts)


def _score(logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]) -> Score:
    values = logits.log_softmax(-1)
    own = values.gather(1, token_ids[:, None])
    ranks = (values > own).sum(-1) + 1
    top = values.topk(min(max(counts), logits.shape[-1]), dim=-1)
    wait = to_host(own[:, 0], ranks, top.indices, top.values)

    def result() -> list[TokenLogprobs]:
        columns = (*(column.tolist() for column in wait()), counts)
        return [
            TokenLogprobs(value, rank, tuple(zip(indices[:count], tops[:count], strict=True)))
            for value, rank, indices, tops, count in zip(*columns, strict=True)
        ]

    return result


def _bias(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """logits [R, vocab_size] with logit_bias added and banned ids at -inf; the same tensor when nothing changes, else a new one in fp32."""
    size, device = logits.shape[-1], logits.device
    biased = {index: row.bias for index, row in enumerate(rows) if row.params.logit_bias}
    banned = [index * size + token_id for index, row in enumerate(rows) for token_id in row.banned]
    if not biased and not banned:
        return logits
    changed = logits.to(torch.float32, copy=True)
    flat = changed.view(-1)
    if biased:
        places = _places({index: ids for index, (ids, _) in biased.items()}, size, device)
        flat[places] += to_device(np.concatenate([values for _, values in biased.values()]), device)
    if banned:
        flat.index_fill_(0, listed(banned, torch.int64, device), -math.inf)
    return changed


def _penalise(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """logits [R, vocab_size] with penalties; the same tensor when there are none, else a new one in fp32.

    vLLM's semantics: repetition (Keskar et al. 2019, CTRL) counts prompt and output, presence and frequency (OpenAI) the output alone.
    """
    repeated = {index: row.known.read()[0] for index, row in enumerate(rows) if row.params.repetition_penalty != 1}
    counted = {
        index: row.output.read()
        for index, row in enumerate(rows)
        if (row.params.presence_penalty or row.params.frequency_penalty) and len(row.token_ids) > row.num_prompt_tokens
    }
    if not repeated and not counted:
        return logits
    changed = logits.to(torch.float32, copy=True)
    flat, size, device = changed.view(-1), logits.shape[-1], logits.device
    if repeated:
        places, lengths = _places(repeated, size, device), [len(ids) for ids in repeated.values()]
        penalties = np.array([rows[index].params.repetition_penalty for index in repeated], np.float32)
        penalty, values = to_device(np.repeat(penalties, lengths), device), flat[places]
        flat[places] = torch.where(values > 0, values / penalty, values * penalty)
    if counted:
        places = _places({index: ids for index, (ids, _) in counted.items()}, size, device)
        amounts = [
            np.float32(rows[index].params.frequency_penalty) * counts.astype(np.float32) + np.float32(rows[index].params.presence_penalty)
            for index, (_, counts) in counted.items()
        ]
        flat[places] -= to_device(np.concatenate(amounts), device)
    return changed


def _places(ids: Mapping[int, np.ndarray], size: int, device: torch.device) -> torch.Tensor:
    """Where token ids of rows, by row, are in logits [R, size] taken as one row."""
    starts = np.repeat(np.array(list(ids), np.int64) * size, [len(part) for part in ids.values()])
    return to_device(starts + np.concatenate(list(ids.values())), device)


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Token ids [R]; logits are changed in place."""
    params = [row.params for row in rows]
    logits /= _column([p.temperature for p in params], logits)
    if any(p.min_p for p in params):
        threshold = logits.amax(-1, keepdim=True) + _column([p.min_p for p in params], logits).log()
        logits.masked_fill_(logits < threshold, -torch.inf)
    cut = [index for index, p in enumerate(params) if 0 < p.top_k < logits.shape[-1]]
    if cut:
        places = listed(cut, torch.int64, logits.device)
        logits[places] = _top_k(logits[places], [params[index].top_k for index in cut])
    cut = [index for index, p in enumerate(params) if p.top_p < 1]
    if cut:
        places = listed(cut, torch.int64, logits.device)
        logits[places] = _top_p(logits[places], [params[index].top_p for index in cut])
    keys = [_mix(row.params.seed * _GOLDEN + _mix(len(row.token_ids) + 1)) for row in rows]
    return (logits - exponential_noise(keys, logits.shape[-1], logits.device).log()).argmax(-1)


def _top_k(logits: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Keeps each row's counts[r] likeliest tokens, and all that equal the last of them."""
    last = listed(counts, torch.int64, logits.device)[:, None] - 1
    return logits.masked_fill(logits < logits.topk(max(counts), dim=-1).values.gather(1, last), -torch.inf)


def _top_p(logits: torch.Tensor, masses: Sequence[float]) -> torch.Tensor:
    """Keeps each row's fewest tokens with a probability of masses[r], one at least (Holtzman et al. 2019); of equals, lower ids first."""
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= _column(masses, logits)
    outside[:, 0] = False
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(outside, -torch.inf))


def exponential_noise(keys: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """[len(keys), size] fp32, each entry exponentially distributed (mean 1), a function of (key, column) alone. -log of it is Gumbel.

    Bits are those of splitmix64 (Steele et al. 2014) at counter = column; a uniform in (0, 1) is made of 63 of them.
    """
    counter = torch.arange(1, size + 1, device=device) * _signed(_GOLDEN)
    bits = listed([_signed(key) for key in keys], torch.int64, device)[:, None] + counter
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
    return listed(values, like.dtype, like.device)[:, None]
