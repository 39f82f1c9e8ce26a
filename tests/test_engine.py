"""What an engine promises whatever the model: streams survive new weights and other requests' failures."""

import queue
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.errors import InvalidRequest, ServerBusy, TarsError
from tars_jax.quant import LowRank
from tests.tiny import tiny_model

GREEDY = SamplingParams(max_tokens=12, temperature=0)
CONFIG = EngineConfig(max_context=128, max_rows=4, max_step_tokens=32)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    engine = Engine(model, CONFIG)
    yield engine
    engine.close()


def text(engine: Engine, prompt: str, params: SamplingParams = GREEDY) -> str:
    return "".join(engine.generate(prompt, params))


def start(engine: Engine, prompt: str, params: SamplingParams) -> "queue.SimpleQueue[Output]":
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    engine.submit(Request(new_request_id(), tuple(engine.model.tokenizer.encode(prompt)), params, outputs.put))
    return outputs


def finish(outputs: "queue.SimpleQueue[Output]") -> list[Output]:
    found = [outputs.get(timeout=60)]
    while not found[-1].finish_reason:
        found.append(outputs.get(timeout=60))
    return found


def test_new_weights_give_new_answers_and_a_new_version(engine: Engine) -> None:
    other = tiny_model(seed=1)
    before = text(engine, "hello")
    assert engine.swap(other.params) == 2
    fresh = Engine(other, CONFIG)
    assert text(engine, "hello") == text(fresh, "hello") != before
    fresh.close()
    assert engine.swap(engine.model.params) == engine.stats().weights_version == 3
    assert text(engine, "hello") == before


def test_a_swap_drops_no_stream(engine: Engine) -> None:
    outputs = start(engine, "hello", SamplingParams(max_tokens=100, temperature=0))
    outputs.get(timeout=60)
    engine.swap(tiny_model(seed=1).params)
    done = finish(outputs)
    assert done[-1].finish_reason == "length"
    assert done[-1].usage is not None
    assert done[-1].usage.output_tokens == 100


def test_weights_of_another_model_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="another model"):
        engine.swap(tiny_model(hidden_size=32, head_dim=8).params)
    assert engine.stats().weights_version == 1


def test_requests_outside_a_failed_step_go_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, EngineConfig(max_context=128, max_rows=1, max_step_tokens=32))
    expected = text(engine, "hello")
    dispatch = engine._dispatch

    def fail(plan: Any) -> Any:
        if len(plan[0].sequence.request.prompt_ids) == 3:
            raise RuntimeError("a broken row")
        return dispatch(plan)

    monkeypatch.setattr(engine, "_dispatch", fail)
    streams = [start(engine, prompt, GREEDY) for prompt in ("hello", "bad", "hello")]
    first, second, third = (finish(stream) for stream in streams)
    engine.close()
    assert engine.stats().failures == 1
    assert second[-1].error == "the engine failed: a broken row"
    for outputs in (first, third):
        assert "".join(output.text for output in outputs) == expected


def test_running_out_of_memory_makes_steps_smaller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text(engine, "hello" * 6)
    dispatch = engine._dispatch

    def fail(plan: Any) -> Any:
        if sum(span.count for span in plan) > 16:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")
        return dispatch(plan)

    monkeypatch.setattr(engine, "_dispatch", fail)
    assert text(engine, "hello" * 6) == expected


def test_memory_that_is_not_enough_for_the_smallest_step_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(engine, "_dispatch", fail)
    with pytest.raises(TarsError, match="RESOURCE_EXHAUSTED"):
        text(engine, "hello")


def test_closing_with_time_lets_answers_end(model: Any) -> None:
    engine = Engine(model, CONFIG)
    outputs = start(engine, "hello", GREEDY)
    engine.close(drain_seconds=60)
    assert finish(outputs)[-1].finish_reason == "length"


def test_closing_without_time_cancels(model: Any) -> None:
    engine = Engine(model, CONFIG)
    outputs = start(engine, "hello", SamplingParams(max_tokens=100, temperature=0))
    engine.close()
    assert finish(outputs)[-1].finish_reason == "cancelled"
    with pytest.raises(ServerBusy, match="shutting down"):
        start(engine, "hello", GREEDY)


def test_a_swap_to_another_structure_compiles_before_it_changes(engine: Engine) -> None:
    expected = text(engine, "hello")
    layers = engine.model.params.layers
    q = layers[0].q
    zero = LowRank(q, jnp.zeros((q.shape[0], 1)), jnp.zeros((1, q.shape[1])), jnp.float32(1))
    changed = engine.model.params.replace(layers=(layers[0].replace(q=zero), *layers[1:]))
    assert engine.swap(changed) == 2
    assert text(engine, "hello") == expected
