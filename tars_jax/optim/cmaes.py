"""Covariance matrix adaptation: Hansen, The CMA Evolution Strategy: A Tutorial (https://arxiv.org/abs/1604.00772), with active weights.

Full up to 128 coordinates and of low rank above by default, or separable; see :mod:`tars_jax.optim.gaussian`.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tars_jax import struct
from tars_jax.optim.base import Info, Optimizer, Start, State, draw, sampled, summarise
from tars_jax.optim.gaussian import Covariance, Gaussian, continued, learn, start_gaussian
from tars_jax.optim.operators import normal


@struct.dataclass
class CMAParams:
    """Numbers of CMA-ES. All others follow from the number of coordinates and the population."""

    initial_step: float | Array = 1.0  # in the space's initial steps
    covariance_rate: float | Array = 1.0  # scales how fast the covariance is learnt
    active: float | Array = 1.0  # scales the negative weights; 0 learns from the better half only


@struct.dataclass(kw_only=True)
class CMAState(State):
    """The distribution and what was drawn from it."""

    gaussian: Gaussian
    z: Array  # [N, d] standard normal numbers of the population asked for
    beyond: Array  # [N, d] and how far outside reflecting bounds it was drawn


@struct.dataclass(kw_only=True)
class CMAES(Optimizer[CMAState]):
    """CMA-ES. ``tell`` takes the population that was asked for."""

    params: CMAParams = struct.field(default_factory=CMAParams)
    covariance: Covariance = struct.field(pytree_node=False, default="auto")

    def begin(self, common: dict[str, Any], params: CMAParams) -> CMAState:
        x = common["best_x"]
        gaussian = start_gaussian(x, jnp.asarray(params.initial_step, x.dtype), self.covariance)
        z = jnp.zeros((self.pop_size, x.size), x.dtype)
        return CMAState(**common, gaussian=gaussian, z=z, beyond=z)

    def adopt(self, state: CMAState, start: Start, params: CMAParams) -> CMAState:
        """Begin at the best of ``start`` with its step size."""
        best = jnp.argmin(start.fitness)
        gaussian = continued(state.gaussian, start.x[best], start.step, start.shape)
        return replace(state, gaussian=gaussian, best_x=start.x[best], best_f=start.fitness[best])

    def propose(self, state: CMAState, params: CMAParams) -> tuple[Array, CMAState]:
        z = normal(draw(state, state.z.shape))
        x, beyond = sampled(state, state.gaussian, jnp.broadcast_to(state.gaussian.mean[None], z.shape), z)
        return x, replace(state, z=z, beyond=beyond)

    def update(self, state: CMAState, x: Array, fitness: Array, params: CMAParams) -> tuple[CMAState, Info]:
        order = jnp.argsort(fitness)
        weights = jnp.asarray(rank_weights(self.pop_size), x.dtype)
        weights = jnp.where(weights < 0, params.active * weights, weights)
        drawn = (x + state.beyond)[order]
        gaussian = learn(state.gaussian, state.z[order], drawn, fitness[order], weights, state.generation, params.covariance_rate)
        state = replace(state, gaussian=gaussian)
        return state, summarise(state, x, fitness, fitness, gaussian.size, jnp.mean(fitness <= state.best_f))

    def hand_over(self, state: CMAState) -> Start:
        return Start(state.best_x[None], state.best_f[None], state.gaussian.size, state.gaussian)


def rank_weights(pop_size: int) -> np.ndarray:
    """Logarithmic weights by rank: the better half's sum to one, the others are below zero."""
    weights = np.log((pop_size + 1) / 2) - np.log(np.arange(1, pop_size + 1))
    return np.where(weights > 0, weights / weights[weights > 0].sum(), weights)
