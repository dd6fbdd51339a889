# pyright: basic
"""Tracing: a request's way through the cluster as OpenTelemetry spans (docs/tracing.md). The only importer of opentelemetry, and only where
a process is told where to send spans; else there is `OFF`, whose spans do nothing.

    tracer.start ─▶ Span ─▶ child, set … ─▶ end        (a background thread sends what has ended, in batches)
                      └▶ traceparent: what the next process starts its own from
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from baton.config import TracingConfig
from baton.errors import ConfigError
from baton.types import CacheReport, Fetch

Kind = Literal["internal", "server", "client"]
Values = Mapping[str, Any]  # None: left out


class Span:
    """Of nothing: tracing is off. All methods return at once."""

    on = False
    traceparent = ""  # W3C's header

    def child(self, name: str, kind: Kind = "internal", values: Values | None = None) -> "Span":
        return self

    def past(self, name: str, begun: float, seconds: float, values: Values) -> None:
        """A child that has ended already; `begun`: time.time."""

    def set(self, values: Values) -> None:
        pass

    def end(self, error: BaseException | None = None) -> None:
        """Once; later calls say nothing. `error`: what it failed with."""


NO_SPAN = Span()


class Tracer:
    """Of a process that traces nothing."""

    on = False

    def start(self, name: str, kind: Kind, parent: str, values: Values | None = None) -> Span:
        """`parent`: the caller's traceparent; empty, or nothing that can be read: a new trace."""
        return NO_SPAN

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""


OFF = Tracer()


def make_tracer(config: TracingConfig, service: str, instance: str) -> Tracer:
    """Raises ConfigError where the packages are missing."""
    if not config.endpoint:
        return OFF
    try:
        return _Exporting(config, service, instance)
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint needs OpenTelemetry, which is not installed ({error}): pip install 'baton[otel]', or leave it empty"
        ) from error


class _Exporting(Tracer):
    on = True

    def __init__(self, config: TracingConfig, service: str, instance: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample)),
            resource=Resource({"service.namespace": "baton", "service.name": f"baton-{service}", "service.instance.id": instance}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(config.endpoint, timeout=config.timeout_s)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=config.interval_s * 1000))
        self._tracer = self._provider.get_tracer("baton")

    def start(self, name: str, kind: Kind, parent: str, values: Values | None = None) -> Span:
        return self.within(name, kind, self._propagator.extract({"traceparent": parent}), values)

    def within(self, name: str, kind: Kind, context: Any, values: Values | None, start_ns: int | None = None) -> "_Recorded":
        from opentelemetry.trace import SpanKind

        return _Recorded(self, self._tracer.start_span(name, context, SpanKind[kind.upper()], _told(values or {}), start_time=start_ns))

    def close(self) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a collector that is away is no news at the end
        self._provider.shutdown()


class _Recorded(Span):
    def __init__(self, tracer: _Exporting, span: Any) -> None:
        context = span.get_span_context()
        self._tracer, self._span = tracer, span
        self.on = span.is_recording()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, kind: Kind = "internal", values: Values | None = None) -> Span:
        return self._tracer.within(name, kind, self._context(), values)

    def past(self, name: str, begun: float, seconds: float, values: Values) -> None:
        child = self._tracer.within(name, "internal", self._context(), values, int(begun * 1e9))
        child._span.end(int((begun + seconds) * 1e9))

    def _context(self) -> Any:
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self._span)

    def set(self, values: Values) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_told(values))

    def end(self, error: BaseException | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        if not self._span.is_recording():
            return
        if error is not None:
            self._span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()


def _told(values: Values) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def tell_fetches(span: Span, fetches: Sequence[Fetch], block_bytes: int) -> None:
    """Each load from a tier as a child."""
    for each in fetches:
        values = {"baton.kv.tier": each.tier, "baton.kv.blocks": each.num_blocks, "baton.kv.bytes": each.num_blocks * block_bytes}
        span.past("kv fetch", each.begun, each.seconds, values)


def cache_values(cache: CacheReport) -> dict[str, Any]:
    """Where a prompt's KV came from."""
    computed = cache.num_prompt_tokens - cache.num_local_tokens - cache.num_pool_tokens - cache.num_prefill_tokens
    return {
        "gen_ai.usage.input_tokens": cache.num_prompt_tokens,
        "baton.kv.local_tokens": cache.num_local_tokens,
        "baton.kv.fetched_tokens": cache.num_pool_tokens,
        "baton.kv.prefilled_tokens": cache.num_prefill_tokens,
        "baton.kv.computed_tokens": max(computed, 0),
    }
