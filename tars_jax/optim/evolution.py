"""Evolution strategy by estimated gradients: any optax transform follows the gradient of a smoothed fitness.

Antithetic pairs and centred ranks after Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning
(https://arxiv.org/abs/1703.03864); the schedule of the step is any optax schedule.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, Start, State, confined, draw, summarise
from tars_jax.optim.operators import normal


@struct.dataclass
class EvolutionParams:
    """Numbers of an evolution strategy."""

    sigma: float | Array = 0.1  # smoothing, in the space's initial steps; multiplied by ``sigma_schedule``


@struct.dataclass(kw_only=True)
class EvolutionState(State):
    """The mean, and what the transform remembers."""

    mean: Array  # [d]
    z: Array  # [N, d] of the population asked for
    sigma: Array  # of that population
    transform: Any


@struct.dataclass(kw_only=True)
class EvolutionStrategy(Optimizer[EvolutionState]):
    """Gradient-estimating evolution strategy. ``transform`` (optax; Adam with rate 0.1 by default) gets the gradient in units of the
    initial steps; ``sigma_schedule`` (optax) multiplies the smoothing by generation.
    """

    params: EvolutionParams = struct.field(default_factory=EvolutionParams)
    transform: Any = struct.field(pytree_node=False, default=None)
    sigma_schedule: Callable[[Any], Any] | None = struct.field(pytree_node=False, default=None)

    def validate(self) -> None:
        Optimizer.validate(self)
        if self.pop_size % 2:
            raise InvalidRequest(f"pop_size={self.pop_size}: antithetic pairs need an even population")

    @property
    def solver(self) -> Any:
        """The transform in use."""
        import optax

        return self.transform or optax.adam(0.1)

    def begin(self, common: dict[str, Any], params: EvolutionParams) -> EvolutionState:
        x = common["best_x"]
        z, sigma = jnp.zeros((self.pop_size, x.size), x.dtype), jnp.asarray(params.sigma, x.dtype)
        return EvolutionState(**common, mean=x, z=z, sigma=sigma, transform=self.solver.init(jnp.zeros_like(x)))

    def adopt(self, state: EvolutionState, start: Start, params: EvolutionParams) -> EvolutionState:
        """Begin at the best of ``start``."""
        best = jnp.argmin(start.fitness)
        return replace(state, mean=start.x[best], best_x=start.x[best], best_f=start.fitness[best])

    def propose(self, state: EvolutionState, params: EvolutionParams) -> tuple[Array, EvolutionState]:
        half = normal(draw(state, (self.pop_size // 2, state.space.size)))
        z = jnp.concatenate([half, -half])
        with jax.numpy_dtype_promotion("standard"):
            scheduled = 1.0 if self.sigma_schedule is None else self.sigma_schedule(state.generation)
        sigma = jnp.asarray(params.sigma * scheduled, z.dtype)
        x = state.mean[None] + sigma * state.space.step[None] * z
        mean = jnp.broadcast_to(state.mean[None], x.shape)
        return confined(state, x, mean), replace(state, z=z, sigma=sigma)

    def update(self, state: EvolutionState, x: Array, fitness: Array, params: EvolutionParams) -> tuple[EvolutionState, Info]:
        gradient = centred_ranks(fitness) @ state.z / (self.pop_size * state.sigma)
        unit_mean = state.mean / state.space.step
        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            change, transform = self.solver.update(gradient, state.transform, unit_mean)
        mean = jnp.clip((unit_mean + change) * state.space.step, state.space.lower, state.space.upper)
        state = replace(state, mean=mean, transform=transform)
        return state, summarise(state, x, fitness, fitness, state.sigma, jnp.ones_like(state.sigma))

    def hand_over(self, state: EvolutionState) -> Start:
        return Start(state.best_x[None], state.best_f[None], state.sigma)


def centred_ranks(fitness: Array) -> Array:
    """Fitness ``[N]`` as ranks in [-0.5, 0.5], the worst highest; equal values share theirs."""
    below = jnp.sum(fitness[None, :] < fitness[:, None], 1)
    equal = jnp.sum(fitness[None, :] == fitness[:, None], 1)
    return (below.astype(fitness.dtype) + 0.5 * (equal - 1).astype(fitness.dtype)) / (fitness.shape[0] - 1) - 0.5
