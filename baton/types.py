"""The words of the system: plain frozen data that every room may use. Knows nothing of torch, gRPC or HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"  # prefill and decode in one worker: the baseline
    KVSTORE = "kvstore"
    ROUTER = "router"


class MemberState(StrEnum):
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence id, a stop id, or (at the router) a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Stop *strings* are not here: text exists at the router alone.

    Logits are penalised, divided by `temperature`, then filtered by min_p, top_k and top_p, in that order (as vLLM does). Draws come
    from a counter-based generator keyed by (`seed`, position of the drawn token in the sequence): the same request gives the same
    tokens in any batch, on any worker, before or after a migration.
    """

    max_tokens: int
    seed: int = 0  # 0 <= seed < 2**63; the router draws one when the client gives none
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    min_tokens: int = 0  # eos and stop ids are banned until so many tokens are out
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the sampled token's and the n likeliest
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms, of the raw logits (before penalties and temperature)."""

    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class OutputToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate.

    `output_token_ids` are tokens already generated elsewhere (a migrated request): they count as output for penalties, min_tokens and
    max_tokens, and are never emitted again. `sampling.max_tokens` counts them too.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    salt: str = ""  # separates prefix caches: tenant, adapter, images
    traceparent: str = ""  # of the span that asks, as W3C writes it; empty: it is not traced


@dataclass(frozen=True, slots=True)
class PushShard:
    """One rank's share of reserved memory: what it keeps of the i-th block belongs at addresses[i] of its process."""

    machine: str  # that it runs on
    sessions: tuple[tuple[str, str], ...]  # protocol, and where it receives over that
    addresses: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTarget:
    """Memory that a decode worker has reserved for a prompt's KV, from block first_block on."""

    lease: str  # names the reservation
    first_block: int
    shards: tuple[PushShard, ...]  # by rank: each keeps an equal part of the heads, in their order

    @property
    def num_blocks(self) -> int:
        return len(self.shards[0].addresses) if self.shards else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEnd:
    """What a prefill worker says of a lease that has ended there."""

    known: bool  # it was asked for something under this lease; else it, or the process before it, may have been
    clean: bool  # all that was sent has arrived, or nothing was: nothing of it is written any more


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """Where a request's prompt KV came from, in tokens. What is left of the prompt was computed."""

    num_prompt_tokens: int
    num_local_tokens: int = 0  # this worker's own prefix cache
    num_pool_tokens: int = 0  # loaded from the KV pool, put there by an earlier request
    num_prefill_tokens: int = 0  # loaded from the KV pool, computed for this request by a prefill worker

    @property
    def num_cached_tokens(self) -> int:
        """What OpenAI's `usage.prompt_tokens_details.cached_tokens` counts: tokens that nobody had to compute."""
        return self.num_local_tokens + self.num_pool_tokens


@dataclass(frozen=True, slots=True)
class Fetch:
    """One load of a prompt's blocks from a tier, as a span tells it."""

    tier: str
    num_blocks: int  # that came
    begun: float  # time.time
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOutput:
    """What one engine step gave one request. Zero tokens with no finish reason is progress only (a long prompt being computed)."""

    tokens: tuple[OutputToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it (eos or a stop id); it is the last of `tokens`
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # once, with the first token; the first entry is None
    num_computed_tokens: int = 0
    num_saved_blocks: int = 0  # leading full blocks of the tokens sent that the KV pool is known to hold
    num_pushed_blocks: int = 0  # leading blocks of the tokens sent, the last one maybe half full, that the push target is known to hold
    pushed_sums: tuple[int, ...] = ()  # with push.verify: checksums of the pushed blocks so far, from the target's first one on
    cache: CacheReport | None = None  # with the first output
    fetches: tuple[Fetch, ...] = ()  # since the last output; they stay in the worker's process


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of the cluster as it announces itself. A prefill and a decode worker pair only if their fingerprints are equal."""

    id: str
    role: Role
    address: str  # host:port of its gRPC server
    state: MemberState = MemberState.READY
    pid: int = 0
    instance: str = ""  # of this process alone: a successor has the same id, and maybe address and pid
    machine: str = ""  # see cluster.machine
    device: str = ""  # of the machine, that other workers may compute on too: the cores; empty: nobody else does
    model: str = ""  # served name
    fingerprint: str = ""  # of the KV layout: weights, block size, dtype, hash scheme
    block_size: int = 0  # tokens
    num_blocks: int = 0
    max_model_len: int = 0
    max_num_batched_tokens: int = 0  # of a step
    tensor_parallel_size: int = 0  # ranks that share the model; 0 where it is not said
    metrics_address: str = ""  # host:port of its Prometheus endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What work takes on one worker, as it has learned by itself; seconds of its device, as if nobody else used that. Zero: not met yet."""

    base_s: float = 0.0  # of any step
    token_s: float = 0.0  # of a prompt's token in it
    pair_s: float = 0.0  # of two tokens of a prompt, one attending to the other
    row_s: float = 0.0  # of a request that gets a token
    context_s: float = 0.0  # of a token that such a request reads
    push_token_s: float = 0.0  # of a token's KV on its way to a decode worker, by the clock
    crowded: float = 0.0  # seconds by the clock beyond those, for each of them: that its steps wait for others who use the device

    def prompt_s(self, tokens: float, start: float = 0.0) -> float:
        """What `tokens` of a prompt, from position `start` on, add to the steps that compute them."""
        return self.token_s * tokens + self.pair_s * tokens * (start + tokens / 2)

    def decode_s(self, rows: float, context: float) -> float:
        """What `rows` requests that read `context` tokens together add to a step."""
        return self.row_s * rows + self.context_s * context

    def by_the_clock(self) -> "Pace":
        """With others on the device as they lately were."""
        slower = 1 + self.crowded
        return Pace(
            base_s=self.base_s * slower,
            token_s=self.token_s * slower,
            pair_s=self.pair_s * slower,
            row_s=self.row_s * slower,
            context_s=self.context_s * slower,
            push_token_s=self.push_token_s,
        )


class Tier(StrEnum):
    DEVICE = "device"
    HOST = "host"
    POOL = "pool"
    FILES = "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A worker's load at one moment."""

    num_running: int = 0
    num_waiting: int = 0  # queued, loading KV, or held
    num_held: int = 0  # of them, those whose prompt another worker computes
    num_waiting_tokens: int = 0  # known tokens of waiting and running requests that are not computed yet
    num_waiting_pairs: int = 0  # of tokens, one of them not computed yet, that attend to each other
    num_context_tokens: int = 0  # computed tokens of running requests
    num_steps: int = 0  # that have ended: until it grows, the worker is in the same one
    blocks_total: int = 0
    blocks_free: int = 0  # neither held by a request nor caching anything, plus evictable cached ones
    blocks_cached: int = 0  # blocks that hold a hash (held or evictable)
    fetch_token_s: tuple[tuple[Tier, float], ...] = ()  # of its tiers that answer: seconds of loading a token's KV; 0: not measured
    pace: Pace = Pace()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """The KV pool as its master counts it."""

    up: bool = False  # a master answers
    leads: bool = False  # it leads; the figures of one that stands by mean nothing
    capacity_bytes: int = 0
    used_bytes: int = 0
    num_keys: int = 0
    num_evicted: int = 0  # keys, since the master's start
    bytes_evicted: int = 0
    num_refused: int = 0  # puts for which there was no room
    num_replicated: int = 0  # keys that got a second replica
    segments: tuple[tuple[str, int, int], ...] = ()  # of each node: name, used bytes, capacity bytes


@dataclass(frozen=True, slots=True)
class BlocksStored:
    block_hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    block_hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


KVEvent = BlocksStored | BlocksRemoved


@dataclass(frozen=True, slots=True)
class Digest:
    """Of the blocks that a worker holds in a tier: who knows others has another one."""

    tier: Tier
    num_blocks: int
    xor: int  # of their hashes, as big-endian numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUpdate:
    """One message of a worker's state stream. Sequence numbers rise by one; after a gap the reader asks for a new stream, whose first
    message is a snapshot. With `snapshot`, `events` is everything that the worker holds and replaces what the reader knew. `digests` are of
    what it holds after `events`, by its own count: a reader that comes to another one has missed something, and asks for a new stream."""

    sequence: int
    state: MemberState
    load: Load
    events: tuple[KVEvent, ...] = ()
    snapshot: bool = False
    digests: tuple[Digest, ...] = ()  # of tiers that are not named nothing is said
    arrived: tuple[str, ...] = ()  # request ids that `load` counts for the first time
