"""A normal distribution that learns from weighted samples: mean, step size and the factor of its covariance.

The factor M of C = M M^T is adapted itself, without eigenvalues, so float32 serves condition numbers of C up to about 1e12: Beyer
and Sendhoff, Simplify Your Covariance Matrix Adaptation Evolution Strategy (2017, https://doi.org/10.1109/TEVC.2017.2680320), here
with the slow path and the negative weights of Hansen, The CMA Evolution Strategy: A Tutorial (https://arxiv.org/abs/1604.00772).
Separable: Ros and Hansen, A Simple Modification in CMA-ES (2008). Low rank: Loshchilov, Glasmachers and Beyer, Large Scale Black-box
Optimization by Limited-Memory Matrix Adaptation (2017, https://arxiv.org/abs/1705.06693); there the step size follows Ait Elhara, Auger
and Hansen, A Median Success Rule for Non-Elitist Evolution Strategies (2013), because a path in many coordinates learns it too slowly.
"""

from dataclasses import replace
from math import log
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tars_jax import struct

Covariance = Literal["auto", "full", "separable", "low_rank"]
MAX_FULL = 128  # coordinates up to which "auto" keeps a full matrix
QUANTILE = 0.3  # of a generation's fitness, which the median of the next has to reach if steps are to stay as they are


@struct.dataclass
class Gaussian:
    """N(mean, sigma^2 S M M^T S) with S the initial steps of the space."""

    mean: Array  # [d]
    sigma: Array  # step size, in initial steps
    factor: Array  # M: [d, d] full, [d] separable, [r, d] directions of a low-rank product
    path: Array  # [d] conjugate evolution path
    trail: Array  # [d] slow evolution path, in the coordinates of the samples
    success: Array  # low rank: smoothed share of samples that beat the last generation's quantile, from -1 to 1
    quantile: Array  # low rank: fitness that QUANTILE of the last generation's samples reached
    kind: str = struct.field(pytree_node=False)

    @property
    def size(self) -> Array:
        """Root mean square of the coordinates' standard deviations, in initial steps."""
        if self.kind == "low_rank":
            return self.sigma
        return self.sigma * jnp.sqrt(jnp.sum(self.factor**2) / self.mean.size)

    def moves(self, z: Array) -> Array:
        """Standard normal ``z [N, d]`` as moves from the mean, in initial steps."""
        if self.kind == "full":
            return self.sigma * (z @ self.factor.T)
        if self.kind == "separable":
            return self.sigma * z * self.factor[None]
        for direction, rate in zip(self.factor, _direction_rates(*self.factor.shape), strict=True):
            z = (1 - rate) * z + rate * (z @ direction)[:, None] * direction[None]
        return self.sigma * z


def start_gaussian(mean: Array, sigma: Array, covariance: Covariance) -> Gaussian:
    """An isotropic distribution around ``mean``."""
    d, zeros = mean.size, jnp.zeros_like(mean)
    kind = ("full" if d <= MAX_FULL else "low_rank") if covariance == "auto" else covariance
    rank = min(d, 4 + int(3 * log(d + 1)))
    factor = {"full": jnp.eye(d, dtype=mean.dtype), "separable": jnp.ones_like(mean), "low_rank": jnp.zeros((rank, d), mean.dtype)}[kind]
    return Gaussian(mean, jnp.asarray(sigma, mean.dtype), factor, zeros, zeros, zeros[0], zeros[0] + jnp.inf, kind)


def continued(gaussian: Gaussian, mean: Array, step: Array, learnt: Gaussian | None) -> Gaussian:
    """The start of another stage: what the one before has learnt if it is of the same kind, else ``mean`` with steps of size ``step``."""
    if learnt is not None and learnt.kind == gaussian.kind:
        return learnt
    return replace(gaussian, mean=mean, sigma=jnp.asarray(step, mean.dtype))


def _direction_rates(rank: int, d: int) -> list[float]:
    return [1 / (1.5**i * d) for i in range(rank)]


def directions(z: Array) -> Array:
    """Numbers ``z [N, d]`` of another distribution, none longer than normal ones are: their directions can be learnt from."""
    return z * jnp.minimum(1, z.shape[1] ** 0.5 / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12))


def learn(gaussian: Gaussian, z: Array, x: Array, fitness: Array, weights: Array, generation: Array, rate: Any = 1.0) -> Gaussian:
    """The distribution after a generation: ``x [N, d]``, drawn with the standard normal numbers ``z [N, d]``.

    ``weights [N]`` above zero pull, those below push away. Individuals without a finite fitness never pull; a generation without any
    other changes nothing. ``rate`` scales how fast the covariance is learnt.
    """
    weights = jnp.where((weights > 0) & ~jnp.isfinite(fitness), 0, weights)
    total = jnp.sum(jnp.maximum(weights, 0))
    weights = jnp.where(weights > 0, weights / jnp.where(total > 0, total, 1), weights)
    mean = gaussian.mean + jnp.maximum(weights, 0) @ (x - gaussian.mean[None])
    learnt = _learn(gaussian, z, mean, fitness, weights, generation, rate)
    return jax.tree.map(lambda new, old: jnp.where(total > 0, new, old), learnt, gaussian)


def _learn(gaussian: Gaussian, z: Array, mean: Array, fitness: Array, weights: Array, generation: Array, rate: Any) -> Gaussian:
    d = gaussian.mean.size
    positive = jnp.maximum(weights, 0)
    mu = 1 / jnp.maximum(jnp.sum(positive**2), 1e-12)  # effective number of parents
    centre = positive @ z
    c_path = (mu + 2) / (d + mu + 5)
    path = (1 - c_path) * gaussian.path + jnp.sqrt(c_path * (2 - c_path) * mu) * centre
    if gaussian.kind == "low_rank":
        return _learn_directions(_paced(replace(gaussian, mean=mean, path=path), fitness), centre, mu, z.shape[0])
    damping = 1 + 2 * jnp.maximum(0, jnp.sqrt((mu - 1) / (d + 1)) - 1) + c_path
    length, expected = jnp.linalg.norm(path), d**0.5 * (1 - 1 / (4 * d) + 1 / (21 * d**2))
    sigma = gaussian.sigma * jnp.exp(jnp.minimum(1, c_path / damping * (length / expected - 1)))
    moved = replace(gaussian, mean=mean, sigma=sigma, path=path)
    started = 1 - (1 - c_path) ** (2 * generation.astype(z.dtype))
    steady = (length / jnp.sqrt(started) < (1.4 + 2 / (d + 1)) * expected).astype(z.dtype)
    return _learn_factor(moved, z, centre, weights, mu, steady, rate)


def _learn_factor(gaussian: Gaussian, z: Array, centre: Array, weights: Array, mu: Array, steady: Array, rate: Any) -> Gaussian:
    d = gaussian.mean.size
    faster = (d + 2) / 3 if gaussian.kind == "separable" else 1.0
    c_trail = (4 + mu / d) / (d + 4 + 2 * mu / d)
    trail = (1 - c_trail) * gaussian.trail + steady * jnp.sqrt(c_trail * (2 - c_trail) * mu) * centre
    c_one = rate * faster * 2 / ((d + 1.3) ** 2 + mu)
    c_mu = jnp.minimum(1 - c_one, rate * faster * 2 * (mu - 1.75 + 1 / mu) / ((d + 2) ** 2 + mu))
    negative = jnp.minimum(weights, 0)
    mu_negative = jnp.sum(negative) ** 2 / jnp.maximum(jnp.sum(negative**2), 1e-12)
    limit = jnp.minimum(jnp.minimum(1 + c_one / c_mu, 1 + 2 * mu_negative / (mu + 2)), (1 - c_one - c_mu) / (d * c_mu))
    # Short z, or none, would weigh without limit.
    negative = negative * jnp.maximum(limit, 0) / jnp.maximum(-jnp.sum(negative), 1e-12) * d / jnp.maximum(jnp.sum(z**2, 1), d / 4)
    weights = jnp.maximum(weights, 0) + negative
    if gaussian.kind == "separable":
        change = 0.5 * (c_one * (trail**2 - 1) + c_mu * (weights @ z**2 - jnp.sum(weights)))
        return replace(gaussian, factor=gaussian.factor * jnp.exp(change), trail=trail * jnp.exp(-change))
    eye = jnp.eye(d, dtype=z.dtype)
    change = 0.5 * (c_one * (trail[:, None] * trail[None] - eye) + c_mu * ((weights[:, None] * z).T @ z - jnp.sum(weights) * eye))
    # The trail stays the same vector in space while the coordinates of the samples change under it.
    return replace(gaussian, factor=gaussian.factor + gaussian.factor @ change, trail=trail - change @ trail)


def _paced(gaussian: Gaussian, fitness: Array) -> Gaussian:
    """Longer steps while most samples beat the last generation's quantile, shorter ones else."""
    excess = jnp.where(jnp.isinf(gaussian.quantile), 0, 2 * jnp.mean(fitness <= gaussian.quantile) - 1).astype(fitness.dtype)
    success = 0.7 * gaussian.success + 0.3 * excess
    sigma = gaussian.sigma * jnp.exp(success / 2)
    quantile = jnp.sort(fitness)[int(QUANTILE * fitness.shape[0])]
    return replace(gaussian, sigma=sigma, success=success, quantile=quantile)


def _learn_directions(gaussian: Gaussian, centre: Array, mu: Array, pop_size: int) -> Gaussian:
    rank, d = gaussian.factor.shape
    rates = jnp.asarray([min(1.0, pop_size / (4.0**i * d)) for i in range(rank)], centre.dtype)[:, None]
    return replace(gaussian, factor=(1 - rates) * gaussian.factor + jnp.sqrt(mu * rates * (2 - rates)) * centre[None])
