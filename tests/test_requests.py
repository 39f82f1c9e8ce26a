"""What a request may ask of its tokens, through an engine."""

import dataclasses
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.errors import InvalidRequest
from tests.tiny import tiny_model

CONFIG = EngineConfig(max_context=128, max_rows=4, max_step_tokens=32, cache_dtype="float16")
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(tiny_model(scale=1.5), CONFIG)
    yield engine
    engine.close()


def start(engine: Engine, prompt: str, params: SamplingParams) -> "queue.SimpleQueue[Output]":
    return start_ids(engine, engine.model.tokenizer.encode(prompt), params)


def finish(outputs: "queue.SimpleQueue[Output]", count: int = 1) -> list[Output]:
    found: list[Output] = []
    while sum(output.finish_reason is not None for output in found) < count:
        found.append(outputs.get(timeout=300))
    return found


def tokens(engine: Engine, prompt: str = "hello", **params: Any) -> list[int]:
    wanted = dataclasses.replace(GREEDY, **params)
    return [token for output in finish(start(engine, prompt, wanted)) for token in output.token_ids]


def test_a_bias_decides(engine: Engine) -> None:
    assert tokens(engine, logit_bias=((7, 1000.0),)) == [7] * 12


def test_a_bias_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias: token 96"):
        tokens(engine, logit_bias=((96, 1.0),))


def test_only_allowed_tokens_come(engine: Engine) -> None:
    assert set(tokens(engine, allowed_token_ids=(3, 4), temperature=2.0, seed=1, max_tokens=30)) == {3, 4}


def test_bad_words_do_not_come(engine: Engine) -> None:
    plain = "".join(engine.generate("hello", GREEDY))
    letter, pair = plain[0], plain[2:4]
    for word in (letter, pair):
        assert word not in "".join(engine.generate("hello", dataclasses.replace(GREEDY, bad_words=(word,))))


def test_nothing_to_choose_from_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="leave no token"):
        tokens(engine, allowed_token_ids=(33,), bad_words=("A",))


def test_an_answer_does_not_end_before_min_tokens(engine: Engine) -> None:
    plain = tokens(engine)
    assert len(tokens(engine, stop_token_ids=(plain[2],))) == 2
    late = tokens(engine, stop_token_ids=(plain[2],), min_tokens=5, max_tokens=40)
    assert len(late) >= 5
    assert plain[2] not in late[:5]


def test_stop_strings_wait_for_min_tokens(engine: Engine) -> None:
    text = "".join(engine.generate("hello", GREEDY))
    stopped = dataclasses.replace(GREEDY, stop=(text[1],), min_tokens=6)
    assert "".join(engine.generate("hello", stopped)).startswith(text[:5])


def test_several_answers_are_those_of_consecutive_seeds(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=5, n=3)
    outputs = finish(start(engine, "hello", params), 3)
    for index in range(3):
        alone = tokens(engine, temperature=1.5, seed=5 + index, max_tokens=8)
        assert [token for output in outputs if output.index == index for token in output.token_ids] == alone
    assert sorted(output.index for output in outputs if output.finish_reason) == [0, 1, 2]


def test_cancelling_ends_all_answers(engine: Engine) -> None:
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    request = Request(new_request_id(), (1, 2, 3), SamplingParams(max_tokens=100, temperature=1.0, n=2), outputs.put)
    engine.submit(request)
    outputs.get(timeout=300)
    engine.cancel(request.id)
    assert {output.finish_reason for output in finish(outputs, 2)} == {None, "cancelled"}


def test_prompt_logprobs_are_the_models(engine: Engine) -> None:
    prompt = "hello, who is there? it is only me"
    ids = engine.model.tokenizer.encode(prompt)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2)
    found = [entry for output in finish(start(engine, prompt, params)) for entry in output.prompt_logprobs]
    scores = engine.model.logits(ids).astype(np.float64)
    expected = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert [entry.token_id for entry in found] == ids[1:]
    np.testing.assert_allclose([entry.logprob for entry in found], [expected[i, token] for i, token in enumerate(ids[1:])], atol=0.02)
    for i, entry in enumerate(found):
        np.testing.assert_allclose([logprob for _, logprob in entry.top], np.sort(expected[i])[:-3:-1], atol=0.02)  # a 16-bit cache


RICH: dict[str, dict[str, Any]] = {
    "mirostat": {"mirostat": 2, "mirostat_tau": 3.0},
    "dry": {"dry_multiplier": 0.8, "dry_sequence_breakers": ("z",)},
    "typical": {"typical_p": 0.8, "top_k": 0},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "penalties": {"repeat_penalty": 1.3, "frequency_penalty": 0.2},
}


@pytest.mark.parametrize("wish", RICH.values(), ids=RICH)
def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine: Engine, wish: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.2, seed=11, **wish)
    alone = [token for output in finish(start(engine, "hello", params)) for token in output.token_ids]
    others = [start(engine, "x" * size, SamplingParams(max_tokens=30, seed=size)) for size in (3, 17)]
    together = [token for output in finish(start(engine, "hello", params)) for token in output.token_ids]
    for other in others:
        finish(other)
    assert together == alone


@pytest.mark.parametrize("wish", [RICH["mirostat"], RICH["dry"]], ids=["mirostat", "dry"])
def test_preemption_does_not_change_the_tokens(wish: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.2, seed=11, **wish)
    small = Engine(tiny_model(scale=1.5), dataclasses.replace(CONFIG, cache_tokens=144))
    alone = [token for output in finish(start(small, "hello", params)) for token in output.token_ids]
    streams = [start(small, prompt, params) for prompt in ("other", "third", "hello")]
    together = [[token for output in finish(stream) for token in output.token_ids] for stream in streams][2]
    assert small.stats().preemptions > 0
    small.close()
    assert together == alone


def test_a_full_context_ends_an_answer(engine: Engine) -> None:
    outputs = finish(start(engine, "hello", SamplingParams(temperature=0)))
    assert (outputs[-1].finish_reason, sum(len(output.token_ids) for output in outputs)) == ("length", 128 - 5)


def test_an_answer_that_may_shift_goes_on(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=300, shift=True, num_keep=2)
    outputs = finish(start(engine, "hello", params))
    usage = outputs[-1].usage
    assert usage is not None
    assert (outputs[-1].finish_reason, usage.prompt_tokens, usage.output_tokens) == ("length", 5, 300)


def test_a_shift_keeps_the_beginning_and_the_newest_half(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=126, shift=True, num_keep=2)
    shifted = tokens(engine, **{field: getattr(params, field) for field in ("temperature", "max_tokens", "shift", "num_keep")})
    ids = [*engine.model.tokenizer.encode("hello"), *shifted[:123]]
    window = [*ids[:2], *ids[2 + (128 - 2) // 2 :]]
    again = finish(start_ids(engine, window, dataclasses.replace(GREEDY, max_tokens=3)))
    assert [token for output in again for token in output.token_ids] == shifted[123:]


def start_ids(engine: Engine, ids: list[int], params: SamplingParams) -> "queue.SimpleQueue[Output]":
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    engine.submit(Request(new_request_id(), tuple(ids), params, outputs.put))
    return outputs
