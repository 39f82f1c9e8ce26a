"""Calling a fitness function: of an individual or a population, traced or not, on one device or over a mesh."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.tree_util import Partial

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.space import Space, Tree

Kind = Literal["individual", "population"]


@struct.dataclass
class Fitness:
    """A traceable fitness on vectors. Arrays inside a ``Partial`` are arguments of the compiled program, not constants in it."""

    call: Partial
    kind: Kind = struct.field(pytree_node=False, default="individual")
    sign: int = struct.field(pytree_node=False, default=1)  # -1 maximises
    sharding: NamedSharding | None = struct.field(pytree_node=False, default=None)  # of the population's axis

    def __call__(self, space: Space, x: Array) -> Array:
        """Fitness ``[N]`` of ``x [N, d]``, smaller is better."""
        if self.sharding is not None:
            x = jax.lax.with_sharding_constraint(x, self.sharding)
        if self.kind == "individual":
            values = jax.vmap(lambda vector: self.call(space.unflatten(vector)))(x)
        else:
            values = self.call(jax.vmap(space.unflatten)(x))
        if self.sharding is not None:
            values = jax.lax.with_sharding_constraint(values, NamedSharding(self.sharding.mesh, jax.sharding.PartitionSpec()))
        if values.shape != x.shape[:1]:
            raise InvalidRequest(f"the fitness of {x.shape[0]} individuals has shape {values.shape}, one number each is needed")
        return self.sign * values.astype(x.dtype)


def as_partial(fitness: Callable[..., Any]) -> Partial:
    """A callable as a pytree whose compiled program is found again for the same function."""
    if isinstance(fitness, Partial):
        return fitness
    try:
        hash(fitness)
    except TypeError:
        return Partial(lambda x: fitness(x))
    return Partial(fitness)


def traced_kind(fitness: Callable[..., Any], x0: Tree, pop_size: int, kind: Kind | None = None) -> Kind | None:
    """Whether jax can trace a fitness, and on what; None if it cannot.

    Tried, unless ``kind`` says it, on an individual, which has to give a scalar, then on a population, which has to give ``[pop_size]``.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype), x0)
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((pop_size, *leaf.shape), leaf.dtype), one)
    candidates: list[tuple[Kind, Tree, tuple[int, ...]]] = [("individual", one, ()), ("population", many, (pop_size,))]
    for candidate, shapes, expected in candidates:
        if kind not in (None, candidate):
            continue
        try:
            out = jax.eval_shape(fitness, shapes)
        except Exception:  # whatever a black box does with a tracer; the host loop shows its own errors
            continue
        if isinstance(out, jax.ShapeDtypeStruct) and out.shape == expected:
            return candidate
    return None


class HostFitness:
    """A black-box fitness, called with numpy pytrees; individuals in ``workers`` threads.

    Whether it takes an individual or a population is found out on the first population, unless ``kind`` says so.
    """

    def __init__(self, fitness: Callable[..., Any], kind: Kind | None, sign: int, workers: int) -> None:
        self.fitness, self.kind, self.sign, self.workers = fitness, kind, sign, workers
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Hold the worker threads for the length of a run."""
        if self.workers == 1:
            yield
            return
        with ThreadPoolExecutor(self.workers) as self._pool:
            yield

    def __call__(self, space: Space, x: Array) -> np.ndarray:
        population = jax.tree.map(np.asarray, jax.vmap(space.unflatten)(x))
        individuals = [jax.tree.map(lambda leaf, i=i: leaf[i], population) for i in range(x.shape[0])]
        known: list[float] = []
        if self.kind is None:
            self.kind, known = self._find_kind(individuals[0])
        if self.kind == "population":
            values = np.asarray(self.fitness(population), x.dtype)
        else:
            run = map if self._pool is None else self._pool.map
            values = np.asarray(known + [_scalar(value) for value in run(self.fitness, individuals[len(known) :])], x.dtype)
        if values.shape != (x.shape[0],):
            raise InvalidRequest(f"the fitness of {x.shape[0]} individuals has shape {values.shape}, one number each is needed")
        return self.sign * values

    def _find_kind(self, individual: Tree) -> tuple[Kind, list[float]]:
        try:
            return "individual", [_scalar(self.fitness(individual))]
        except (TypeError, ValueError, IndexError, InvalidRequest):
            return "population", []  # a mistake in an individual's fitness fails there again, in its own words


def _scalar(value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise InvalidRequest(f"the fitness of one individual has shape {array.shape}, one number is needed")
    return float(array.reshape(()))
