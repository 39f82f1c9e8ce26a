"""Prometheus metrics: vLLM's names for what both have, so that its dashboards and autoscalers work, ``tars_`` for the rest.

One `Telemetry` and one registry per server; nothing is global. What requests experience is observed as they run, from the engines'
threads; what engines count themselves is read when somebody asks.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from api.models import Loaded
    from tars_jax.engine.request import Output, Usage
    from tars_jax.engine.responses import ResponseCache
    from tars_jax.engine.stats import EngineStats
    from tars_jax.engine.stats import Histogram as Counts

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Time from arrival to the first token", _LATENCY),
    "vllm:inter_token_latency_seconds": ("Time between tokens of an answer", _PER_TOKEN),
    "vllm:request_time_per_output_token_seconds": ("Mean time of a request's tokens after the first", _PER_TOKEN),
    "vllm:e2e_request_latency_seconds": ("Time from arrival to the last token", _LATENCY),
    "vllm:request_queue_time_seconds": ("Time a request waited in the engine's queue", _LATENCY),
    "vllm:request_prefill_time_seconds": ("Time from the first step of a request to its first token", _LATENCY),
    "vllm:request_decode_time_seconds": ("Time from the first token of a request to its last", _LATENCY),
    "vllm:request_inference_time_seconds": ("Time from the first step of a request to its last token", _LATENCY),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request", _TOKENS),
}
_COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens of requests that ended",
    "vllm:generation_tokens": "Tokens generated",
    "vllm:prompt_tokens_cached": "Prompt tokens whose KV pages were reused",
}
_REPEATS = {
    "tars_response_cache_hits": "Requests answered from the response cache",
    "tars_response_cache_misses": "Requests that the response cache could have answered and did not",
}
_REASONS = {"cancelled": "abort"}  # vLLM's word

_Read = Callable[["EngineStats"], float]
_ENGINE_GAUGES: dict[str, tuple[str, _Read]] = {
    "vllm:num_requests_running": ("Requests being computed", lambda s: s.running),
    "vllm:num_requests_waiting": ("Requests waiting in the engine", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": ("Share of the KV pages in use, 0 to 1", lambda s: 1 - s.free_pages / max(s.num_pages - 1, 1)),
    "tars_prefix_cache_pages": ("Free KV pages that still hold a known prefix", lambda s: s.kept_pages),
    "tars_model_memory_bytes": ("Bytes of weights and KV cache", lambda s: s.nbytes),
    "tars_weights_version": ("1 at first, one more with every change of the weights", lambda s: s.weights_version),
    "tars_compiled_steps": ("Step sizes that are compiled", lambda s: len(s.compiled_steps)),
}
_ENGINE_COUNTERS: dict[str, tuple[str, _Read]] = {
    "vllm:num_preemptions": ("Requests that lost their row or pages to others", lambda s: s.preemptions),
    "vllm:prefix_cache_queries": ("Prompt tokens looked for in the prefix cache", lambda s: s.reused_tokens + s.missed_tokens),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache", lambda s: s.reused_tokens),
    "tars_prefix_cache_evicted_pages": ("KV pages with a known prefix that were given to others", lambda s: s.evicted_pages),
    "vllm:spec_decode_num_draft_tokens": ("Tokens guessed and checked", lambda s: s.drafted_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Guessed tokens that came true", lambda s: s.accepted_tokens),
    "tars_step_failures": ("Steps that failed", lambda s: s.failures),
    "tars_compilations": ("Steps compiled, or loaded from the compilation cache", lambda s: s.compilations),
    "tars_compilation_seconds": ("Time spent on that", lambda s: s.compile_seconds),
}
_ENGINE_HISTOGRAMS: dict[str, tuple[str, Callable[["EngineStats"], "Counts"]]] = {
    "vllm:iteration_tokens_total": ("Tokens of a step", lambda s: s.step_token_counts),
    "tars_step_rows": ("Requests in a step", lambda s: s.step_row_counts),
    "tars_step_seconds": ("Time of a step", lambda s: s.step_seconds),
}


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
        self._models: dict[str, _ModelMetrics] = {}

    def watch(self, loaded: "Callable[[], Iterable[Loaded]]", waiting: Callable[[], int], responses: "ResponseCache") -> None:
        """Report the state of these models, and of the answers kept, at every scrape."""
        self.registry.register(_Engines(loaded, waiting, responses))

    def model_loaded(self, model: str, seconds: float) -> None:
        self._loads.labels(model).observe(seconds)

    def response_cache(self, model: str, *, is_hit: bool) -> None:
        self._counters["tars_response_cache_hits" if is_hit else "tars_response_cache_misses"].labels(model).inc()

    def finished(self, model: str, reason: str) -> None:
        """Count a request that ended, however it was answered."""
        self._finished.labels(model, _REASONS.get(reason, reason)).inc()

    def recorder(self, model: str) -> "Recorder":
        """For one request, from now."""
        if model not in self._models:
            self._models[model] = _ModelMetrics(model, self._histograms, self._counters)
        return Recorder(self, model, self._models[model])

    def render(self) -> bytes:
        """The text of GET /metrics."""
        return generate_latest(self.registry)


class _ModelMetrics:
    """A model's series, looked up once and not for every token."""

    def __init__(self, model: str, histograms: dict[str, Histogram], counters: dict[str, Counter]) -> None:
        self._histograms = {name: histogram.labels(model) for name, histogram in histograms.items()}
        self.counters = {name: counter.labels(model) for name, counter in counters.items()}
        self.generated = self.counters["vllm:generation_tokens"]
        self.first_token = self._histograms["vllm:time_to_first_token_seconds"]
        self.inter_token = self._histograms["vllm:inter_token_latency_seconds"]

    def ended(self, seconds: float, usage: "Usage | None") -> None:
        """Observe a request that ended ``seconds`` after its arrival."""
        observed = {"vllm:e2e_request_latency_seconds": seconds}
        if usage is not None:
            self.counters["vllm:prompt_tokens"].inc(usage.prompt_tokens)
            self.counters["vllm:prompt_tokens_cached"].inc(usage.cached_tokens)
            observed |= _measures(usage)
        for name, value in observed.items():
            self._histograms[name].observe(value)


def _measures(usage: "Usage") -> dict[str, float]:
    measures: dict[str, float] = {
        "vllm:request_queue_time_seconds": usage.queue_seconds,
        "vllm:request_prefill_time_seconds": usage.prefill_seconds,
        "vllm:request_decode_time_seconds": usage.decode_seconds,
        "vllm:request_inference_time_seconds": usage.prefill_seconds + usage.decode_seconds,
        "vllm:request_prompt_tokens": usage.prompt_tokens,
        "vllm:request_generation_tokens": usage.output_tokens,
    }
    if usage.output_tokens > 1:
        measures["vllm:request_time_per_output_token_seconds"] = usage.decode_seconds / (usage.output_tokens - 1)
    return measures


class Recorder:
    """Watches the outputs of one request, from the engine's thread."""

    def __init__(self, telemetry: Telemetry, model: str, metrics: _ModelMetrics) -> None:
        self._telemetry, self._model, self._metrics = telemetry, model, metrics
        self._started = time.monotonic()
        self._last_token: float | None = None
        self._tokens = 0

    def output(self, output: "Output") -> None:
        now = time.monotonic()
        if count := len(output.token_ids):
            if self._last_token is None:
                self._metrics.first_token.observe(now - self._started)
            else:
                self._metrics.inter_token.observe((now - self._last_token) / count)
            self._metrics.generated.inc(count)
            self._last_token = now
            self._tokens += count
        if output.finish_reason is not None:
            if output.usage is not None:  # an end token is generated too, but not put out
                self._metrics.generated.inc(max(output.usage.output_tokens - self._tokens, 0))
            self._telemetry.finished(self._model, output.finish_reason)
            self._metrics.ended(now - self._started, output.usage)


class _Engines(Collector):
    """What the engines count, read when somebody asks."""

    def __init__(self, loaded: "Callable[[], Iterable[Loaded]]", waiting: Callable[[], int], responses: "ResponseCache") -> None:
        self._loaded, self._waiting, self._responses = loaded, waiting, responses

    def collect(self) -> Iterator[Metric]:
        label = ["model_name"]
        entries = [(entry.name, entry.engine.config.page_size, entry.engine.stats()) for entry in self._loaded()]
        for name, (text, read) in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=label)
            for model, _, stats in entries:
                gauge.add_metric([model], read(stats))
            yield gauge
        for name, (text, read) in _ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=label)
            for model, _, stats in entries:
                counter.add_metric([model], read(stats))
            yield counter
        for name, (text, counts) in _ENGINE_HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=label)
            for model, _, stats in entries:
                histogram.add_metric([model], _buckets(counts(stats)), counts(stats).total)
            yield histogram
        cache = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache", labels=[*label, "block_size", "num_gpu_blocks"])
        for model, page_size, stats in entries:
            cache.add_metric([model, str(page_size), str(stats.num_pages)], 1)
        yield cache
        yield GaugeMetricFamily("tars_requests_waiting_for_load", "Requests waiting for a model to load", value=self._waiting())
        yield GaugeMetricFamily("tars_response_cache_bytes", "Bytes of answers kept for repetitions", value=self._responses.nbytes)


def _buckets(counts: "Counts") -> list[tuple[str, float]]:
    """Prometheus' cumulative buckets."""
    bounds = [*map(str, map(float, counts.bounds)), "+Inf"]
    return list(zip(bounds, map(float, itertools.accumulate(counts.counts)), strict=True))
