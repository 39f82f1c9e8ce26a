"""Selection, crossover and mutation on whole populations ``[N, d]``, as functions of uniform numbers ``u`` in (0, 1).

Who draws the numbers may draw them all at once, which is what a generator costs least for, in compilation and in time.

Sources: Miller and Goldberg, Genetic Algorithms, Tournament Selection, and the Effects of Noise (1995); Eshelman and Schaffer,
Real-Coded Genetic Algorithms and Interval-Schemata (BLX-alpha, 1993); Deb and Agrawal, Simulated Binary Crossover (1995); Deb and
Goyal, A Combined Genetic Adaptive Search (polynomial mutation, 1996); Storn and Price, Differential Evolution (1997).
"""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TINY = 1e-37  # positive in float32


def unit(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Uniform numbers in (0, 1): never 0, so that :func:`normal` stays finite."""
    return jax.random.uniform(key, shape, dtype, minval=2.0**-24)


def normal(u: Array) -> Array:
    """Standard normal numbers, as ``jax.random.normal`` makes them."""
    return jnp.sqrt(2.0).astype(u.dtype) * jax.lax.erf_inv(2 * u - 1)


def cauchy(u: Array) -> Array:
    """Heavy-tailed numbers, for escape; within a thousand scales, beyond which float32 has nothing left to say."""
    return jnp.clip(jnp.tan(jnp.pi * (u - 0.5)), -1e3, 1e3)


def polynomial(u: Array, eta: float | Array) -> Array:
    """Numbers within [-1, 1]; a larger ``eta`` makes small ones likelier."""
    power = 1 / (eta + 1)
    return jnp.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)


def index(u: Array, size: int) -> Array:
    """Integers below ``size``."""
    return jnp.minimum((u * size).astype(jnp.int32), size - 1)


def tournament(u: Array, pop_size: int, size: int) -> Array:
    """Ranks (0 is best) of the winners of tournaments among ``size`` different ones of ``pop_size`` ranked individuals.

    The winner's rank is at least r with probability C(N - r, k) / C(N, k), so one number decides a tournament.
    """
    cdf = np.array([1 - comb(pop_size - rank - 1, size) / comb(pop_size, size) for rank in range(pop_size - size)])
    return jnp.searchsorted(jnp.asarray(cdf, u.dtype), u, side="right", method="compare_all")


def uniform(u: Array, a: Array, b: Array) -> Array:
    """Each coordinate from either parent. Keeps to the axes: for separable problems."""
    return jnp.where(u < 0.5, a, b)


def blend(u: Array, a: Array, b: Array, alpha: float | Array) -> Array:
    """BLX-alpha: uniform over the parents' interval, widened by ``alpha`` on both sides; 0.366 keeps the variance."""
    return a + ((1 + 2 * alpha) * u - alpha) * (b - a)


def simulated_binary(u: Array, a: Array, b: Array, eta: float | Array) -> Array:
    """SBX: keeps the parents' mean and spreads with their distance; a larger ``eta`` stays nearer to them."""
    side, u = jnp.where(u < 0.5, 1, -1).astype(u.dtype), jnp.mod(2 * u, 1)
    beta = jnp.where(u < 0.5, 2 * u, 1 / (2 * (1 - u))) ** (1 / (eta + 1))
    return 0.5 * ((a + b) + side * beta * (a - b))


def arithmetic(u: Array, a: Array, b: Array) -> Array:
    """A point on the line between the parents (one number each): does not depend on the axes, contracts."""
    return a + u[:, :1] * (b - a)


def differential(u: Array, x: Array, guide: Array, difference: Array, weight: Array, rate: Array) -> Array:
    """``x + weight (guide - x) + weight difference`` in about a share ``rate [N, 1]`` of the coordinates, at least in one."""
    always = u == jnp.min(u, 1, keepdims=True)
    return jnp.where((u < rate) | always, x + weight * (guide - x) + weight * difference, x)


def boltzmann(fitness: Array, inverse: Array) -> Array:
    """Normalised ``exp(-inverse fitness)``; zero where the fitness is infinite."""
    best = jnp.min(fitness)
    excess = jnp.where(jnp.isfinite(fitness), fitness - jnp.where(jnp.isfinite(best), best, 0), jnp.inf)
    raw = jnp.where(jnp.isfinite(excess), jnp.exp(-inverse * excess), 0)
    return raw / jnp.maximum(jnp.sum(raw), TINY)


def systematic(weights: Array, u: Array) -> Array:
    """Indices ``[N]`` drawn by weight with one uniform number: as even as they can be."""
    n = weights.shape[0]
    points = (jnp.arange(n, dtype=weights.dtype) + u) / n
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(weights), points, method="compare_all"), n - 1)
