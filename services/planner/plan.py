"""`plan`: how many workers each pool needs for a load, a promise and the paces that workers have learned. Pure; knows no clock, no cluster.

Prefill workers are a queue (M/G/c): prompts come at random, take seconds by their length, and wait where all are busy. What counts is the
share of first tokens that come in time, wait and prompt together, so a pool is larger than its work. The wait's tail is Erlang's C, made
wider for prompts of different lengths as by Allen and Cunneen: P(W > t) = C(c, a) · exp(-(c - a) t / (S (1 + V²) / 2)).

Decode workers share their time among all they hold. With λ requests/s of m tokens, each of which adds k seconds to a step, u = λ m k / D
of a worker's time goes to them, and Little's law gives the step: base / (1 - u). Where tokens come slower than that, the difference is
taken by prompts that decode workers compute: so many workers' time comes on top. Requests come in lumps: rows and context are those that
one worker seldom exceeds. The KV cache must hold them beside the prompts that wait or are being computed, for which room is reserved, also
when they wait for long: a worker without room computes them itself, is slow, and has less room still. From that no pool comes back.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from baton.errors import ConfigError
from baton.types import Pace, Role

CLEAR_S = 60.0  # a backlog that is too long already is worked off within this
KV_LIMIT = 0.9  # of the blocks: more, and requests are preempted
RESERVED_LIMIT = 0.5  # of the blocks, for prompts that are being computed elsewhere; as runtime.leases has it
_Z_MEMORY = NormalDist().inv_cdf(0.99)  # of the moments, in which the KV cache suffices
_MOST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked for, in sequences (a request with n = 2 is two)."""

    rate: float = 0.0  # a second
    prompts: tuple[tuple[float, float], ...] = ()  # share of the sequences, and their prompt's tokens
    cached: float = 0.0  # share of prompt tokens that nobody computes
    output_tokens: float = 0.0  # mean; 0: not known yet
    waiting_tokens: float = 0.0  # not computed yet, at prefill workers
    waiting_pairs: float = 0.0  # see types.Load
    num_prefilling: int = 0  # of those workers
    num_queued: float = 0.0  # held back by routers
    num_running: float = 0.0  # at decode workers
    num_decoding: int = 0  # of those workers, with requests
    itl_s: float = 0.0  # between tokens, as it lately was; 0: not known

    def mean(self, of: Callable[[float], float]) -> float:
        return sum(share * of(tokens) for share, tokens in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a worker of each pool can do; seconds by the clock."""

    prefill: Pace = field(default_factory=Pace)
    decode: Pace = field(default_factory=Pace)
    batched_tokens: int = 0  # of a prefill worker's step; 0: not known
    kv_tokens: int = 0  # that a decode worker's cache holds; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """`share` of the requests get their first token within `ttft_s`, and the next ones every `itl_s` or sooner."""

    ttft_s: float
    itl_s: float
    share: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.itl_s < self.ttft_s < math.inf:
            raise ConfigError(
                f"--slo-itl {self.itl_s:g} and --slo-ttft {self.ttft_s:g}: seconds above 0, the time to the first token longer"
            )
        if not 0.5 <= self.share < 1:
            raise ConfigError(f"--slo-share {self.share:g} must be at least 0.5 and below 1; to promise all requests takes endless workers")


@dataclass(frozen=True, slots=True)
class Bounds:
    at_least: int = 1
    at_most: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.at_most:
            raise ConfigError(f"a pool of {self.at_least} to {self.at_most} workers: one at least, and no more than the most")


@dataclass(frozen=True, slots=True)
class Pool:
    """`workers` within the bounds; None: nothing can be said, leave it as it is."""

    workers: int | None
    reason: str


Plan = Mapping[Role, Pool]


def plan(load: Load, rates: Rates, slo: Slo, bounds: Mapping[Role, Bounds]) -> Plan:
    """Of Role.PREFILL and Role.DECODE."""
    prompts = _Prompts(load, rates, slo)
    prefill = _bounded(*_prefill(prompts, load, rates, slo), bounds[Role.PREFILL])
    decode = _decode(prompts, prefill.workers or load.num_prefilling or 1, load, rates, slo)
    return {Role.PREFILL: prefill, Role.DECODE: _bounded(*decode, bounds[Role.DECODE])}


def _bounded(needed: int | None, reason: str, bounds: Bounds) -> Pool:
    if needed is None:
        return Pool(None, reason)
    workers = min(max(needed, bounds.at_least), bounds.at_most)
    if workers < needed:
        reason += f". NOT ENOUGH: {needed} are needed, and {workers} are the most that are allowed"
    elif workers > needed:
        reason += f"; {needed} would do, {workers} are the fewest allowed"
    return Pool(workers, reason)


# -- prefill


def _prefill(prompts: "_Prompts", load: Load, rates: Rates, slo: Slo) -> tuple[int | None, str]:
    if not load.rate and not load.num_queued + load.waiting_tokens:
        return 1, "nothing is asked for"
    if not rates.prefill.token_s or not load.prompts:
        return None, "nobody has learned yet what a prompt takes"
    mean = prompts.mean
    if prompts.hopeless > 1 - 1e-9:
        return None, f"no prompt can be computed within {prompts.budget_s:.3g} s: a mean one takes {mean:.3g} s; promise more time"
    workers = _fewest(lambda count: prompts.in_time(count) >= slo.share)
    reason = (
        f"{load.rate:.2f} prompts/s of {mean:.2f} s: {load.rate * mean:.1f} workers' time; with {workers}, {prompts.in_time(workers):.1%} "
        f"of first tokens come within {slo.ttft_s:g} s"
    )
    if workers > 1:
        reason += f", with {workers - 1} {max(prompts.in_time(workers - 1), 0):.1%}"
    if prompts.backlog_s > workers * prompts.budget_s:
        reason += f"; {prompts.backlog_s:.0f} s of prompts wait already"
    if prompts.hopeless > 0.0005:
        reason += f"; {prompts.hopeless:.1%} of the prompts take longer by themselves, and do not count"
    return workers, reason


class _Prompts:
    """A prefill pool, by its number of workers."""

    def __init__(self, load: Load, rates: Rates, slo: Slo) -> None:
        self._load, self._rates, self._share = load, rates, slo.share
        self.mean, self._square = load.mean(self.seconds), load.mean(lambda tokens: self.seconds(tokens) ** 2)
        self.budget_s = slo.ttft_s - slo.itl_s  # the decode worker takes over between two of its steps
        self.hopeless = load.mean(lambda tokens: float(self.seconds(tokens) > self.budget_s))  # share that cannot be in time
        pace = rates.prefill
        self.backlog_s = pace.token_s * load.waiting_tokens + pace.pair_s * load.waiting_pairs + load.num_queued * self.mean

    def seconds(self, tokens: float) -> float:
        """Of a prompt, to compute what is not cached."""
        pace, own = self._rates.prefill, max(tokens * (1 - self._load.cached), 1.0)
        steps = own / self._rates.batched_tokens if self._rates.batched_tokens else 0.0
        return pace.base_s * max(steps, 1.0) + pace.prompt_s(own, tokens - own)

    def busy(self, workers: int) -> float:
        """Workers' time that is asked for."""
        return self._load.rate * self.mean + max(self.backlog_s - workers * self.budget_s, 0.0) / CLEAR_S

    def in_time(self, workers: int) -> float:
        """Share of the first tokens, of those that could be."""

        def late(tokens: float) -> float:
            left_s = self.budget_s - self.seconds(tokens)
            return waits_longer(left_s, workers, self.busy(workers), self.mean, self._square) if left_s >= 0 else 0.0

        return 1 - self._load.mean(late) / (1 - self.hopeless)

    def wait_s(self, workers: int) -> float:
        """That few wait longer, before their prompt is begun; or what is waited now."""
        asked = min(self.busy(workers), 0.99 * workers)
        if not asked:
            return 0.0
        likely = erlang_c(workers, asked) / (1 - self._share)
        longest = math.log(likely) * self._square / (2 * self.mean) / (workers - asked) if likely > 1 else 0.0
        return max(min(longest, self.budget_s), self.backlog_s / max(self._load.num_prefilling, 1))


def waits_longer(seconds: float, workers: int, busy: float, mean: float, square: float) -> float:
    """P(a prompt waits so long) before one of `workers` begins it. `busy`: workers' time that is asked for; `mean` and `square`: moments of
    a prompt's seconds."""
    if busy >= workers:
        return 1.0
    spread = square / (2 * mean)  # S (1 + V²) / 2
    return erlang_c(workers, busy) * math.exp(-(workers - busy) * max(seconds, 0.0) / spread)


def erlang_c(workers: int, busy: float) -> float:
    """P(all are busy when somebody comes); by the recursion of Erlang's B, which does not overflow."""
    blocked = 1.0
    for count in range(1, workers + 1):
        blocked = busy * blocked / (count + busy * blocked)
    return blocked / (1 - busy / workers * (1 - blocked))


# -- decode


def _decode(prompts: _Prompts, prefills: int, load: Load, rates: Rates, slo: Slo) -> tuple[int | None, str]:
    """`prefills`: workers that compute the prompts."""
    if not load.rate and not load.num_running:
        return 1, "nothing is asked for"
    if not (rates.decode.row_s or rates.decode.context_s) or not load.output_tokens or not load.prompts:
        return None, "no request has ended yet, or nobody has learned yet what a token takes"
    decoding = _Decoding(prompts, prefills, load, rates, slo)
    if decoding.alone_s > slo.itl_s:
        return None, f"a token takes {1e3 * decoding.alone_s:.3g} ms with nothing beside it: {1e3 * slo.itl_s:.3g} ms cannot be kept"
    workers = _fewest(decoding.enough)
    reason = f"{load.rate * load.output_tokens:.0f} tokens/s, {decoding.at_once(workers):.0f} requests at once"
    if decoding.prompts > 0.05:
        reason += f", prompts take {decoding.prompts:.1f} workers' time"
    reason += f": with {workers}, {decoding.told(workers)}"
    return workers, reason + (f"; with {workers - 1}, {decoding.told(workers - 1)}" if workers > 1 else "")


class _Decoding:
    """A decode pool, by its number of workers."""

    def __init__(self, prompts: _Prompts, prefills: int, load: Load, rates: Rates, slo: Slo) -> None:
        half, wait_s = load.output_tokens / 2, prompts.wait_s(prefills)
        self._load, self._rates, self._slo, self._pace = load, rates, slo, rates.decode
        self._length, self._square = load.mean(lambda tokens: tokens + half), load.mean(lambda tokens: (tokens + half) ** 2)
        self._z = NormalDist().inv_cdf(slo.share)
        # Tokens of prompts on their way, and the square sum: a long prompt is on its way for longer.
        self._coming = load.rate * load.mean(lambda tokens: tokens * (wait_s + prompts.seconds(tokens)))
        self._coming_square = load.rate * load.mean(lambda tokens: tokens**2 * (wait_s + prompts.seconds(tokens)))
        self._tokens = load.rate * load.output_tokens * self._pace.decode_s(1, self._length)  # workers' time, beside that of `base_s`
        self.alone_s = self._pace.base_s + self._pace.decode_s(1, self._length)
        self.prompts = 0.0  # workers' time
        if load.itl_s and load.num_decoding:
            lost = load.num_decoding * (1 - self._pace.base_s / load.itl_s) - self._tokens
            self.prompts = min(max(lost, 0.0), prompts.busy(prefills))

    def _step_s(self, workers: int, rows: float, context: float) -> float:
        free = 1 - self.prompts / workers
        return (self._pace.base_s + self._pace.decode_s(rows, context)) / free if free > 0 else math.inf

    def at_once(self, workers: int) -> float:
        """Requests that are generating, on all workers."""
        free = 1 - (self._tokens + self.prompts) / workers
        return self._load.rate * self._load.output_tokens * self._pace.base_s / free if free > 0 else math.inf

    def held(self, workers: int) -> tuple[float, float, float]:
        """Of the one that holds the most: seconds of a step, and the shares of its KV cache that are in use, and of that reserved."""
        count = self.at_once(workers) / workers
        if count == math.inf:
            return math.inf, math.inf, math.inf
        context, square = count * self._length, count * self._square
        rows = count + self._z * math.sqrt(count)
        step_s = self._step_s(workers, rows, context + self._z * math.sqrt(square))
        if not self._rates.kv_tokens:
            return step_s, 0.0, 0.0
        coming, coming_square = self._coming / workers, self._coming_square / workers
        used = context + coming + _Z_MEMORY * math.sqrt(square + coming_square)
        reserved = coming + _Z_MEMORY * math.sqrt(coming_square)
        return step_s, used / self._rates.kv_tokens, reserved / self._rates.kv_tokens

    def enough(self, workers: int) -> bool:
        step_s, used, reserved = self.held(workers)
        return step_s <= self._slo.itl_s and used <= KV_LIMIT and reserved <= RESERVED_LIMIT

    def told(self, workers: int) -> str:
        step_s, used, reserved = self.held(workers)
        if step_s == math.inf:
            return "more than there is time for"
        cache = f", {used:.0%} of the KV cache ({reserved:.0%} for prompts on their way)" if self._rates.kv_tokens else ""
        return f"{1e3 * step_s:.0f} ms between tokens{cache}"


def _fewest(enough: Callable[[int], bool]) -> int:
    """`enough` holds from some number on."""
    least, most = 0, 1  # not enough, and enough
    while not enough(most) and most < _MOST:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most
