"""Any optimizer of `tars_jax.optim` as a strategy: it searches a few numbers, those of the space or the amounts of random directions.

Genetic algorithms, annealing and Monte Carlo are at home in tens of dimensions, not in the hundred thousand of an adapter; where many
directions lead to a better model, a random few of them do too (random embeddings: Wang et al. 2016, arXiv 1301.1942).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax import struct
from tars_jax.evolve.settings import Settings
from tars_jax.evolve.strategy import means
from tars_jax.optim import GeneticAlgorithm, HybridOptimization, MonteCarlo, Optimizer, SimulatedAnnealing

DIRECTIONS = 256
BITS = 32  # of a draw
OPTIMIZERS: dict[str, type[Optimizer[Any]]] = {
    "genetic": GeneticAlgorithm,
    "annealing": SimulatedAnnealing,
    "montecarlo": MonteCarlo,
    "hybrid": HybridOptimization,
}


@struct.dataclass
class SearchedState:
    """key: of the directions; start: float32 [D]; inner: the optimizer's state; asked: float32 [P, n], n = min(D, DIRECTIONS)."""

    key: jax.Array
    start: jax.Array
    inner: Any
    asked: jax.Array


@dataclasses.dataclass(frozen=True)
class Searched:
    """An optimizer's population as updates. ``horizon``: generations that its schedules span."""

    optimizer: Optimizer[Any]
    horizon: int
    same_examples: bool = True  # it compares fitness between generations

    @property
    def population(self) -> int:
        return self.optimizer.pop_size

    def init(self, key: jax.Array, start: jax.Array) -> SearchedState:
        own, theirs = jax.random.split(key)
        inner = self.optimizer.init(theirs, jnp.zeros(min(len(start), DIRECTIONS), jnp.float32), horizon=self.horizon)
        asked, inner = _ask(self.optimizer, inner)
        return SearchedState(own, start, inner, asked)

    def members(self, state: SearchedState, first: int, count: int) -> jax.Array:
        return combined(state.key, state.start, lax.slice_in_dim(state.asked, first, first + count))

    def reduce(self, fitness: np.ndarray) -> np.ndarray:
        return means(fitness)

    def tell(self, state: SearchedState, values: np.ndarray) -> SearchedState:
        inner = _tell(self.optimizer, state.inner, state.asked, -jnp.asarray(values))
        asked, inner = _ask(self.optimizer, inner)
        return SearchedState(state.key, state.start, inner, asked)

    def centre(self, state: SearchedState) -> jax.Array:
        return combined(state.key, state.start, self.optimizer.best(state.inner)[0][None])[0]


def searched(settings: Settings) -> Searched:
    """The strategy that the settings name; members first differ from the start by twice the settings' sigma."""
    return Searched(OPTIMIZERS[settings.strategy](pop_size=settings.population, step=2 * settings.sigma), settings.horizon)


@jax.jit
def combined(key: jax.Array, start: jax.Array, amounts: jax.Array) -> jax.Array:
    """Start plus amounts [N, n] of n directions: [N, D]; where n is D, of its numbers themselves. Random directions are drawn again each
    time, never stored, and so long that a number differs from the start by what the amounts are. They are made of signs, which do as
    well as normal numbers (Achlioptas 2003, Database-friendly Random Projections) and of which a draw of 32 bits gives 32."""
    count, n = amounts.shape
    if n == len(start):
        return start[None] + amounts
    groups = -(-n // BITS)
    scaled = jnp.pad(amounts / n**0.5, ((0, 0), (0, groups * BITS - n))).reshape(count, groups, BITS)
    places = jnp.arange(BITS, dtype=jnp.uint32)[:, None]

    def add(group: jax.Array, total: jax.Array) -> jax.Array:
        drawn = jax.random.bits(jax.random.fold_in(key, group), start.shape, jnp.uint32)
        signs = 1.0 - 2.0 * ((drawn[None] >> places) & jnp.uint32(1)).astype(jnp.float32)
        return total + scaled[:, group] @ signs

    return lax.fori_loop(0, groups, add, jnp.tile(start, (count, 1)))


@jax.jit
def _ask(optimizer: Optimizer[Any], state: Any) -> tuple[jax.Array, Any]:
    return optimizer.ask(state)


@jax.jit
def _tell(optimizer: Optimizer[Any], state: Any, asked: jax.Array, values: jax.Array) -> Any:
    return optimizer.tell(state, asked, values)[0]
