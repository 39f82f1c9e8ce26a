"""Filters against llama.cpp's written again in numpy, against the papers' worked examples, and in what is drawn."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tars_jax.filters import Interval, filtered, mirostat
from tars_jax.penalties import adjust
from tars_jax.ranking import blocks
from tars_jax.rows import pack_row
from tars_jax.sample_rows import SampleRows, unpack_rows
from tests import reference_sampler as reference
from tests.reference_sampler import Candidates, softmax
from tests.sampler import VOCAB, Wish, draw, extras, frequencies

ROWS = 48


def rows_of(wishes: list[Wish]) -> SampleRows:
    packed = np.stack([pack_row(**wish, slot=r) for r, wish in enumerate(wishes)])
    return unpack_rows(jnp.asarray(packed), extras(tuple({} for _ in wishes)))


def sorted_logits(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(ROWS, VOCAB)) * random.uniform(0.5, 4, (ROWS, 1))
    return -np.sort(-logits.astype(np.float32), axis=1)


def left_by(wish: Wish, logits: np.ndarray) -> np.ndarray:
    """The distribution llama.cpp draws one row from, by rank; XTC acts if its probability is 1."""
    candidates: Candidates = np.arange(VOCAB), logits.astype(np.float64)
    candidates = reference.top_k(candidates, wish.get("top_k", 0))
    candidates = reference.typical(candidates, wish.get("typical_p", 1.0))
    candidates = reference.top_p(candidates, wish.get("top_p", 1.0))
    candidates = reference.min_p(candidates, wish.get("min_p", 0.0))
    if wish.get("xtc_probability"):
        candidates = reference.xtc(candidates, wish["xtc_threshold"])
    temperature = reference.dynamic_temperature(
        candidates, wish["temperature"], wish.get("dynatemp_range", 0.0), wish.get("dynatemp_exponent", 1.0)
    )
    distribution = np.zeros(VOCAB)
    distribution[candidates[0]] = softmax(candidates[1] / temperature)
    return distribution


def distribution(logits: np.ndarray, interval: Interval, row: int) -> np.ndarray:
    low, high, temperature = (float(bound[row, 0, 0]) for bound in interval)
    return softmax(np.where((logits >= low) & (logits <= high), logits.astype(np.float64) / temperature, -np.inf))


def random_wish(random: np.random.Generator, names: list[str]) -> Wish:
    chosen: Wish = {
        "top_k": int(random.integers(1, VOCAB)),
        "typical_p": random.uniform(0.2, 0.99),
        "top_p": random.uniform(0.2, 0.99),
        "min_p": random.uniform(0, 0.3),
        "xtc_probability": 1.0,
        "xtc_threshold": random.uniform(0.02, 0.4),
        "dynatemp_range": random.uniform(0.1, 0.5),
        "dynatemp_exponent": random.uniform(0.5, 2),
    }
    groups = {"xtc": ["xtc_probability", "xtc_threshold"], "dynatemp": ["dynatemp_range", "dynatemp_exponent"]}
    wanted = {field for name in names for field in groups.get(name, [name])}
    return {"temperature": random.uniform(0.6, 1.5), **{field: value for field, value in chosen.items() if field in wanted}}


ALL = ["top_k", "typical_p", "top_p", "min_p", "xtc", "dynatemp"]


@pytest.mark.parametrize("names", [[], *([name] for name in ALL), ["typical_p", "xtc"], ALL], ids=lambda names: "+".join(names) or "none")
def test_filters_leave_what_llama_cpp_leaves(names: list[str]) -> None:
    random = np.random.default_rng(len(names))
    logits = sorted_logits(7)
    wishes = [random_wish(random, names) for _ in range(ROWS)]
    interval = jax.jit(lambda z, rows: filtered(blocks(z), rows))(jnp.asarray(logits), rows_of(wishes))
    found = np.stack([distribution(logits[r], interval, r) for r in range(ROWS)])
    expected = np.stack([left_by(wish, logits[r]) for r, wish in enumerate(wishes)])
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_cuts_where_llama_cpp_does(version: int) -> None:
    random = np.random.default_rng(version)
    logits, mu = sorted_logits(8), random.uniform(1, 8, ROWS).astype(np.float32)
    wishes: list[Wish] = [{"temperature": random.uniform(0.7, 1.4), "mirostat": version} for _ in range(ROWS)]
    interval = jax.jit(lambda z, rows, mu: mirostat(filtered(blocks(z), rows), blocks(z), z, rows, mu))(logits, rows_of(wishes), mu)
    left = (logits >= np.asarray(interval.low)[:, 0]).sum(axis=1)
    for r, wish in enumerate(wishes):
        p = softmax(logits[r].astype(np.float64) / wish["temperature"])
        expected = reference.mirostat_1(p, float(mu[r]), VOCAB) if version == 1 else reference.mirostat_2(p, float(mu[r]))
        assert left[r] == min(expected, VOCAB)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_learns_from_the_surprise(version: int) -> None:
    logits = np.full((1, VOCAB), -30.0)
    logits[0, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    wish = {"temperature": 1.0, "mirostat": version, "mirostat_tau": 3.0, "mirostat_eta": 0.5, "mu": 50.0}
    out = draw(logits, wish)
    surprise = -np.log2(softmax(logits[0])[int(out.tokens[0])])
    assert float(out.mu[0]) == pytest.approx(50.0 - 0.5 * (surprise - 3.0), abs=1e-4)


def test_mirostat_goes_on_from_its_slot_unless_told_otherwise() -> None:
    logits = np.zeros((2, VOCAB))
    wish = {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 8.0, "mirostat_eta": 0.0}
    assert draw(logits, wish, {**wish, "mu": 9.0}, mu=[10.0, 11.0]).mu.tolist() == [10.0, 9.0]


def test_mirostat_holds_the_mean_surprise() -> None:
    logits = np.random.default_rng(0).normal(size=(1, VOCAB)) * 3
    p, mu, surprises = softmax(logits[0]), 4.0, []
    for position in range(200):
        wish = {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.2, "mu": mu, "seed": 3}
        out = draw(logits, wish, lengths=[position])
        left = p[-np.log2(p) <= mu].sum()
        surprises.append(-np.log2(p[int(out.tokens[0])] / left))
        mu = float(out.mu[0])
    assert np.mean(surprises[50:]) == pytest.approx(2.0, abs=0.15)


def test_top_n_sigma_keeps_what_llama_cpp_keeps() -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    ns = [0.5, 1.0, 2.5]
    wishes: list[Wish] = [{"temperature": 1.0, "top_n_sigma": n} for n in ns]
    found = np.asarray(jax.jit(adjust)(jnp.asarray(logits), rows_of(wishes), jnp.zeros((3, 8), jnp.int32)))
    for r, n in enumerate(ns):
        kept = reference.top_n_sigma((np.arange(VOCAB), logits[r].astype(np.float64)), n)[0]
        assert set(np.nonzero(np.isfinite(found[r]))[0]) == set(kept)


def test_xtc_acts_as_often_as_it_should() -> None:
    logits = np.full((1, VOCAB), -50.0)
    logits[0, [7, 3, 9]] = np.log([0.5, 0.3, 0.2])
    wish = {"temperature": 1.0, "top_k": 40, "xtc_probability": 0.4, "xtc_threshold": 0.1}
    observed = frequencies(logits, wish, 4000) * 4000
    expected = np.array([0.6 * 0.5, 0.6 * 0.3, 0.6 * 0.2 + 0.4]) * 4000
    assert stats.chisquare(observed[[7, 3, 9]], expected).pvalue > 1e-3


CASES: dict[str, Wish] = {
    "temperature": {"temperature": 0.8},
    "narrow": {"temperature": 1.1, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    "typical": {"temperature": 1.0, "typical_p": 0.7},
    "dynatemp": {"temperature": 1.0, "top_k": 30, "dynatemp_range": 0.6, "dynatemp_exponent": 1.3},
    "xtc": {"temperature": 1.2, "xtc_probability": 1.0, "xtc_threshold": 0.05},
}


@pytest.mark.parametrize("wish", CASES.values(), ids=CASES)
def test_tokens_are_drawn_as_often_as_the_filters_say(wish: Wish) -> None:
    logits = sorted_logits(9)[:1]
    expected = left_by(wish, logits[0]) * 4000
    observed = frequencies(logits, wish, 4000) * 4000
    assert not observed[expected == 0].any()
    many = expected >= 5
    rest = expected[~many].sum()
    if rest >= 5:
        observed, expected = np.append(observed[many], observed[~many].sum()), np.append(expected[many], rest)
    else:
        observed, expected = observed[many], expected[many]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@given(st.lists(st.integers(0, 3), min_size=0, max_size=40), st.integers(0, 50), st.integers(1, 4), st.sets(st.integers(0, 3), max_size=2))
@settings(max_examples=150, deadline=None)
def test_dry_penalizes_what_llama_cpp_penalizes(tokens: list[int], window: int, allowed: int, breakers: set[int]) -> None:
    wish: Wish = {"dry_multiplier": 0.5, "dry_base": 1.5, "dry_allowed_length": allowed, "dry_window": window}
    penalty = dry_penalties(tokens, wish, breakers)
    expected = np.zeros(VOCAB)
    for token, size in reference.dry(tokens, window, allowed, breakers).items():
        expected[token] = 0.5 * 1.5 ** (size - allowed)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


@jax.jit
def adjusted(rows: SampleRows, table: jax.Array) -> jax.Array:
    return adjust(jnp.zeros((1, VOCAB), jnp.float32), rows, table)


def dry_penalties(tokens: list[int], wish: Wish, breakers: set[int]) -> np.ndarray:
    table = np.zeros((1, 64), np.int32)
    table[0, : len(tokens)] = tokens
    rows: Any = rows_of([{**wish, "length": len(tokens)}])
    rows = dataclasses.replace(rows, extras=extras(({"breakers": breakers},)))
    return -np.asarray(adjusted(rows, jnp.asarray(table)))[0]


def test_dry_stops_growing_before_it_overflows() -> None:
    wish: Wish = {"dry_multiplier": 1.0, "dry_base": 1000.0, "dry_allowed_length": 1, "dry_window": 64}
    penalty = dry_penalties([1, 2] * 31, wish, set())
    assert penalty[1] == pytest.approx(1000.0**12, rel=1e-4)
    assert np.isfinite(penalty).all()


def test_a_bias_is_added_before_the_penalties() -> None:
    logits = np.zeros((2, VOCAB))
    logits[:, 5] = 1.0
    out = draw(logits, {"bias": {9: 2.0}}, {"bias": {9: 2.0}, "presence_penalty": 1.5, "window": 4}, history=[[9], [9]], lengths=[1, 1])
    assert out.tokens.tolist() == [9, 5]


def test_a_mask_cannot_be_undone_by_a_bias() -> None:
    assert draw(np.zeros((1, VOCAB)), {"bias": {9: 100.0}, "allow": {4}}).tokens.tolist() == [4]


def test_every_row_is_the_same_alone_and_among_others() -> None:
    logits = np.random.default_rng(3).normal(size=(6, VOCAB)).astype(np.float32) * 2
    history = np.random.default_rng(4).integers(0, 4, (6, 16))
    wishes: list[Wish] = [
        {},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 1},
        {"temperature": 1.0, "typical_p": 0.6, "seed": 2},
        {"temperature": 1.0, "mirostat": 1, "mu": 6.0, "mirostat_tau": 3.0, "seed": 3},
        {"temperature": 1.0, "top_k": 20, "xtc_probability": 0.5, "xtc_threshold": 0.1, "seed": 4},
        {"temperature": 1.0, "dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_window": 16, "dynatemp_range": 0.4, "seed": 5},
    ]
    together = draw(logits, *wishes, history=history, lengths=[16] * 6)
    for r, wish in enumerate(wishes):
        alone = draw(logits[r : r + 1], wish, history=history[r : r + 1], lengths=[16], rows=1)
        assert int(alone.tokens[0]) == int(together.tokens[r])
        assert float(alone.mu[0]) == pytest.approx(float(together.mu[r]), abs=1e-5)
