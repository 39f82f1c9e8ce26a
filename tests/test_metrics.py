"""What is counted: by the engine itself, and by the server from what its requests experience."""

import asyncio
import bisect
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import FakeLoader, FakeModel, make_store
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.models import Models
from api.settings import Settings
from api.telemetry import Telemetry
from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.engine.request import Output, Usage
from tars_jax.engine.scheduler import Span
from tars_jax.engine.stats import Distribution, Histogram, Meter
from tests.tiny import tiny_model

MODEL = "fake:latest"


def scrape(tmp_path: Path, loader: FakeLoader, counted: dict[str, Any] | None = None) -> dict[tuple[str, str], float]:
    """(series, the value of its last label) of /metrics after one answer."""

    async def run() -> str:
        models = Models(make_store(tmp_path), Settings(), load=loader.load, make_engine=loader.make_engine)
        transport = httpx.ASGITransport(create_app(models.settings, models))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.post("/api/generate", json={"model": "fake", "prompt": "hi", "stream": False})
            loader.engines[0].counted = counted or {}
            text = (await client.get("/metrics")).text
        await models.close()
        return text

    samples = [sample for family in text_string_to_metric_families(asyncio.run(run())) for sample in family.samples]
    found = {}
    for sample in samples:
        assert sample.labels.pop("model_name", MODEL) == MODEL
        found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


@given(st.lists(st.floats(0, 200), max_size=50))
def test_a_distribution_counts_every_value_once(values: list[float]) -> None:
    bounds = (1.0, 2.0, 50.0)
    distribution = Distribution(bounds)
    for value in values:
        distribution.observe(value)
    counts = Counter(bisect.bisect_left(bounds, value) for value in values)
    found = distribution.snapshot()
    assert found == Histogram(bounds, tuple(counts[i] for i in range(4)), found.total)
    assert found.total == pytest.approx(sum(values))


def test_bounds_belong_to_the_bucket_below() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.5):
        distribution.observe(value)
    assert distribution.snapshot().counts == (1, 2, 1)


def span(start: int, count: int) -> Span:
    return Span(SimpleNamespace(prompt_length=38), start, count, samples=True)  # type: ignore[arg-type]


def test_the_meter_counts_steps_and_compilations() -> None:
    meter = Meter()
    long, short = (span(0, 38), span(38, 1), span(38, 1)), (span(39, 1),) * 3
    seconds = [meter.step(long, 64, sent=time.perf_counter() - 0.5), meter.step(short, 4, sent=0.0, steps=4)]
    meter.compiled(1.5)
    meter.compiled(0.5)
    numbers = meter.numbers()
    assert (numbers["compilations"], numbers["compile_seconds"]) == (2, 2.0)
    assert [sum(numbers[name].counts) for name in ("step_seconds", "step_token_counts", "step_row_counts")] == [5, 5, 5]
    assert numbers["step_seconds"].total == pytest.approx(sum(seconds))
    assert 0 < seconds[1] < 0.5 <= seconds[0]  # a step cannot begin before the one before it was read
    assert (numbers["step_token_counts"].total, numbers["step_row_counts"].total) == (40 + 4 * 3, 3 + 4 * 3)
    assert {name: numbers[name] for name in ("steps", "step_rows", "step_tokens")} == {"steps": 5, "step_rows": 15, "step_tokens": 52}
    assert numbers["prompt_tokens"] == 38  # of 38


def test_how_long_a_step_takes_is_not_learned_from_one_that_compiled() -> None:
    meter = Meter()
    meter.compiled(3.0)
    meter.step((span(0, 4),), 4, sent=time.perf_counter() - 3)
    assert meter.times.predict(4) == 0
    seconds = meter.step((span(4, 1),), 4, sent=0.0)
    assert meter.times.predict(4) == seconds < 1


def test_an_engine_counts_its_steps() -> None:
    engine = Engine(tiny_model(), EngineConfig(max_context=128, max_rows=4, max_step_tokens=32))
    list(engine.generate("hello" * 10, SamplingParams(max_tokens=5, temperature=0)))
    engine.close()
    stats = engine.stats()
    assert sum(stats.step_seconds.counts) == sum(stats.step_row_counts.counts) == stats.steps
    assert (stats.step_token_counts.total, stats.step_row_counts.total) == (stats.step_tokens, stats.step_rows)
    assert stats.step_seconds.total > 0
    assert stats.compilations >= len(stats.compiled_steps) >= 1
    assert stats.compile_seconds > 0


COUNTED = {
    "kept_pages": 3,
    "evicted_pages": 4,
    "drafted_tokens": 20,
    "accepted_tokens": 15,
    "reused_tokens": 48,
    "missed_tokens": 52,
    "failures": 1,
    "preemptions": 2,
    "compilations": 7,
    "compile_seconds": 1.5,
    "step_seconds": Histogram((0.1, 0.2), (5, 1, 2), 9.5),
}


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:kv_cache_usage_perc", 0.2),  # 8 of 10 pages are free; page 0 is nobody's
        ("vllm:num_preemptions_total", 2),
        ("vllm:prefix_cache_queries_total", 100),
        ("vllm:prefix_cache_hits_total", 48),
        ("vllm:spec_decode_num_draft_tokens_total", 20),
        ("vllm:spec_decode_num_accepted_tokens_total", 15),
        ("tars_prefix_cache_pages", 3),
        ("tars_prefix_cache_evicted_pages_total", 4),
        ("tars_step_failures_total", 1),
        ("tars_compilations_total", 7),
        ("tars_compilation_seconds_total", 1.5),
        ("tars_compiled_steps", 2),
        ("tars_weights_version", 1),
        ("tars_model_memory_bytes", 1500),
        ("tars_step_seconds_count", 8),
        ("tars_step_seconds_sum", 9.5),
    ],
)
def test_what_an_engine_counts_is_shown(metrics: dict[tuple[str, str], float], series: str, value: float) -> None:
    assert metrics[series, ""] == pytest.approx(value)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    return scrape(tmp_path_factory.mktemp("store"), FakeLoader(), COUNTED)


def test_histograms_are_cumulative(metrics: dict[tuple[str, str], float]) -> None:
    assert [metrics["tars_step_seconds_bucket", bound] for bound in ("0.1", "0.2", "+Inf")] == [5, 6, 8]


@pytest.mark.parametrize(  # those of vLLM's own dashboards
    "name",
    [
        *("vllm:e2e_request_latency_seconds_count", "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count"),
        *("vllm:request_time_per_output_token_seconds_count", "vllm:request_prompt_tokens_count", "vllm:request_generation_tokens_count"),
        *("vllm:request_queue_time_seconds_count", "vllm:request_prefill_time_seconds_count", "vllm:request_decode_time_seconds_count"),
        *("vllm:iteration_tokens_total_count", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    ],
)
def test_vllms_dashboards_find_their_series(metrics: dict[tuple[str, str], float], name: str) -> None:
    assert (name, "") in metrics


def test_tokens_are_counted_as_they_come_and_the_end_token_at_the_end() -> None:
    telemetry = Telemetry()
    recorder = telemetry.recorder("m")

    def generated() -> float:
        return telemetry.registry.get_sample_value("vllm:generation_tokens_total", {"model_name": "m"}) or 0.0

    recorder.output(Output(text="a", token_ids=(1,)))
    recorder.output(Output(text="bc", token_ids=(2, 3)))
    assert generated() == 3
    recorder.output(Output(finish_reason="stop", usage=Usage(prompt_tokens=7, output_tokens=4, cached_tokens=5)))
    assert generated() == 4
    assert telemetry.registry.get_sample_value("vllm:prompt_tokens_cached_total", {"model_name": "m"}) == 5
    assert telemetry.registry.get_sample_value("vllm:request_generation_tokens_sum", {"model_name": "m"}) == 4


@pytest.mark.parametrize(
    ("model", "reason"), [(FakeModel(), "stop"), (FakeModel(timeout_after=2), "timeout"), (FakeModel(error="x"), "error")]
)
def test_requests_are_counted_by_how_they_ended(tmp_path: Path, model: FakeModel, reason: str) -> None:
    assert scrape(tmp_path, FakeLoader(model))["vllm:request_success_total", reason] == 1
