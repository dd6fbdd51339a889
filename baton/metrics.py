"""Every metric of every process, named once. Seconds, bytes and tokens. Names follow vLLM's; those that vLLM has too are exported a second
time under its name, so that dashboards and autoscalers made for vLLM work as they are.

A process makes one `Metrics` of its kind, hands it to whom it concerns, and serves it with `serve_metrics`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from baton.errors import BatonError
from baton.types import Load, PoolState

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = tuple(round(2 ** (i / 2)) for i in range(12, 37))  # 64 to 262,144
_ERROR = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)  # relative
# Each is told by one kind of process, so that a sum over all of them is right.
_WORKER_TWINS = frozenset(
    {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits"}
)
_ROUTER_TWINS = frozenset(
    {
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
    }
)

# How totals are told that others count: `kv.transfer`, `kv.direct`, mooncake_master.
_TOTALS = {
    "blocks_loaded": ("kv_pool_loaded_blocks", "Blocks loaded from the KV pool"),
    "blocks_missed": ("kv_pool_missed_blocks", "Blocks that the KV pool was asked for and did not give"),
    "blocks_declined": (
        "kv_pool_declined_blocks",
        "Blocks that the KV pool held, but that were computed, which was predicted to be faster",
    ),
    "blocks_saved": ("kv_pool_saved_blocks", "Blocks saved to the KV pool"),
    "blocks_refused": ("kv_pool_refused_blocks", "Blocks that the KV pool did not take"),
    "blocks_left_out": ("kv_pool_left_out_blocks", "Blocks not saved to the KV pool, since too many others waited for that"),
    "bytes_loaded": ("kv_pool_loaded_bytes", "Bytes loaded from the KV pool"),
    "bytes_saved": ("kv_pool_saved_bytes", "Bytes saved to the KV pool"),
    "seconds_loading": ("kv_pool_load_seconds", "Time spent in loads that went through"),
    "seconds_saving": ("kv_pool_save_seconds", "Time spent in saves that went through"),
    "blocks_near": ("kv_pool_near_blocks", "Of the blocks loaded: copied from memory that a node on this machine shares"),
    "blocks_verified": ("kv_pool_verified_blocks", "Blocks from the KV pool whose seal was compared"),
    "blocks_corrupt": ("kv_pool_corrupt_blocks", "Blocks from the KV pool that differed from what was saved, and were removed from it"),
    "failures": ("kv_pool_failures", "Calls to the KV pool that failed"),
    "skipped": ("kv_pool_skipped_calls", "Calls not made, because the KV pool was left alone or the queue was full"),
    "push_bytes": ("kv_push_bytes", "Bytes written into decode workers"),
    "push_seconds": ("kv_push_seconds", "Time spent in pushes that went through"),
    "push_failures": ("kv_push_failures", "Pushes that failed"),
    "push_fallbacks": ("kv_push_fallbacks", "Pushes that went by another path, because the best one had failed lately"),
    "push_verified": ("kv_push_verified_blocks", "Pushed blocks whose checksum was compared (push.verify)"),
    "push_corrupt": ("kv_push_corrupt_blocks", "Pushed blocks that differed from what was sent (push.verify)"),
    "index_gaps": ("router_index_gaps", "Gaps in the workers' state streams; each is healed by a snapshot"),
    "index_mismatches": (
        "router_index_mismatches",
        "Updates after which the index had other blocks of a worker than the worker itself; healed by a snapshot",
    ),
    "index_snapshots": ("router_index_snapshots", "Snapshots of workers' blocks that were taken in: one a worker, if nothing is missed"),
    "evicted": ("kvstore_evicted_keys", "Blocks that the pool evicted"),
    "evicted_bytes": ("kvstore_evicted_bytes", "Bytes that the pool evicted"),
    "refused": ("kvstore_failed_puts", "Puts for which the pool had no room"),
    "replicated": ("kvstore_replicated_keys", "Blocks that were read often and got a second replica"),
    "master_restarts": ("kvstore_master_restarts", "How often mooncake_master was started again"),
}


class _Totals(Collector):
    """Counters that somebody else counts, read when they are asked for."""

    def __init__(self, read: Callable[[], Mapping[str, float]], labels: Mapping[str, str]) -> None:
        self._read, self._labels = read, labels

    def collect(self) -> Iterator[Metric]:
        for key, value in self._read().items():
            name, help = _TOTALS.get(key, (f"kv_{key}", key.replace("_", " ")))
            family = CounterMetricFamily(f"baton:{name}", help, labels=[*self._labels])
            family.add_metric([*self._labels.values()], value)
            yield family


class _Exported(Collector):
    """A registry's samples, and those that vLLM has too under its names as well."""

    def __init__(self, registry: CollectorRegistry, twins: Set[str]) -> None:
        self._registry, self._twins = registry, twins

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            yield family
            if family.name.removeprefix("baton:") in self._twins:
                twin = Metric(family.name.replace("baton:", "vllm:"), family.documentation, family.type)
                twin.samples = [sample._replace(name=sample.name.replace("baton:", "vllm:")) for sample in family.samples]
                yield twin


class Metrics:
    """What every process has: constant labels `model_name` and `worker`, and `registry`, which is what gets exported."""

    def __init__(self, model: str, worker: str, twins: Set[str] = frozenset()) -> None:
        """`twins`: what is exported under vLLM's name too."""
        self._own = CollectorRegistry()
        self.registry = CollectorRegistry()
        self.registry.register(_Exported(self._own, twins))
        self._labels = {"model_name": model, "worker": worker}

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A value that is read when somebody asks."""
        Gauge(f"baton:{name}", help, [*self._labels], registry=self._own).labels(**self._labels).set_function(read)

    def totals(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Values that only grow, by name, counted elsewhere; each becomes a counter."""
        self._own.register(_Totals(read, self._labels))

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"baton:{name}", help, [*self._labels, *labels], registry=self._own)

    def histogram(self, name: str, help: str, buckets: Sequence[float] = _LATENCY) -> Histogram:
        family = Histogram(f"baton:{name}", help, [*self._labels], buckets=buckets, registry=self._own)
        return family.labels(**self._labels)

    def labelled(self, family: Counter, **labels: str) -> Counter:
        return family.labels(**self._labels, **labels)

    def families(self) -> list[Metric]:
        return list(self._own.collect())

    def exposition(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)


_TIERS = {  # of each tier of KV: counters, and two gauges
    "blocks_loaded": "KV blocks fetched from the tier",
    "blocks_missed": "KV blocks that the tier could not give, though it had been said to hold them",
    "blocks_declined": "KV blocks found in the tier, but computed, which was predicted to be faster",
    "blocks_saved": "KV blocks saved to the tier",
    "blocks_refused": "KV blocks that the tier did not take",
    "blocks_left_out": "KV blocks not saved to the tier, since too many others waited for that",
    "bytes_loaded": "Bytes fetched from the tier",
    "bytes_saved": "Bytes saved to the tier",
    "seconds_loading": "Seconds of fetching from the tier",
    "seconds_saving": "Seconds of saving to the tier",
    "failures": "Calls to the tier that failed",
    "skipped": "Calls to the tier that were not made, since it failed, hung or was behind",
    "evictions": "KV blocks that the tier dropped to keep its budget",
    "damaged": "KV blocks whose content was not what had been saved, and which were dropped",
    "used_bytes": "Bytes that the tier's KV blocks take",
    "capacity_bytes": "Budget of the tier",
}


class _Tiers(Collector):
    def __init__(self, labels: Mapping[str, str], read: Mapping[str, Callable[[], Mapping[str, float]]]) -> None:
        self._labels, self._read = labels, read

    def collect(self) -> Iterator[Metric]:
        values = {tier: read() for tier, read in self._read.items()}
        for name, text in _TIERS.items():
            kind = GaugeMetricFamily if name in ("used_bytes", "capacity_bytes") else CounterMetricFamily
            family = kind(f"baton:kv_tier_{name}", text, labels=[*self._labels, "tier"])
            for tier in values:
                if name in values[tier]:
                    family.add_metric([*self._labels.values(), tier], values[tier][name])
            yield family


class WorkerMetrics(Metrics):
    """Of a prefill, decode or unified worker."""

    def __init__(
        self,
        model: str,
        worker: str,
        read_load: Callable[[], Load],
        read_transfer: Callable[[], dict[str, float]],
        pushed: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """`pushed`: bytes, seconds and failures of direct pushes, which grow."""
        super().__init__(model, worker, _WORKER_TWINS)
        self.gauge("num_requests_running", "Requests that hold KV blocks", lambda: read_load().num_running)
        self.gauge("num_requests_waiting", "Requests that are queued or loading KV", lambda: read_load().num_waiting)
        self.gauge("kv_cache_usage_perc", "Share of KV blocks in use (1 is full)", lambda: _usage(read_load()))
        self.gauge("kv_blocks_cached", "KV blocks that the prefix cache can find", lambda: read_load().blocks_cached)
        self.totals(read_transfer)
        if pushed is not None:
            self.totals(pushed)
        self.prompt_tokens = self.labelled(self.counter("prompt_tokens", "Prompt tokens taken"))
        self.generation_tokens = self.labelled(self.counter("generation_tokens", "Tokens generated"))
        self.prefix_cache_queries = self.labelled(self.counter("prefix_cache_queries", "Prompt tokens looked up in caches"))
        self.prefix_cache_hits = self.labelled(self.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache or the pool"))
        self._prefills = self.counter("prefills", "How decode requests got their prompt computed", "way")
        self.step_seconds = self.histogram("step_seconds", "Duration of an engine step")

    def tiers(self, read: Mapping[str, Callable[[], Mapping[str, float]]]) -> None:
        """Of each tier of KV, by its name: how to read its totals."""
        self._own.register(_Tiers(self._labels, read))

    def prefill(self, way: str) -> None:
        """`way`: local, remote, or fallback (a prefill worker was lost and the rest computed here)."""
        self.labelled(self._prefills, way=way).inc()


class RouterMetrics(Metrics):
    def __init__(self, model: str) -> None:
        super().__init__(model, "router", _ROUTER_TWINS)
        self.time_to_first_token = self.histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.inter_token_latency = self.histogram("inter_token_latency_seconds", "Between two tokens of a stream")
        self.e2e_request_latency = self.histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.prompt_tokens = self.labelled(self.counter("prompt_tokens", "Prompt tokens of finished requests"))
        self.cached_tokens = self.labelled(self.counter("cached_tokens", "Prompt tokens that nobody had to compute"))
        self.generation_tokens = self.labelled(self.counter("generation_tokens", "Tokens generated"))
        self.arrived_prompt_tokens = self.histogram(
            "arrived_prompt_tokens", "Prompt tokens of each sequence that was asked for, let in or not", TOKEN_BUCKETS
        )
        self.migrations = self.labelled(self.counter("migrations", "Sequences continued on another worker"))
        self._hedges = self.counter("hedges", "Sequences sent to a second worker too, their first token being late", "result")
        self._prediction = self.histogram("ttft_prediction_error", "|predicted - actual| / actual time to first token", _ERROR)
        self._cache_prediction = self.histogram("cached_tokens_prediction_error", "|predicted - actual| cached / prompt tokens", _ERROR)
        self._success = self.counter("request_success", "Finished requests", "finished_reason")
        self._failures = self.counter("request_failures", "Requests that failed, or asked for what cannot be", "code")
        self.queue_seconds = self.histogram("request_queue_seconds", "Time that requests had to wait in the router's queue, if any")
        self._refused = self.counter("requests_refused", "Requests that were not let in, by reason and tenant", "reason", "tenant")
        self.queued: Callable[[], int] = lambda: 0  # called on any thread; the two below are set now and then by who knows
        self.degraded = False
        self.num_breakers_open = 0
        self.index: Mapping[str, float] = {"index_gaps": 0, "index_mismatches": 0, "index_snapshots": 0}
        self.totals(lambda: self.index)
        self.gauge("num_requests_queued", "Requests that wait in the router's queue", lambda: self.queued())
        self.gauge("degraded", "1 while decode workers compute all prompts: no prefill worker is there", lambda: self.degraded)
        self.gauge("breakers_open", "Workers left alone, having failed request after request", lambda: self.num_breakers_open)

    def predicted(self, predicted_s: float | None, actual_s: float, predicted_share: float, actual_share: float) -> None:
        """Time to the first token, if it was predicted, and the share of the prompt that nobody had to compute."""
        if predicted_s is not None:
            self._prediction.observe(abs(predicted_s - actual_s) / actual_s if actual_s > 0 else 0.0)
        self._cache_prediction.observe(abs(predicted_share - actual_share))

    def hedged(self, result: str) -> None:
        """`result`: won (the second worker went on with it), lost (the first one did, or nobody waited any more) or failed (the second)."""
        self.labelled(self._hedges, result=result).inc()

    def success(self, reason: str) -> None:
        self.labelled(self._success, finished_reason=reason).inc()

    def refused(self, error: BatonError, reason: str, tenant: str) -> None:
        """`reason`: key, rate, ttft, itl, full, wait or workers. Such an error is no failure as well."""
        self.labelled(self._refused, reason=reason, tenant=tenant).inc()
        error.counted = True

    def failure(self, error: BatonError) -> None:
        """Whoever meets an error may call this: each is counted once."""
        if not error.counted:
            self.failed(error.code)
            error.counted = True

    def failed(self, code: str) -> None:
        self.labelled(self._failures, code=code).inc()


class KVStoreMetrics(Metrics):
    """Of the pool as a whole, as its master counts it; `state` is set whenever it was asked. A new master counts from zero."""

    def __init__(self, name: str) -> None:
        super().__init__("", name)
        self.state = PoolState()
        self.gauge("kvstore_up", "1 while a master answers", lambda: self.state.up)
        self.gauge("kvstore_leader", "1 if the master that was asked leads, 0 if it stands by", lambda: self.state.leads)
        self.gauge("kvstore_capacity_bytes", "Memory lent to the pool", lambda: self.state.capacity_bytes)
        self.gauge("kvstore_used_bytes", "Memory of the pool in use", lambda: self.state.used_bytes)
        self.gauge("kvstore_keys", "Blocks in the pool", lambda: self.state.num_keys)
        self.gauge("kvstore_nodes", "Nodes that lend memory", lambda: len(self.state.segments))
        self.totals(self._counts)

    def _counts(self) -> dict[str, float]:
        return {
            "evicted": self.state.num_evicted,
            "evicted_bytes": self.state.bytes_evicted,
            "refused": self.state.num_refused,
            "replicated": self.state.num_replicated,
        }


def serve_metrics(metrics: Metrics, host: str, port: int, ready: Callable[[], bool]) -> tuple[WSGIServer, int]:
    """Serves /metrics on a thread of its own, and two paths that answer 200 or 503: /ready, what `ready` says; /health, whether it says
    anything. The server (to shut down) and the port it got (`port` 0 takes a free one). Raises OSError."""

    server, _ = start_http_server(port, host, metrics.registry)
    exporter = server.get_app()
    assert exporter is not None

    def answer(environ: dict[str, Any], start_response: "StartResponse") -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in ("/health", "/ready"):
            return exporter(environ, start_response)
        try:
            well = ready() or path == "/health"
        except Exception:  # no answer in time, or nobody left to ask
            well = False
        start_response("200 OK" if well else "503 Service Unavailable", [("content-type", "text/plain")])
        return [b"yes\n" if well else b"no\n"]

    server.set_app(answer)
    return server, int(server.server_address[1])


def _usage(load: Load) -> float:
    return 1 - load.blocks_free / load.blocks_total if load.blocks_total else 0.0


def catalogue() -> dict[str, list[Metric]]:
    """Every metric that a process can export, by the kind of process: what dashboards, alerts and their tests go by."""
    totals = {key: 0.0 for key, (name, _) in _TOTALS.items() if not name.startswith("kvstore_")}
    worker, router, kvstore = WorkerMetrics("", "", Load, lambda: totals), RouterMetrics(""), KVStoreMetrics("")
    worker.tiers({"host": lambda: dict.fromkeys(_TIERS, 0.0)})
    kvstore.totals(lambda: {"master_restarts": 0.0})
    return {"router": router.families(), "worker": worker.families(), "kvstore": kvstore.families()}
