"""Packed weights stand for the numbers they were packed from, and multiply like them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import ops
from tars_jax.errors import InvalidRequest
from tars_jax.kernels import pack_tiles
from tars_jax.ops import matmul, take
from tars_jax.quant import LowRank, QArray, dequantize, pack, unpack

FORMS = [(bits, group, affine) for bits in (4, 8) for group in (16, 32) for affine in (False, True)]
FORMS += [(5, 32, False), (5, 32, True), (6, 16, False)]


def example(bits: int, group: int, affine: bool, shape: tuple[int, int] = (6, 64)) -> tuple[QArray, np.ndarray]:
    rng = np.random.default_rng(bits + group + affine)
    low, high = (0, 1 << bits) if affine and bits < 8 else (-(1 << (bits - 1)), 1 << (bits - 1))
    codes = rng.integers(low, high, shape).astype(np.int8)
    scales = rng.normal(size=(shape[0], shape[1] // group)).astype(np.float16)
    mins = rng.normal(size=scales.shape).astype(np.float16) if affine else None
    dense = codes.astype(np.float32) * np.repeat(scales, group, 1).astype(np.float32)
    if mins is not None:
        dense += np.repeat(mins, group, 1).astype(np.float32)
    return jax.tree.map(jnp.asarray, pack(codes, scales, mins, bits=bits, group=group)), dense


@pytest.mark.parametrize(("bits", "group", "affine"), FORMS)
def test_dequantize_gives_the_packed_numbers(bits: int, group: int, affine: bool) -> None:
    w, dense = example(bits, group, affine)
    np.testing.assert_array_equal(dequantize(w), dense)
    assert w.shape == dense.shape


@pytest.mark.parametrize(("bits", "group", "affine"), FORMS)
def test_matmul_equals_the_dense_product(bits: int, group: int, affine: bool) -> None:
    w, dense = example(bits, group, affine)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    np.testing.assert_allclose(matmul(jnp.asarray(x), w), x @ dense.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("bits", "group", "affine"), FORMS)
def test_take_gives_rows(bits: int, group: int, affine: bool) -> None:
    w, dense = example(bits, group, affine)
    ids = jnp.array([5, 0, 5])
    np.testing.assert_array_equal(take(w, ids, jnp.float32), dense[np.asarray(ids)])


def test_low_rank_adds_to_a_quantised_base() -> None:
    base, dense = example(4, 32, True)
    rng = np.random.default_rng(2)
    a, b, x = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((2, 6), (2, 64), (3, 64)))
    w = LowRank(base, a, b, jnp.float32(0.5))
    expected = x @ (dense + 0.5 * np.asarray(a.T @ b)).T
    np.testing.assert_allclose(matmul(x, w), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(take(w, jnp.array([1]), jnp.float32), dequantize(w)[1:2], rtol=1e-5, atol=1e-5)


def test_unpack_inverts_pack() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (4, 32)).astype(np.int8)
    packed = pack(codes, np.ones((4, 1), np.float16), None, bits=4, group=32)
    np.testing.assert_array_equal(unpack(jax.tree.map(jnp.asarray, packed)), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="4 bits"):
        pack(np.full((1, 32), 8, np.int8), np.ones((1, 1), np.float16), None, bits=4, group=32)


def test_columns_that_do_not_fill_a_group_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="groups of 32"):
        pack(np.zeros((1, 40), np.int8), np.ones((1, 1), np.float16), None, bits=8, group=32)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_a_population_of_updates_takes_equal_runs_of_rows(shared: bool, tiled: bool) -> None:
    base, dense = example(4, 32, True)
    rng = np.random.default_rng(3)
    a, b = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((3, 2, 6), (2, 64) if shared else (3, 2, 64)))
    x = rng.normal(size=(12, 64)).astype(np.float32)
    rows = [b if shared else b[n] for n in range(3)]
    weight = LowRank(LowRank(pack_tiles(base) if tiled else base, a[0], rows[0], jnp.float32(0.1)), a, b, jnp.float32(0.5))
    below = dense + 0.1 * np.asarray(a[0].T @ rows[0])
    expected = [x[4 * n : 4 * n + 4] @ (below + 0.5 * np.asarray(a[n].T @ rows[n])).T for n in range(3)]
    atol = 0.02 * max(np.abs(part).max() for part in expected) if tiled else 1e-3  # kernels round activations to 8 bits
    np.testing.assert_allclose(matmul(jnp.asarray(x), weight), np.concatenate(expected), rtol=1e-4, atol=atol)


def test_updates_on_tiled_weights_join_the_fused_products() -> None:
    base, dense = example(8, 32, False)
    rng = np.random.default_rng(4)
    a, b, x, residual = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((2, 3, 6), (3, 64), (8, 64), (8, 6)))
    norm = jnp.asarray(rng.uniform(0.5, 1.5, 64).astype(np.float32))
    plain = LowRank(jnp.asarray(dense), a, b, jnp.float32(0.5))
    tiled = dataclasses.replace(plain, base=pack_tiles(base))
    for bias in (None, jnp.arange(6, dtype=jnp.float32)):
        (expected,), (found,) = (ops.norm_linear(x, norm, 1e-5, [w], [bias]) for w in (plain, tiled))
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * float(jnp.abs(expected).max()))
        expected, found = (ops.linear_add(x, w, bias, residual) for w in (plain, tiled))
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * float(jnp.abs(expected).max()))
