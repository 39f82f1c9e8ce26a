"""Prometheus metrics: vLLM's names for what both have, so that its dashboards and autoscalers work, ``tars_`` for the rest.

One `Telemetry` and one registry per server; nothing is global. Observations come from the engine's threads.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from api.models import Loaded
    from tars_jax.engine.request import Output, Usage
    from tars_jax.engine.responses import ResponseCache

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Time from arrival to the first token", _LATENCY),
    "vllm:inter_token_latency_seconds": ("Time between tokens of an answer", _LATENCY),
    "vllm:e2e_request_latency_seconds": ("Time from arrival to the last token", _LATENCY),
    "vllm:request_queue_time_seconds": ("Time a request waited in the engine's queue", _LATENCY),
    "vllm:request_prefill_time_seconds": ("Time from the first step of a request to its first token", _LATENCY),
    "vllm:request_decode_time_seconds": ("Time from the first token of a request to its last", _LATENCY),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request", _TOKENS),
}
_COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens processed",
    "vllm:generation_tokens": "Tokens generated",
    "vllm:prompt_tokens_cached": "Prompt tokens whose KV pages were reused",
}
_REPEATS = {
    "tars_response_cache_hits": "Requests answered from the response cache",
    "tars_response_cache_misses": "Requests that the response cache could have answered and did not",
}
_REASONS = {"cancelled": "abort"}  # vLLM's word


class Telemetry:
    """The metrics of one server. ``watch`` tells it where the loaded models are found when it is scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        label = ["model_name"]
        self._histograms = {
            name: Histogram(name, text, label, registry=self.registry, buckets=buckets) for name, (text, buckets) in _HISTOGRAMS.items()
        }
        counters = (_COUNTERS | _REPEATS).items()
        self._counters = {name: Counter(name, text, label, registry=self.registry) for name, text in counters}
        self._finished = Counter("vllm:request_success", "Requests ended", [*label, "finished_reason"], registry=self.registry)
        self._loads = Histogram(
            "tars_model_load_seconds", "Time to load a model", label, registry=self.registry, buckets=(0.5, 1, 2, 5, 10, 30, 60, 300)
        )

    def watch(self, loaded: "Callable[[], Iterable[Loaded]]", waiting: Callable[[], int], responses: "ResponseCache") -> None:
        """Report the state of these models, and of the answers kept, at every scrape."""
        self.registry.register(_Engines(loaded, waiting, responses))

    def model_loaded(self, model: str, seconds: float) -> None:
        self._loads.labels(model).observe(seconds)

    def response_cache(self, model: str, *, is_hit: bool) -> None:
        self._counters["tars_response_cache_hits" if is_hit else "tars_response_cache_misses"].labels(model).inc()

    def recorder(self, model: str) -> "Recorder":
        """For one request, from now."""
        return Recorder(self, model)

    def observe(self, name: str, model: str, value: float) -> None:
        self._histograms[name].labels(model).observe(value)

    def finished(self, model: str, reason: str, usage: "Usage | None") -> None:
        self._finished.labels(model, _REASONS.get(reason, reason)).inc()
        if usage is None:
            return
        self._counters["vllm:prompt_tokens"].labels(model).inc(usage.prompt_tokens)
        self._counters["vllm:generation_tokens"].labels(model).inc(usage.output_tokens)
        self._counters["vllm:prompt_tokens_cached"].labels(model).inc(usage.cached_tokens)
        self.observe("vllm:request_queue_time_seconds", model, usage.queue_seconds)
        self.observe("vllm:request_prefill_time_seconds", model, usage.prefill_seconds)
        self.observe("vllm:request_decode_time_seconds", model, usage.decode_seconds)
        self.observe("vllm:request_prompt_tokens", model, usage.prompt_tokens)
        self.observe("vllm:request_generation_tokens", model, usage.output_tokens)

    def render(self) -> bytes:
        """The text of GET /metrics."""
        return generate_latest(self.registry)


class Recorder:
    """Watches the outputs of one request."""

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        self._telemetry, self._model = telemetry, model
        self._started = time.monotonic()
        self._last_token: float | None = None

    def output(self, output: "Output") -> None:
        now = time.monotonic()
        if count := len(output.token_ids):
            if self._last_token is None:
                self._telemetry.observe("vllm:time_to_first_token_seconds", self._model, now - self._started)
            else:
                self._telemetry.observe("vllm:inter_token_latency_seconds", self._model, (now - self._last_token) / count)
            self._last_token = now
        if output.finish_reason is not None:
            self._telemetry.observe("vllm:e2e_request_latency_seconds", self._model, now - self._started)
            self._telemetry.finished(self._model, output.finish_reason, output.usage)


class _Engines(Collector):
    """Gauges read from the engines when somebody asks."""

    def __init__(self, loaded: "Callable[[], Iterable[Loaded]]", waiting: Callable[[], int], responses: "ResponseCache") -> None:
        self._loaded, self._waiting, self._responses = loaded, waiting, responses

    def collect(self) -> Iterator[Metric]:
        label = ["model_name"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests being computed", labels=label)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests waiting in the engine", labels=label)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", labels=label)
        cache = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache", labels=[*label, "block_size", "num_gpu_blocks"])
        memory = GaugeMetricFamily("tars_model_memory_bytes", "Bytes of weights and KV cache", labels=label)
        for entry in self._loaded():
            stats = entry.engine.stats()
            running.add_metric([entry.name], stats.running)
            waiting.add_metric([entry.name], stats.waiting)
            usage.add_metric([entry.name], 1 - stats.free_pages / max(stats.num_pages, 1))
            cache.add_metric([entry.name, str(entry.engine.config.page_size), str(stats.num_pages)], 1)
            memory.add_metric([entry.name], stats.nbytes)
        loads = GaugeMetricFamily("tars_requests_waiting_for_load", "Requests waiting for a model to load", value=self._waiting())
        kept = GaugeMetricFamily("tars_response_cache_bytes", "Bytes of answers kept for repetitions", value=self._responses.nbytes)
        yield from (running, waiting, usage, cache, memory, loads, kept)
