"""Sampling against filters written out in numpy, and the promises about seeds and neighbours."""

import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax.ranking import argmax, top_k
from tars_jax.rows import CANDIDATES, is_plain, pack_row
from tars_jax.sampling import MAX_TOP_LOGPROBS
from tests.sampler import VOCAB, draw, frequencies, softmax


def random_logits(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, VOCAB)).astype(np.float32) * 2


def test_temperature_zero_is_greedy() -> None:
    logits = random_logits(3)
    np.testing.assert_array_equal(draw(logits, {}, {}, {}).tokens, logits.argmax(-1))


@pytest.mark.parametrize("top_k", [0, 5, CANDIDATES + 50], ids=["unlimited", "few", "many"])
def test_drawn_frequencies_are_the_softmax(top_k: int) -> None:
    logits = random_logits() * 2
    kept = np.argsort(-logits[0])[: top_k or VOCAB]
    expected = np.zeros(VOCAB)
    expected[kept] = softmax(logits[0][kept] / 0.9)
    assert np.abs(frequencies(logits, {"temperature": 0.9, "top_k": top_k}) - expected).sum() < 0.15


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.full((1, VOCAB), -50.0)
    logits[0, [7, 3, 9, 4]] = np.log([0.5, 0.3, 0.15, 0.05])
    seen = np.nonzero(frequencies(logits, {"temperature": 1.0, "top_p": 0.7}))[0]
    assert set(seen) == {7, 3}


def test_min_p_is_relative_to_the_best() -> None:
    logits = np.full((1, VOCAB), -50.0)
    logits[0, [7, 3, 9, 4]] = np.log([0.5, 0.3, 0.15, 0.05])
    seen = np.nonzero(frequencies(logits, {"temperature": 1.0, "min_p": 0.5}))[0]
    assert set(seen) == {7, 3}


def test_the_position_changes_the_noise() -> None:
    logits, wish = np.zeros((1, VOCAB)), {"temperature": 1.0, "top_k": 100, "seed": 1}
    assert len({int(draw(logits, wish, lengths=[n]).tokens[0]) for n in range(8)}) > 4


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.full((1, VOCAB), -9.0)
    logits[0, [1, 2]] = [2.0, 1.5]
    history, wish = [[1, 0, 0]], {"repeat_penalty": 1.5, "window": 4}
    assert int(draw(logits, wish, history=history, lengths=[1]).tokens[0]) == 2
    assert int(draw(-np.abs(logits), wish, history=[[2, 0, 0]], lengths=[1]).tokens[0]) == 1


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    logits = np.full((1, VOCAB), -9.0)
    logits[0, [1, 2]] = [2.0, 1.0]
    twice = [[1, 1, 0]]
    assert int(draw(logits, {"frequency_penalty": 0.6, "window": 4}, history=twice, lengths=[2]).tokens[0]) == 2
    assert int(draw(logits, {"presence_penalty": 0.6, "window": 4}, history=twice, lengths=[2]).tokens[0]) == 1


def test_penalties_look_back_only_on_their_window() -> None:
    logits = np.full((1, VOCAB), -9.0)
    logits[0, [1, 2]] = [2.0, 1.9]
    wish = {"presence_penalty": 1.0, "window": 2}
    assert int(draw(logits, wish, history=[[1, 5, 6, 0]], lengths=[3]).tokens[0]) == 1
    assert int(draw(logits, wish, history=[[5, 1, 6, 0]], lengths=[3]).tokens[0]) == 2


def test_masked_rows_choose_among_allowed_tokens() -> None:
    logits = random_logits(2)
    allowed = {int(logits[0].argsort()[3]), 299}
    tokens = draw(logits, {"allow": allowed, "temperature": 2.0, "top_k": 50}, {}).tokens
    assert int(tokens[0]) in allowed
    assert int(tokens[1]) == int(logits[1].argmax())


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits()
    out = draw(logits, {"top_logprobs": 3, "temperature": 5.0, "seed": 3})
    expected = np.log(softmax(logits[0].astype(np.float64)))
    assert float(out.logprob[0]) == pytest.approx(expected[int(out.tokens[0])], abs=1e-5)
    best = np.argsort(-expected)[:MAX_TOP_LOGPROBS]
    np.testing.assert_array_equal(out.top_ids[0], best)
    np.testing.assert_allclose(out.top_logprobs[0], expected[best], atol=1e-5)


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_argmax_finds_the_first_maximum(columns: int) -> None:
    x = np.random.default_rng(columns).integers(0, 5, (6, columns)).astype(np.float32)
    x[0], x[1] = -np.inf, x[1, 0]
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))


@pytest.mark.parametrize("columns", [5, 300, 128 * 20, 128 * 20 + 1])
def test_top_k_equals_a_full_sort(columns: int) -> None:
    x = np.random.default_rng(columns).normal(size=(4, columns)).astype(np.float32)
    values, ids = top_k(jnp.asarray(x), 5)
    np.testing.assert_array_equal(ids, np.argsort(-x, axis=1, kind="stable")[:, :5])
    np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(ids), 1))


@pytest.mark.parametrize(
    ("wish", "plain"),
    [
        ({}, True),
        ({"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.1, "window": 64}, True),
        ({"top_k": 0, "presence_penalty": 1.0}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "top_k": CANDIDATES + 1}, True),
        ({"temperature": 1.0, "top_k": 40, "typical_p": 0.9}, False),
        ({"mirostat": 2}, False),
        ({"dry_multiplier": 0.8}, False),
        ({"top_logprobs": 0}, False),
        ({"biased": 1}, False),
        ({"masked": 1}, False),
    ],
)
def test_rows_are_plain_that_want_no_special_filter(wish: dict[str, float], plain: bool) -> None:
    assert is_plain(pack_row(**wish)) == plain
