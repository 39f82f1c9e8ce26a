"""How the next population is made: EGGROLL's evolution strategy, random search, or any optimizer of `tars_jax.optim`.

A strategy is a frozen set of numbers; its state is a pytree; it searches vectors of D numbers (`space.Space.split`). Members are asked
for in slices, because a population need not be scored in one go.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tars_jax import struct


class Strategy(Protocol):
    """``reduce`` turns fitness [P, R] of all members on the generation's R examples, larger is better, into the values [P] to tell;
    with the key they are all that a state depends on."""

    @property
    def population(self) -> int: ...
    @property
    def same_examples(self) -> bool:
        """Whether fitness is compared between generations, which then must use the same examples."""
        ...

    def init(self, key: jax.Array, start: jax.Array) -> Any: ...
    def members(self, state: Any, first: int, count: int) -> jax.Array:
        """Members ``first`` and on, float32 [count, D]; both even, for pairs stay together."""
        ...

    def reduce(self, fitness: np.ndarray) -> np.ndarray: ...
    def tell(self, state: Any, values: np.ndarray) -> Any: ...
    def centre(self, state: Any) -> jax.Array: ...


@struct.dataclass
class EggrollState:
    """key: of the run; generation: int32; mean: where the population stands; solver: optax's state."""

    key: jax.Array
    generation: jax.Array
    mean: jax.Array
    solver: Any


@dataclasses.dataclass(frozen=True)
class Eggroll:
    """Evolution strategy on low-rank noise (Sarkar et al. 2025, EGGROLL, arXiv 2511.16652; Salimans et al. 2017, arXiv 1703.03864).

    Members come in antithetic pairs, ``mean + sigma e`` and ``mean - sigma e``. The step is ``learning_rate`` times the estimated
    gradient, scaled so that pure noise would move each number by one learning rate; ``decay`` pulls the mean back to the start in
    proportion (anchored weight decay, arXiv 2605.30148). sigma and learning_rate are relative to a matrix's root mean square.
    """

    population: int = 32
    sigma: float = 0.02
    learning_rate: float = 0.02
    decay: float = 0.0
    momentum: float = 0.0
    solver: optax.GradientTransformation | None = None  # instead of learning_rate and momentum: any of optax's
    same_examples: bool = False

    @property
    def _solver(self) -> optax.GradientTransformation:
        return self.solver or optax.sgd(self.learning_rate, self.momentum or None)

    def init(self, key: jax.Array, start: jax.Array) -> EggrollState:
        return EggrollState(key, jnp.int32(0), start, self._solver.init(start))

    def members(self, state: EggrollState, first: int, count: int) -> jax.Array:
        return self._members(state, jnp.int32(first // 2), count)

    def reduce(self, fitness: np.ndarray) -> np.ndarray:
        return standardised(fitness)

    def tell(self, state: EggrollState, values: np.ndarray) -> EggrollState:
        return self._tell(state, jnp.asarray(values))

    def centre(self, state: EggrollState) -> jax.Array:
        return state.mean

    @partial(jax.jit, static_argnames=("self", "count"))
    def _members(self, state: EggrollState, pair: jax.Array, count: int) -> jax.Array:
        steps = self.sigma * jax.vmap(partial(noise, state))(pair + jnp.arange(count // 2, dtype=jnp.int32))
        return state.mean[None] + jnp.stack([steps, -steps], axis=1).reshape(count, -1)

    @partial(jax.jit, static_argnames="self")
    def _tell(self, state: EggrollState, weights: jax.Array) -> EggrollState:
        coefficients = (weights[0::2] - weights[1::2]) / self.population**0.5

        def add(pair: jax.Array, total: jax.Array) -> jax.Array:  # one by one: the noise of all together may be large
            return total - coefficients[pair] * noise(state, pair)

        gradient = lax.fori_loop(0, self.population // 2, add, jnp.zeros_like(state.mean))  # negative: solvers descend
        updates, solver = self._solver.update(gradient, state.solver, state.mean)
        return EggrollState(state.key, state.generation + 1, state.mean * (1 - self.decay) + updates, solver)


def noise(state: EggrollState, pair: jax.Array) -> jax.Array:
    """Standard normal float32 [D] of a pair, by key, generation and pair alone: never stored, drawn again when needed."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.generation), pair)
    return jax.random.normal(key, state.mean.shape, jnp.float32)


def standardised(fitness: np.ndarray) -> np.ndarray:
    """Fitness [P, R] to weights [P] of mean 0 and deviation 1: compared among members on the same example, one deviation for all
    examples, then averaged. Zeros when no member differs from another."""
    centred = np.nan_to_num(fitness - fitness.mean(axis=0), posinf=0.0, neginf=0.0)
    weights = (centred / np.sqrt(centred.var() + 1e-5)).mean(axis=1)
    deviation = weights.std()
    return (weights / deviation if deviation > 1e-8 else np.zeros_like(weights)).astype(np.float32)


def means(fitness: np.ndarray) -> np.ndarray:
    """Mean fitness [P] over the examples, float32; what is no number is worst."""
    return np.nan_to_num(fitness.mean(axis=1), nan=-np.inf).astype(np.float32)


@struct.dataclass
class RandomState:
    draws: EggrollState  # its mean stays at the start
    best: jax.Array
    fitness: jax.Array  # float32 scalar, of the best


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Members drawn around the start, the best of all kept: what evolution has to beat."""

    population: int = 32
    sigma: float = 0.02
    same_examples: bool = True

    @property
    def _drawn(self) -> Eggroll:
        return Eggroll(self.population, self.sigma, learning_rate=0.0)

    def init(self, key: jax.Array, start: jax.Array) -> RandomState:
        return RandomState(self._drawn.init(key, start), start, jnp.float32(-jnp.inf))

    def members(self, state: RandomState, first: int, count: int) -> jax.Array:
        return self._drawn.members(state.draws, first, count)

    def reduce(self, fitness: np.ndarray) -> np.ndarray:
        return means(fitness)

    def tell(self, state: RandomState, values: np.ndarray) -> RandomState:
        top = int(np.argmax(values))
        draws = dataclasses.replace(state.draws, generation=state.draws.generation + 1)
        if not values[top] > float(state.fitness):
            return dataclasses.replace(state, draws=draws)
        best = self.members(state, top // 2 * 2, 2)[top % 2]
        return RandomState(draws, best, jnp.float32(values[top]))

    def centre(self, state: RandomState) -> jax.Array:
        return state.best
