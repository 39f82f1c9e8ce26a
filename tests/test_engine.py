"""What an engine promises whatever the model: streams survive new weights and other requests' failures."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.adapters import Adapter, Update, apply_adapter
from tars_jax.engine import engine as engine_module
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.engine.runner import Runner
from tars_jax.engine.scheduler import Span
from tars_jax.engine.step import Batches
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


def start(engine: Engine, prompt: str, params: SamplingParams, adapters: Any = ()) -> "queue.SimpleQueue[Output]":
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    ids = tuple(engine.model.tokenizer.encode(prompt))
    engine.submit(Request(new_request_id(), ids, params, outputs.put, adapters=adapters))
    return outputs


def finish(outputs: "queue.SimpleQueue[Output]") -> list[Output]:
    found = [outputs.get(timeout=600)]
    while not found[-1].finish_reason:
        found.append(outputs.get(timeout=600))
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
    outputs.get(timeout=600)
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


def test_a_step_says_where_its_prompts_begin() -> None:
    def span(start: int, count: int, guesses: tuple[int, ...] = ()) -> Span:
        sequence: Any = SimpleNamespace(tokens=[65] * 64, slot=0, pages=[1, 2], adapters=(), prompt_length=20)
        return Span(sequence, start, count, True, guesses)

    batches = Batches(EngineConfig(max_context=64, max_rows=4, page_size=16))
    for spans, expected in (([span(20, 1, (7, 7)), span(63, 1), span(8, 12)], 4), ([span(0, 3)], 0), ([span(30, 1)], 1)):
        size, numbers = batches.build(spans)
        assert batches.layout(size).split(numbers)["prompts_at"].tolist() == [expected]


def test_an_answer_of_no_tokens_ends_at_once(engine: Engine) -> None:
    outputs = finish(start(engine, "hello", SamplingParams(max_tokens=0)))
    assert [output.finish_reason for output in outputs] == ["length"]
    assert text(engine, "hello")


def test_closing_with_time_lets_answers_end(model: Any) -> None:
    engine = Engine(model, CONFIG)
    outputs = start(engine, "hello", GREEDY)
    engine.close(drain_seconds=600)
    assert finish(outputs)[-1].finish_reason == "length"


def test_closing_without_time_cancels(model: Any) -> None:
    engine = Engine(model, CONFIG)
    outputs = start(engine, "hello", SamplingParams(max_tokens=100, temperature=0))
    engine.close()
    assert finish(outputs)[-1].finish_reason == "cancelled"
    with pytest.raises(ServerBusy, match="shutting down"):
        start(engine, "hello", GREEDY)


def test_requests_end_when_their_time_does(model: Any) -> None:
    engine = Engine(model, EngineConfig(max_context=128, max_rows=1, max_step_tokens=32))
    text(engine, "hello")  # compiled
    now, outputs = time.monotonic(), [queue.SimpleQueue[Output]() for _ in range(3)]
    long = SamplingParams(max_tokens=100, temperature=0)
    for sink, deadline in zip(outputs, (None, now, now + 3600), strict=True):
        engine.submit(Request(new_request_id(), (1, 2, 3), long, sink.put, deadline=deadline))
    untimed, late, early = map(finish, outputs)
    assert [output.finish_reason for output in late] == ["timeout"]  # in the queue
    assert untimed[-1].finish_reason == early[-1].finish_reason == "length"
    engine.close()


def test_a_deadline_ends_an_answer_under_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, CONFIG)
    sink = queue.SimpleQueue[Output]()
    clock = time.monotonic
    engine.submit(Request(new_request_id(), (1, 2, 3), SamplingParams(temperature=0, ignore_eos=True), sink.put, deadline=clock() + 3600))
    sink.get(timeout=60)
    monkeypatch.setattr("tars_jax.engine.engine.time.monotonic", lambda: clock() + 3600)
    done = finish(sink)
    assert done[-1].finish_reason == "timeout"
    assert len(done) < 124
    assert engine.stats().free_pages == engine.stats().num_pages - 1
    engine.close()


def test_a_swap_to_another_structure_compiles_before_it_changes(engine: Engine) -> None:
    expected = text(engine, "hello")
    layers = engine.model.params.layers
    q = layers[0].q
    zero = LowRank(q, jnp.zeros((1, q.shape[0])), jnp.zeros((1, q.shape[1])), jnp.float32(1))
    changed = engine.model.params.replace(layers=(layers[0].replace(q=zero), *layers[1:]))
    assert engine.swap(changed) == 2
    assert text(engine, "hello") == expected


@pytest.fixture
def eager_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes go as many steps at once as they may, however slow the machine is."""
    monkeypatch.setattr(engine_module, "LONG_STEP", 1e9)
    monkeypatch.setattr(engine_module, "RUN_SECONDS", 1e9)


PATIENT = dataclasses.replace(CONFIG, prompt_lookup=False, target_inter_token_ms=1e12)


def compiled_by(engine: Engine, work: Callable[[], Any]) -> int:
    """Programs that some work compiles."""
    before = engine.stats().compilations
    work()
    return engine.stats().compilations - before


@pytest.mark.usefixtures("eager_runs")
def test_an_expected_swap_compiles_nothing_nor_does_the_way_back(engine: Engine) -> None:
    text(engine, "hello")
    engine.settle()
    params = engine.model.params
    factors = {"layers.0.q": Update(np.zeros((64, 2), np.float32), np.zeros((2, 64), np.float32))}
    changed = apply_adapter(params, Adapter(factors))
    assert compiled_by(engine, lambda: engine.expect(changed, stopped=lambda: True)) == 0
    assert compiled_by(engine, lambda: engine.expect(changed)) == len(engine.stats().compiled_steps) + 1  # several decodes
    assert compiled_by(engine, lambda: engine.swap(changed)) == 0
    assert compiled_by(engine, lambda: text(engine, "hello")) == 0
    assert compiled_by(engine, lambda: engine.swap(params)) == 0
    assert engine.stats().weights_version == 3


def test_an_adapter_may_untie_the_head(engine: Engine) -> None:
    before = text(engine, "hello")
    size = engine.model.config.vocab_size
    tilt = Update(np.eye(size, 1, -7, dtype=np.float32), np.full((1, 64), 9.0, np.float32))
    changed = apply_adapter(engine.model.params, Adapter({"lm_head": tilt}))
    expected = Engine(dataclasses.replace(engine.model, params=changed), CONFIG)
    engine.swap(changed)
    assert text(engine, "hello") == text(expected, "hello") != before
    expected.close()


REPEATING = "abcabcabcabc"
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_k=0, top_p=1.0, seed=3)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", [0, 1], ids=["the model itself", "another model"])
def test_a_draft_model_changes_no_answer(model: Any, engine: Engine, params: SamplingParams, seed: int) -> None:
    drafted = Engine(model, CONFIG, draft=tiny_model(seed=seed, num_layers=2 - seed))
    streams = [start(drafted, prompt, params) for prompt in ("hello", REPEATING)]
    texts = ["".join(output.text for output in finish(stream)) for stream in streams]
    stats = drafted.stats()
    drafted.close()
    assert texts == [text(engine, "hello", params), text(engine, REPEATING, params)]
    assert stats.drafted_tokens > 0
    assert (stats.accepted_tokens == stats.drafted_tokens) == (seed == 0)


def test_guesses_from_the_prompt_change_no_answer() -> None:
    model = tiny_model()
    layers = tuple(layer.replace(o=jnp.zeros_like(layer.o)) for layer in model.params.layers)
    forgetful = dataclasses.replace(model, params=model.params.replace(layers=layers))  # sees one token, so it soon goes round
    long = SamplingParams(max_tokens=100, temperature=0)
    stats, texts = [], []
    for lookup in (True, False):
        engine = Engine(forgetful, dataclasses.replace(CONFIG, prompt_lookup=lookup))
        texts.append(text(engine, REPEATING, long))
        stats.append(engine.stats())
        engine.close()
    assert texts[0] == texts[1]
    assert 0 == stats[1].drafted_tokens < stats[0].accepted_tokens <= stats[0].drafted_tokens
    assert stats[0].steps < stats[1].steps


def test_a_draft_of_another_vocabulary_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary of 64 tokens"):
        Engine(model, CONFIG, draft=tiny_model(vocab_size=64))


def test_the_next_turn_costs_only_what_is_new(engine: Engine) -> None:
    first = "what is the meaning of this text, exactly?"
    said = text(engine, first)
    outputs = finish(start(engine, first + said + " and then?", GREEDY))
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.cached_tokens == engine.stats().reused_tokens == 48  # of 52 known ones: whole pages of 16


def test_new_weights_do_not_read_old_pages(engine: Engine) -> None:
    other = tiny_model(seed=1)
    prompt = "what is the meaning of this text, exactly?"
    text(engine, prompt)
    engine.swap(other.params)
    fresh = Engine(other, CONFIG)
    assert text(engine, prompt) == text(fresh, prompt)
    fresh.close()
    assert engine.stats().reused_tokens == 0


PENALISED = SamplingParams(max_tokens=12, temperature=0, repeat_penalty=3.0, repeat_last_n=-1, presence_penalty=1.5)


def test_penalties_see_the_tokens_that_were_cached(model: Any) -> None:
    one_row, prompt = dataclasses.replace(CONFIG, max_rows=1), "what is the meaning of this text, exactly, my dear friend?"
    fresh, used = Engine(model, one_row), Engine(model, one_row)
    text(used, prompt)
    text(used, "z" * 60)  # its tokens stand in the row that the first prompt comes back to
    assert text(used, prompt, PENALISED) == text(fresh, prompt, PENALISED)
    assert used.stats().reused_tokens == 48
    fresh.close()
    used.close()


MIXED = [
    GREEDY,
    PENALISED,
    SamplingParams(max_tokens=17, temperature=0.7, top_k=5, min_p=0.1, seed=6, stop_token_ids=tuple(range(40, 60))),
    SamplingParams(max_tokens=23, temperature=1.0, top_k=0, top_p=0.95, seed=5),
]


@pytest.mark.usefixtures("eager_runs")
def test_the_tokens_of_a_run_come_in_one_piece_that_ends_before_a_stop_string(model: Any) -> None:
    engine = Engine(model, PATIENT)
    long = dataclasses.replace(GREEDY, max_tokens=60)
    finish(start(engine, "hello", long))
    engine.settle()  # the program of several decodes is there
    outputs = finish(start(engine, "hello", long))
    whole = "".join(output.text for output in outputs)
    assert max(len(output.token_ids) for output in outputs) > 1
    stop = whole[20:23]
    assert text(engine, "hello", dataclasses.replace(long, stop=(stop,))) == whole[: whole.index(stop)]
    engine.close()


@pytest.mark.usefixtures("eager_runs")
def test_several_decodes_in_one_program_change_no_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    decode = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda self, plan: counted.append(plan[0].steps) or decode(self, plan))
    single = Engine(model, PATIENT)
    monkeypatch.setattr(single._runner, "decodes_ready", lambda rows: False)
    several = Engine(model, PATIENT)
    for _ in range(2):  # the first time they are compiled meanwhile
        answers = []
        for engine in (single, several):
            streams = [start(engine, prompt, params) for prompt, params in zip(("hello", "other", "third", "x"), MIXED, strict=True)]
            answers.append([[token for output in finish(stream) for token in output.token_ids] for stream in streams])
            engine.settle()
        assert answers[0] == answers[1]
    assert max(counted) > 1
    single.close()
    several.close()


@pytest.mark.usefixtures("eager_runs")
def test_a_stream_that_ends_is_not_decoded_further(model: Any) -> None:
    engine = Engine(model, PATIENT)
    long = SamplingParams(max_tokens=60, temperature=0)
    ids = [token for output in finish(start(engine, "hello", long)) for token in output.token_ids]
    engine.settle()
    end = next(token for place, token in enumerate(ids) if place > 20 and token not in ids[:place])
    before = engine.stats().steps
    outputs = finish(start(engine, "hello", dataclasses.replace(long, stop_token_ids=(end,))))
    assert outputs[-1].finish_reason == "stop"
    while engine._in_flight:
        time.sleep(0.01)
    assert engine.stats().steps - before <= ids.index(end) + 2  # each token's step, and one that was sent before it was read
    engine.close()


@pytest.mark.usefixtures("eager_runs")
def test_a_prompt_may_be_a_token_that_ends_answers(model: Any) -> None:
    engine = Engine(model, PATIENT)
    finish(start(engine, "hello", GREEDY))
    engine.settle()  # the program of several decodes is there
    (end,) = model.tokenizer.encode("h")
    params = dataclasses.replace(GREEDY, stop_token_ids=(end,))
    assert sum(len(output.token_ids) for output in finish(start(engine, "h", params))) > 0
    engine.close()


def test_an_8_bit_cache_halves_the_memory_and_answers_nearly_the_same(model: Any) -> None:
    logprobs = SamplingParams(max_tokens=8, temperature=0, logprobs=True)
    answers, sizes = [], []
    for dtype in ("float16", "int8"):
        engine = Engine(model, dataclasses.replace(CONFIG, cache_dtype=dtype))
        answers.append([entry for output in finish(start(engine, "hello", logprobs)) for entry in output.logprobs])
        sizes.append(engine.stats().nbytes - model.nbytes)
        engine.close()
    assert [entry.logprob for entry in answers[1]] == pytest.approx([entry.logprob for entry in answers[0]], abs=0.3)
    assert answers[0] != answers[1]
    assert sizes[1] < 0.7 * sizes[0]  # heads of 16 numbers have 4 bytes of scale


def test_a_request_past_its_deadline_ends(engine: Engine) -> None:
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    ids = tuple(engine.model.tokenizer.encode("hello"))
    engine.submit(Request(new_request_id(), ids, GREEDY, outputs.put, deadline=time.monotonic()))
    assert finish(outputs)[-1].finish_reason == "timeout"
    assert text(engine, "hello")


def test_a_window_that_has_passed_frees_its_pages_and_changes_no_answer() -> None:
    windowed = tiny_model(sliding_window=20)
    long = SamplingParams(max_tokens=100, temperature=0)
    roomy, small = Engine(windowed, CONFIG), Engine(windowed, dataclasses.replace(CONFIG, cache_tokens=192, prefix_cache=False))
    streams = [start(small, prompt, long) for prompt in ("hello", "other", "third")]
    texts = ["".join(output.text for output in finish(stream)) for stream in streams]
    preemptions = small.stats().preemptions
    small.close()
    assert texts == [text(roomy, prompt, long) for prompt in ("hello", "other", "third")]
    roomy.close()
    assert preemptions == 0


def test_a_warm_engine_compiles_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, CONFIG, warm_up=True)
    monkeypatch.setattr(engine._runner, "decodes_ready", lambda rows: False)  # those come later, and hold nobody up
    text(engine, "hello")
    engine.settle()
    compiled: list[str] = []

    def listener(name: str, seconds: float, **_: Any) -> None:
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    random = np.random.default_rng(0)
    streams = []
    for _ in range(40):
        params = SamplingParams(
            max_tokens=int(random.integers(1, 30)),
            temperature=float(random.choice([0.0, 0.8])),
            top_k=int(random.choice([0, 5])),
            repeat_penalty=float(random.choice([1.0, 1.2])),
            logprobs=bool(random.integers(2)),
        )
        prompt = "".join(chr(c) for c in random.integers(97, 110, int(random.integers(1, 60))))
        streams.append(start(engine, prompt, params))
        time.sleep(float(random.exponential(0.01)))
    for stream in streams:
        finish(stream)
    engine.close()
    jax.monitoring.unregister_event_duration_listener(listener)
    assert [name for name in compiled if "compile" in name] == []
