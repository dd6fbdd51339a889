"""What a router's spans say (docs/tracing.md): OpenTelemetry's names for generative AI where they fit, `baton.` else."""

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from baton.tracing import NO_SPAN, Span, Tracer

if TYPE_CHECKING:
    from services.router.dispatch import Route
    from services.router.generation import Ask, Choice
    from services.router.placer import Decision


@contextlib.contextmanager
def request_span(
    tracer: Tracer, model: str, request_id: str, asks: "Sequence[Ask]", traceparent: str
) -> "Generator[tuple[Span, list[Choice]]]":
    """The whole of a request; and where its sequences are put, which the end tells of. Who leaves early leaves a span with error.type
    GeneratorExit or CancelledError."""
    choices: list[Choice] = []
    sampling, operation = asks[0].sampling, asks[0].operation
    span = tracer.start(f"{operation} {model}", "server", traceparent) if tracer.on else NO_SPAN
    if not span.on:
        yield span, choices
        return
    span.set(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "baton",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": sum(ask.n for ask in asks),
            "gen_ai.response.id": request_id,
            "gen_ai.usage.input_tokens": sum(len(ask.prompt_token_ids) for ask in asks),
        }
    )
    begun, failure = time.monotonic(), None
    try:
        yield span, choices
    except BaseException as error:
        failure = error
        raise
    finally:
        firsts = [choice.first_at - begun for choice in choices if choice.first_at is not None]
        span.set(
            {
                "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
                "gen_ai.usage.cache_read.input_tokens": sum(choice.cache.num_cached_tokens for choice in choices if choice.cache),
                "gen_ai.response.finish_reasons": [str(choice.finish_reason) for choice in choices],
                "gen_ai.response.time_to_first_chunk": min(firsts, default=None),
                "baton.queued": max((choice.route.queued_s for choice in choices), default=None),
                "baton.moves": sum(len(choice.route.moves) for choice in choices),
            }
        )
        span.end(failure)


def attempt_span(span: Span, decision: "Decision") -> Span:
    """The call to the worker that was chosen, with what was expected of it."""
    placement = decision.placement
    return span.child(
        f"generate {placement.decode}",
        "client",
        {
            "baton.route.decode": placement.decode,
            "baton.route.candidates": placement.prefills,
            "baton.route.reason": placement.reason,
            "baton.route.cost": placement.cost_s,
            "baton.route.predicted_ttft": placement.ttft_s,
            "baton.route.missing_tokens": placement.missing_tokens,
            "baton.route.num_workers": len(decision.view),
            "baton.route.degraded": decision.degraded or None,
        },
    )


def end_attempt(span: Span, route: "Route", decision: "Decision", error: Exception | None = None, *, overtaken: bool = False) -> None:
    """The first word counts. `route`: how it really went."""
    if span is not route.span and span.on:
        actual = decision.ttft_s
        span.set({"baton.route.prefill": route.prefill or "local", "baton.route.outcome": route.reason, "baton.route.actual_ttft": actual})
        span.set({"baton.route.overtaken": overtaken or None})
        span.end(error)
