"""Generation: what a client's request becomes. One `Ask` gives one or more sequences (`n`), each a stream of text pieces."""

import asyncio
import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from baton.errors import BatonError, InternalError, InvalidRequest, PromptTooLong
from baton.metrics import RouterMetrics
from baton.tokenizer import Tokenizer
from baton.tracing import OFF, Span, Tracer
from baton.types import CacheReport, FinishReason, GenerateRequest, SamplingParams, TokenLogprobs
from services.router.admission import Admission, Claim, Promised, Ticket, Work
from services.router.dispatch import Dispatcher, Route, Version
from services.router.explain import Record, Records
from services.router.grace import Grace
from services.router.spans import request_span
from services.router.text import Piece, TextStream
from services.router.workers import HashesBySize

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt of a client. `sampling.seed` is ignored: `seed` counts, and None draws one."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    salt: str = ""
    operation: str = "text_completion"  # as OpenTelemetry calls it


@dataclasses.dataclass(slots=True)
class Choice:
    """One sequence as it stands."""

    index: int
    route: Route
    text: str = ""
    pieces: list[Piece] = dataclasses.field(default_factory=list[Piece])
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    cache: CacheReport | None = None
    first_at: float | None = None  # time.monotonic, of its first token


@dataclasses.dataclass(frozen=True, slots=True)
class _Prompt:
    ask: Ask
    hashes: HashesBySize


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """What a request's sequences share."""

    ticket: Ticket
    promised: Promised
    record: Record
    span: Span
    choices: list[Choice]
    version: Version


def allowance(asked: int | None, num_prompt_tokens: int, max_model_len: int, default: int | None = None) -> int:
    """Tokens that may be generated after a prompt that `check` took: as many as asked for. Where nothing is asked: `default`, and no more
    than the context has room for."""
    room = max_model_len - num_prompt_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens and {asked} more are asked for; this model takes at most {max_model_len}, "
            f"prompt and output together: ask for at most {room}, or leave max_tokens out",
            param="max_tokens",
        )
    return asked


class Generator:
    def __init__(
        self,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        admission: Admission,
        metrics: RouterMetrics,
        eos: frozenset[int],
        *,
        explained: int = 0,
        tracer: Tracer = OFF,
        model: str = "",
    ) -> None:
        """`explained`: how many requests `explain` remembers."""
        self._tokenizer, self._dispatcher, self.admission, self._metrics, self._eos = tokenizer, dispatcher, admission, metrics, eos
        self.records, self._tracer, self._model = Records(explained), tracer, model
        self.grace = Grace()  # of what is generated

    def check(self, token_ids: Sequence[int], max_model_len: int | None) -> None:
        """Refuses a prompt that no worker could take, before it costs anything."""
        if not token_ids:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                last = self._tokenizer.vocab_size - 1
                raise InvalidRequest(f"token id {token_id} is outside the model's vocabulary (0 to {last})", param="prompt")
        if max_model_len is not None and len(token_ids) >= max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(token_ids)} tokens; this model takes at most {max_model_len} tokens, prompt and output together: "
                "shorten the prompt",
                param="prompt",
            )

    async def run(self, request_id: str, asks: Sequence[Ask], claim: Claim, traceparent: str = "") -> AsyncGenerator[tuple[Choice, Piece]]:
        """Pieces of all sequences as they come, once the request is let in; sequence i of prompt p has index p * n + i. Leaving early
        cancels them all. `request_id`: what the client knows it by; `traceparent`: of the client's span."""
        for ask in asks:
            for _ in range(ask.n):
                self._metrics.arrived_prompt_tokens.observe(len(ask.prompt_token_ids))
        prompts = [_Prompt(ask, HashesBySize(ask.prompt_token_ids, ask.salt)) for ask in asks]
        with request_span(self._tracer, self._model, request_id, asks, traceparent) as (span, choices):
            promised = self.admission.promised(claim)
            try:
                async with self.admission.enter(claim, self._work(prompts, promised)) as ticket:
                    run = _Run(ticket, promised, self.records.start(request_id, claim.tenant.name), span, choices, Version())
                    # Nearly always one: without a task and a queue, which cost a step of 32 half a millisecond.
                    one = len(asks) == 1 and asks[0].n == 1
                    pieces = self._sequence(prompts[0], 0, _drawn(asks[0].seed), run) if one else self._several(prompts, run)
                    async with aclosing(pieces) as items:
                        async for item in items:
                            ticket.told(len(item[1].tokens))
                            yield item
            except (asyncio.CancelledError, GeneratorExit):
                if not self.grace.over:  # else it is told, and counted, as a failure
                    self._cancelled(asks, choices)
                raise

    def _work(self, prompts: Sequence[_Prompt], promised: Promised) -> Work:
        """What is asked for, in all; forecasts are those of the longest prompt."""
        asks, placer = [prompt.ask for prompt in prompts], self._dispatcher.placer
        longest = max(prompts, key=lambda prompt: len(prompt.ask.prompt_token_ids))
        return Work(
            num_prompt_tokens=sum(len(ask.prompt_token_ids) for ask in asks),
            num_output_tokens=sum(ask.n * placer.expected_tokens(ask.sampling.max_tokens) for ask in asks),
            num_sequences=sum(ask.n for ask in asks),
            forecast=placer.forecast(len(longest.ask.prompt_token_ids), longest.hashes, longest.ask.sampling.max_tokens, promised),
        )

    async def _several(self, prompts: Sequence[_Prompt], run: "_Run") -> AsyncGenerator[tuple[Choice, Piece]]:
        """The first sequence of a prompt starts at once, its siblings with its first token: they find the prompt cached."""
        pieces: asyncio.Queue[tuple[Choice, Piece] | BatonError | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._run_ask(prompt, place * prompt.ask.n, pieces, run)) for place, prompt in enumerate(prompts)]
        left = len(tasks)
        try:
            while left:
                item = await pieces.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BatonError):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_ask(
        self, prompt: _Prompt, first_index: int, pieces: "asyncio.Queue[tuple[Choice, Piece] | BatonError | None]", run: "_Run"
    ) -> None:
        seed, started = _drawn(prompt.ask.seed), asyncio.Event()

        async def run_one(i: int) -> None:
            async with aclosing(self._sequence(prompt, first_index + i, _sibling_seed(seed, i), run)) as items:
                async for item in items:
                    started.set()
                    pieces.put_nowait(item)

        try:
            async with asyncio.TaskGroup() as group:
                for i in range(prompt.ask.n):
                    if i == 1:
                        await started.wait()
                    group.create_task(run_one(i))
        except* BatonError as errors:
            pieces.put_nowait(cast(BatonError, errors.exceptions[0]))
        pieces.put_nowait(None)

    async def _sequence(self, prompt: _Prompt, index: int, seed: int, run: "_Run") -> AsyncGenerator[tuple[Choice, Piece]]:
        """One sequence as it grows. Raises BatonErrors alone."""
        ask = prompt.ask
        try:
            choice = Choice(index, self._dispatcher.route())
            choice.route.queued_s, choice.route.span = run.ticket.queued_s, run.span
            run.choices.append(choice)
            self.records.add(run.record, choice.route)
            request = GenerateRequest(
                request_id=f"{ask.request_id}-{index}-{secrets.token_hex(4)}",  # clients may use an id twice; workers must not
                prompt_token_ids=ask.prompt_token_ids,
                sampling=dataclasses.replace(ask.sampling, seed=seed),
                salt=ask.salt,
            )
            text = TextStream(
                self._tokenizer,
                stop=ask.stop,
                include_stop=ask.include_stop,
                skip_special_tokens=ask.skip_special_tokens,
                min_tokens=ask.sampling.min_tokens,
                eos=self._eos,
                prompt=ask.prompt_token_ids,
            )
            begun = last = run.ticket.arrived
            async with aclosing(self._dispatcher.generate(request, choice.route, prompt.hashes, run.promised, run.version)) as outputs:
                async for output in outputs:
                    piece = text.push(output)
                    choice.pieces.append(piece)
                    choice.text += piece.text
                    choice.num_tokens += len(piece.tokens)
                    choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
                    choice.prompt_logprobs = choice.prompt_logprobs or output.prompt_logprobs
                    choice.cache = output.cache or choice.cache
                    last = self._observe(choice, begun, last)
                    if piece.finish_reason is not None:
                        self._finish(choice, ask, begun)
                        yield choice, piece
                        break
                    yield choice, piece
        except BatonError as error:
            self._metrics.failure(error)
            raise
        except Exception as error:
            logger.error("a request failed", exc_info=error, extra={"request_id": ask.request_id})
            raise InternalError(f"{type(error).__name__}: {error}") from error

    def _observe(self, choice: Choice, begun: float, last: float) -> float:
        now = time.monotonic()
        if len(choice.pieces) == 1:
            choice.first_at = now
            self._metrics.time_to_first_token.observe(now - begun)
        else:
            self._metrics.inter_token_latency.observe(now - last)
        return now

    def _finish(self, choice: Choice, ask: Ask, begun: float) -> None:
        self._metrics.e2e_request_latency.observe(time.monotonic() - begun)
        self._count(choice, ask)
        self._metrics.success(str(choice.finish_reason))

    def _cancelled(self, asks: Sequence[Ask], choices: Sequence[Choice]) -> None:
        """By the client: of what was begun, that which has come to a token was served."""
        for choice in choices:
            if choice.finish_reason is None and choice.num_tokens:
                self._count(choice, asks[choice.index // asks[0].n])
        ended = sum(choice.finish_reason is not None for choice in choices)
        for _ in range(sum(ask.n for ask in asks) - ended):
            self._metrics.success(FinishReason.ABORT)

    def _count(self, choice: Choice, ask: Ask) -> None:
        self._metrics.prompt_tokens.inc(len(ask.prompt_token_ids))
        self._metrics.generation_tokens.inc(choice.num_tokens)
        self._metrics.cached_tokens.inc(choice.cache.num_cached_tokens if choice.cache else 0)


def _drawn(seed: int | None) -> int:
    """The client's seed, or a new one."""
    return secrets.randbelow(2**63) if seed is None else seed % 2**63


def _sibling_seed(seed: int, index: int) -> int:
    """Sequence 0 has the request's own seed."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1
