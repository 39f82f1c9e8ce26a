"""Filters and penalties beside llama.cpp's own samplers, where llama-cpp-python is installed."""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax.filters import filtered, mirostat
from tars_jax.penalties import adjust
from tars_jax.ranking import blocks
from tars_jax.rows import pack_row
from tars_jax.sample_rows import SampleRows, unpack_rows
from tests.reference_sampler import softmax
from tests.sampler import VOCAB, Wish, extras

llama_cpp = pytest.importorskip("llama_cpp")


def llama_logits(logits: np.ndarray, samplers: list[Any], accepted: list[int] = []) -> np.ndarray:  # noqa: B006
    """What a chain of llama.cpp's samplers makes of logits; -inf for the tokens it drops."""
    data = (llama_cpp.llama_token_data * VOCAB)(*((token, float(logit), 0.0) for token, logit in enumerate(logits)))
    array = llama_cpp.llama_token_data_array(data, VOCAB, -1, False)
    for sampler in samplers:
        for token in accepted:
            llama_cpp.llama_sampler_accept(sampler, token)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    found = np.full(VOCAB, -np.inf)
    for at in range(array.size):
        found[array.data[at].id] = array.data[at].logit
    return found


def rows_of(wish: Wish) -> SampleRows:
    return unpack_rows(jnp.asarray(pack_row(**wish)[None]), extras(({},)))


@jax.jit
def left(logits: jax.Array, rows: SampleRows) -> tuple[jax.Array, ...]:
    return tuple(bound[0, 0, 0] for bound in filtered(blocks(logits), rows))


def ours(logits: np.ndarray, wish: Wish) -> np.ndarray:
    low, high, temperature = map(float, left(jnp.asarray(logits[None]), rows_of(wish)))
    return softmax(np.where((logits >= low) & (logits <= high), logits.astype(np.float64) / temperature, -np.inf))


CASES: dict[str, tuple[Wish, Any]] = {
    "top_k": ({"top_k": 90}, lambda c: [c.llama_sampler_init_top_k(90)]),
    "top_p": ({"top_p": 0.8}, lambda c: [c.llama_sampler_init_top_p(0.8, 0)]),
    "min_p": ({"min_p": 0.05}, lambda c: [c.llama_sampler_init_min_p(0.05, 0)]),
    "typical": ({"typical_p": 0.6}, lambda c: [c.llama_sampler_init_typical(0.6, 0)]),
    "xtc": ({"xtc_probability": 1.0, "xtc_threshold": 0.04}, lambda c: [c.llama_sampler_init_xtc(1.0, 0.04, 0, 1)]),
    "dynatemp": ({"dynatemp_range": 0.4, "dynatemp_exponent": 1.3}, lambda c: [c.llama_sampler_init_temp_ext(1.0, 0.4, 1.3)]),
    "all": (
        {"top_k": 120, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.01, "xtc_probability": 1.0, "xtc_threshold": 0.05, "dynatemp_range": 0.3},
        lambda c: [
            c.llama_sampler_init_top_k(120),
            c.llama_sampler_init_typical(0.9, 0),
            c.llama_sampler_init_top_p(0.9, 0),
            c.llama_sampler_init_min_p(0.01, 0),
            c.llama_sampler_init_xtc(1.0, 0.05, 0, 1),
            c.llama_sampler_init_temp_ext(1.0, 0.3, 1.0),
        ],
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_filters_leave_the_same(case: tuple[Wish, Any], seed: int) -> None:
    wish, samplers = case
    logits = (np.random.default_rng(seed).normal(size=VOCAB) * (1 + seed)).astype(np.float32)
    found = ours(logits, {"temperature": 1.0, "dynatemp_exponent": 1.0, **wish})
    np.testing.assert_allclose(found, softmax(llama_logits(logits, samplers(llama_cpp))), atol=2e-5)


@jax.jit
def adjusted(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    return adjust(logits, rows, table)[0]


@pytest.mark.parametrize("seed", range(3))
def test_penalties_are_the_same(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, tokens = random.normal(size=VOCAB).astype(np.float32), random.integers(0, 20, 50).tolist()
    wish = {"repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "window": 24, "length": 50}
    found = adjusted(jnp.asarray(logits[None]), rows_of(wish), jnp.asarray([tokens], jnp.int32))
    expected = llama_logits(logits, [llama_cpp.llama_sampler_init_penalties(VOCAB, 24, 1.2, 0.1, 0.3)], tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_top_n_sigma_is_the_same(sigma: float) -> None:
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    found = adjusted(jnp.asarray(logits[None]), rows_of({"temperature": 1.0, "top_n_sigma": sigma}), jnp.zeros((1, 8), jnp.int32))
    np.testing.assert_allclose(found, llama_logits(logits, [llama_cpp.llama_sampler_init_top_n_sigma(sigma)]), atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_dry_is_the_same(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, tokens = random.normal(size=VOCAB).astype(np.float32), random.integers(0, 3, 60).tolist()
    wish = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_window": 40, "length": 60}
    found = adjusted(jnp.asarray(logits[None]), rows_of(wish), jnp.asarray([tokens], jnp.int32))
    sampler = llama_cpp.llama_sampler_init_dry(None, 0.8, 1.75, 2, 40, None, 0)
    np.testing.assert_allclose(found, llama_logits(logits, [sampler], tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.5])
def test_mirostat_leaves_the_same(version: int, tau: float) -> None:
    logits = (np.random.default_rng(2).normal(size=VOCAB) * 2).astype(np.float32)
    z, mu = jnp.asarray(logits[None]), jnp.asarray([2 * tau], jnp.float32)  # where llama.cpp begins
    rows = rows_of({"temperature": 1.0, "mirostat": version})
    low = float(jax.jit(lambda z: mirostat(filtered(blocks(z), rows), blocks(z), z, rows, mu).low)(z)[0, 0, 0])
    init = llama_cpp.llama_sampler_init_mirostat_v2
    sampler = init(1, tau, 0.1) if version == 2 else llama_cpp.llama_sampler_init_mirostat(VOCAB, 1, tau, 0.1, 100)
    np.testing.assert_array_equal(logits >= low, np.isfinite(llama_logits(logits, [sampler])))
