"""What every optimizer is: ``init``, ``ask`` and ``tell``, pure functions of a state, minimising.

An optimizer is a frozen pytree of hyper-parameters (``params``, numbers that may be traced and vmapped) and choices (static). Its state
is a pytree too and holds the random key, so ``ask`` and ``tell`` alone are reproducible, and ``jax.vmap`` over states makes restarts.
"""

import abc
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.gaussian import Gaussian
from tars_jax.optim.operators import normal, unit
from tars_jax.optim.space import Box, Space, Tree, make_space

BOUNDS_STREAM = 2  # of random numbers; optimizers use 0 and 1
DEFAULT_HORIZON = 300  # generations that a schedule spans where nobody says how long the run will be


@struct.dataclass(kw_only=True)
class State:
    """What all optimizers remember. Vectors are in the coordinates of ``space``."""

    space: Space
    key: Array
    generation: Array  # int32, generations told
    evals: Array  # int32, individuals told
    horizon: Array  # int32, generations the run is planned to have
    best_x: Array  # [d] the best individual seen
    best_f: Array  # its fitness; infinity before the first tell


@struct.dataclass
class Info:
    """One generation in numbers. Fitness statistics are over the finite values."""

    best: Array  # best fitness seen so far
    average: Array  # of this generation
    deviation: Array  # standard deviation of this generation
    spread: Array  # largest minus smallest fitness that the optimizer holds on to
    diversity: Array  # root mean square distance from the centroid, in initial steps
    step: Array  # step size, in initial steps
    accepted: Array  # share of this generation that the optimizer kept


class Start(NamedTuple):
    """What one stage hands to the next: evaluated individuals and where the search stands."""

    x: Array  # [N, d]
    fitness: Array  # [N]
    step: Array  # step size, in initial steps
    shape: Gaussian | None = None  # the distribution that was learnt, if any


StateT = TypeVar("StateT", bound=State)


@struct.dataclass(kw_only=True)
class Optimizer(abc.ABC, Generic[StateT]):
    """Base of all optimizers. ``pop_size`` individuals are asked for and told each generation.

    ``bounds``, ``mask`` and ``step`` (initial standard deviations) follow ``x0``'s structure or a prefix of it, see
    :func:`tars_jax.optim.space.make_space`. ``params`` of the methods overrides the optimizer's own parameter set.
    """

    pop_size: int = struct.field(pytree_node=False, default=30)
    bounds: Box | None = None
    mask: Tree = None
    step: Tree = None
    params: Any = None

    @property
    def paced(self) -> bool:
        """Whether it keeps to a schedule over the planned run, so that standing still before the end means nothing."""
        return False

    @property
    def takes_guests(self) -> bool:
        """Whether it may be told individuals that it did not ask for."""
        return False

    def default_params(self, x0: Tree = None) -> Any:
        """The parameter set used when none is given."""
        return self.params

    def init(
        self, key: Array | int, x0: Tree, params: Any = None, *, horizon: int | Array | None = None, start: Start | None = None
    ) -> StateT:
        """The state of a search around ``x0``. ``horizon``: generations planned, for schedules; ``start``: evaluated individuals."""
        self.validate()
        params = self.params if params is None else params
        space = make_space(x0, self.bounds, self.mask, self.step)
        planned = jnp.asarray(DEFAULT_HORIZON if horizon is None else horizon, jnp.int32)
        return _begin(self, params, space, x0, as_key(key), planned, start)

    def ask(self, state: StateT, params: Any = None) -> tuple[Tree, StateT]:
        """The next population: ``x0``'s pytree with a leading axis of ``pop_size``; and the state to ``tell``."""
        x, state = self.propose(state, self.params if params is None else params)
        return jax.vmap(state.space.unflatten)(x), state

    def tell(self, state: StateT, population: Tree, fitness: Array, params: Any = None) -> tuple[StateT, Info]:
        """Take in the fitness ``[pop_size]`` (smaller is better, NaN ranks worst) of a population."""
        x = jax.vmap(state.space.flatten)(population)
        return self.learn(state, x, fitness, params)

    def learn(self, state: StateT, x: Array, fitness: Array, params: Any = None) -> tuple[StateT, Info]:
        """``tell`` for vectors ``x [N, d]``."""
        fitness = jnp.asarray(fitness)
        if fitness.shape != (self.pop_size,):
            raise InvalidRequest(f"fitness has shape {fitness.shape}, a population of {self.pop_size} needs ({self.pop_size},)")
        fitness = ranked_last(fitness.astype(x.dtype))
        state = with_best(state, x, fitness)
        state = replace(state, generation=state.generation + 1, evals=state.evals + self.pop_size)
        return self.update(state, x, fitness, self.params if params is None else params)

    def best(self, state: StateT) -> tuple[Tree, Array]:
        """The best individual seen and its fitness."""
        return state.space.unflatten(state.best_x), state.best_f

    def validate(self) -> None:
        """Raise InvalidRequest for choices that cannot work."""
        if self.pop_size < 4:
            raise InvalidRequest(f"pop_size={self.pop_size}: at least 4 individuals are needed")

    # What an optimizer defines: on vectors, fitness free of NaN.

    @abc.abstractmethod
    def begin(self, common: dict[str, Any], params: Any) -> StateT:
        """The state before the first generation; ``common``: what every state holds."""

    @abc.abstractmethod
    def adopt(self, state: StateT, start: Start, params: Any) -> StateT:
        """The state, begun from individuals that another stage has evaluated."""

    @abc.abstractmethod
    def propose(self, state: StateT, params: Any) -> tuple[Array, StateT]:
        """The next population ``[pop_size, d]``."""

    @abc.abstractmethod
    def update(self, state: StateT, x: Array, fitness: Array, params: Any) -> tuple[StateT, Info]:
        """What a population's fitness teaches."""

    @abc.abstractmethod
    def hand_over(self, state: StateT) -> Start:
        """What the next stage begins with."""


def begin(optimizer: Optimizer[StateT], params: Any, space: Space, x0: Tree, key: Array, horizon: Array, start: Start | None) -> StateT:
    """``init`` in a space that is known."""
    x = space.flatten(x0)
    zero, inf = jnp.int32(0), jnp.full((), jnp.inf, x.dtype)
    common = {"space": space, "key": key, "generation": zero, "evals": zero, "horizon": horizon, "best_x": x, "best_f": inf}
    state = optimizer.begin(common, params)
    return state if start is None else optimizer.adopt(state, start, params)


_begin = jax.jit(begin)  # one program instead of an operation at a time


def as_key(key: Array | int) -> Array:
    """A key from a seed; keys pass."""
    return jax.random.key(key) if isinstance(key, int) else key


def draw(state: State, shape: tuple[int, ...], stream: int = 0) -> Array:
    """Uniform numbers in (0, 1) of this generation: the same for the same key, generation and stream."""
    return unit(jax.random.fold_in(jax.random.fold_in(state.key, stream), state.generation), shape, state.best_x.dtype)


def confined(state: State, x: Array, parent: Array) -> Array:
    """``x [N, d]`` inside the bounds, see :meth:`Space.confine`."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, BOUNDS_STREAM), state.generation)
    return state.space.confine(key, x, parent)


def sampled(state: State, gaussian: Gaussian, centre: Array, z: Array) -> tuple[Array, Array]:
    """Individuals ``[N, d]`` at moves ``z [N, d]`` from ``centre [N, d]``, inside the bounds; and how far beyond them they were drawn.

    Reflection makes a fitness on all numbers of one on a box: learning takes place there, or an optimum on a bound would seem to lie
    always ahead and steps never shorten. Clipped and redrawn individuals are learnt from where they are.
    """
    drawn = centre + state.space.step[None] * gaussian.moves(z)
    x = confined(state, drawn, centre)
    return x, drawn - x if state.space.mode == "reflect" else jnp.zeros_like(x)


def scatter(state: State, u: Array) -> Array:
    """A first population ``[N, d]`` from uniform numbers: the best so far (``x0``), and normal draws around it with the initial steps."""
    return state.best_x[None] + state.space.step[None] * normal(u).at[0].set(0)


def ranked_last(fitness: Array) -> Array:
    """NaN as infinity: the worst rank."""
    return jnp.where(jnp.isnan(fitness), jnp.inf, fitness)


def tied(fitness: Array, share: float | Array = 0.25) -> Array:
    """Whether the better ``share`` of ``fitness [N]`` is equal: what is left of its differences is rounding, or a plateau."""
    ordered = jnp.sort(fitness)
    return ordered[jnp.asarray(share * fitness.shape[0], jnp.int32)] <= ordered[0]


def patience(state: State, pop_size: int) -> int:
    """Generations of ``pop_size`` in which a search that can still move finds something better (Hansen's tutorial, B.3)."""
    return 10 + -(-30 * state.space.size // pop_size)


def with_best(state: StateT, x: Array, fitness: Array) -> StateT:
    """Remember the best of ``x [N, d]`` if it beats the best so far."""
    first = jnp.argmin(fitness)
    better = fitness[first] < state.best_f
    return replace(state, best_x=jnp.where(better, x[first], state.best_x), best_f=jnp.where(better, fitness[first], state.best_f))


def summarise(state: State, x: Array, fitness: Array, told: Array, step: Array, accepted: Array) -> Info:
    """Numbers of a generation: ``x``, ``fitness`` are what the optimizer holds, ``told`` the generation's own fitness."""
    finite = jnp.isfinite(told)
    count = jnp.maximum(jnp.sum(finite), 1).astype(told.dtype)
    mean = jnp.sum(jnp.where(finite, told, 0)) / count
    variance = jnp.sum(jnp.where(finite, (told - mean) ** 2, 0)) / count
    held = jnp.isfinite(fitness)
    spread = jnp.max(jnp.where(held, fitness, -jnp.inf)) - jnp.min(jnp.where(held, fitness, jnp.inf))
    scaled = (x - jnp.mean(x, 0, keepdims=True)) / state.space.step[None]
    diversity = jnp.sqrt(jnp.mean(scaled**2))
    dtype = told.dtype
    return Info(
        state.best_f,
        mean,
        jnp.sqrt(variance),
        jnp.where(jnp.any(held), spread, jnp.inf),
        diversity,
        step.astype(dtype),
        accepted.astype(dtype),
    )
