"""Optimization in real time: a cycle is a few generations of each stage, each one compiled call within a limit of milliseconds.

A cycle compiles nothing, gives its buffers back to itself (donation) and brings one small array to the host. How many generations fit is
measured once: no clock can be read inside a compiled program.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tars_jax.errors import InvalidRequest
from tars_jax.optim.annealing import SimulatedAnnealing
from tars_jax.optim.base import Optimizer, Start, as_key, begin, ranked_last
from tars_jax.optim.fitness import Fitness, Kind, as_partial, traced_kind
from tars_jax.optim.genetic import GeneticAlgorithm
from tars_jax.optim.montecarlo import MonteCarlo
from tars_jax.optim.operators import normal, unit
from tars_jax.optim.space import Space, Tree, make_space

STAGES: tuple[Optimizer[Any], ...] = (GeneticAlgorithm(), SimulatedAnnealing(), MonteCarlo())
LIMITS_MS = (5.0, 3.0, 2.0)  # of the stages: GA, SA, MC
CALIBRATION = 11  # calls timed
MAX_GENERATIONS = 1024  # of a stage in a cycle
IMMIGRANTS_STREAM, IMMIGRANTS_DECADES = 3, 3.0
HEADROOM = 0.6  # share of a limit that is planned, so that the slow cycles stay within it too


@dataclass(frozen=True)
class Cycle:
    """What one cycle did."""

    best: float  # fitness of the best individual, on this cycle's data
    generations: tuple[int, ...]  # by stage
    milliseconds: tuple[float, ...]  # by stage, on the clock


class Cycles:
    """The pipeline in real time. The first stage keeps its population from cycle to cycle and receives the best of the last stage."""

    def __init__(
        self,
        fitness: Callable[..., Any],
        x0: Tree,
        stages: Sequence[Optimizer[Any]] = STAGES,
        limits_ms: Sequence[float] = LIMITS_MS,
        key: Array | int = 0,
        kind: Kind | None = None,
    ) -> None:
        """Compile and calibrate. ``fitness`` must be traceable; data that change between cycles go into a ``jax.tree_util.Partial``."""
        found = traced_kind(fitness, x0, stages[0].pop_size, kind)
        if found is None:
            raise InvalidRequest("cycles need a fitness that jax can trace to one number an individual")
        if len(stages) != len(limits_ms):
            raise InvalidRequest(f"{len(stages)} stages need as many limits, got {len(limits_ms)}")
        for stage in stages:
            stage.validate()
        self.stages, self.kind, self.key, self.round = tuple(stages), found, as_key(key), 0
        self.fitness = Fitness(as_partial(fitness), found)
        self.space = make_space(x0, stages[0].bounds, stages[0].mask, stages[0].step)
        x = self.space.flatten(x0)
        noise = normal(unit(self.key, (stages[0].pop_size, x.size), x.dtype)).at[0].set(0)
        population = self.space.confine(self.key, x[None] + self.space.step[None] * noise, jnp.broadcast_to(x, noise.shape))
        self.population = Start(population, jnp.zeros(noise.shape[:1], x.dtype), jnp.ones((), x.dtype))
        self.best = jnp.copy(x)
        self.programs = self._compiled()
        self.generations = tuple(self._calibrated(index, limit) for index, limit in enumerate(limits_ms))

    @property
    def x(self) -> Tree:
        """The best individual of the last cycle, ``x0``'s pytree."""
        return self.space.unflatten(self.best)

    def run(self, fitness: Callable[..., Any] | None = None) -> Cycle:
        """One cycle; ``fitness`` like the first one, with other data of the same shapes. The population is evaluated on them first."""
        if fitness is not None:
            self.fitness = Fitness(as_partial(fitness), self.kind)
        milliseconds = []
        handed, best_f = self.population, self.best
        for index, generations in enumerate(self.generations):
            began = time.perf_counter()
            handed, best_f = self._run_stage(index, handed, generations)
            milliseconds.append((time.perf_counter() - began) * 1e3)
        return Cycle(float(best_f), self.generations, tuple(milliseconds))

    def _run_stage(self, index: int, start: Start, generations: int) -> tuple[Start, Array]:
        """A stage on its donated start: what it hands on, and its best fitness, when they are there."""
        self.round += 1
        numbers = jnp.asarray([self.round, generations], jnp.int32)
        kept, handed, self.best, best_f = self.programs[index](
            self.stages[index], self.fitness, self.space, start, self.best, self.key, numbers
        )
        if index == 0:
            self.population = kept
        return handed, jax.block_until_ready(best_f)

    def _compiled(self) -> list[Any]:
        """The stages' programs, ahead of time: each takes what the one before it hands on."""
        programs, start = [], self.population
        for index, stage in enumerate(self.stages):
            program = jax.jit(partial(_stage, first=index == 0), donate_argnames=("start", "best") if index == 0 else "best")
            arguments = (stage, self.fitness, self.space, start, self.best, self.key, jnp.zeros((2,), jnp.int32))
            programs.append(program.lower(*arguments).compile())
            start = jax.eval_shape(partial(_stage, first=index == 0), *arguments)[1]
        return programs

    def _calibrated(self, index: int, limit_ms: float) -> int:
        """Generations that fit into HEADROOM of a limit: doubled while they do, then cut until they do."""
        generations, took = 1, self._time_stage(index, 1)
        while took <= HEADROOM * limit_ms / 2 and generations < MAX_GENERATIONS:
            generations, took = 2 * generations, self._time_stage(index, 2 * generations)
        while took > HEADROOM * limit_ms and generations > 1:
            generations = max(1, min(generations - 1, int(generations * HEADROOM * limit_ms / took)))
            took = self._time_stage(index, generations)
        return generations

    def _time_stage(self, index: int, generations: int) -> float:
        """Milliseconds that a stage takes, the median of CALIBRATION calls."""
        samples = []
        for _ in range(CALIBRATION):
            start = self._start_of(index)
            began = time.perf_counter()
            self._run_stage(index, start, generations)
            samples.append((time.perf_counter() - began) * 1e3)
        return float(np.median(samples))

    def _start_of(self, index: int) -> Start:
        """Something for a stage to start from: what the stages before it hand on after one generation."""
        start = self.population
        for before in range(index):
            start, _ = self._run_stage(before, start, 1)
        return jax.block_until_ready(start)


def _stage(
    optimizer: Optimizer[Any], fitness: Fitness, space: Space, start: Start, best: Array, key: Array, numbers: Array, first: bool
) -> tuple[Start | None, Start, Array, Array]:
    """Generations of one stage: what it keeps, what it hands on, the best individual and its fitness.

    ``numbers``: of the call, and of its generations. The first stage evaluates its population anew, with the best of all in it.
    """
    call, generations = numbers
    key = jax.random.fold_in(key, call)
    if first:
        x = _renewed(space, start.x, best, key)
        start = Start(x, ranked_last(fitness(space, x)), start.step)
    state = begin(optimizer, optimizer.params, space, space.unflatten(best), key, generations, start)

    def generation(_: int, state: Any) -> Any:
        x, state = optimizer.propose(state, optimizer.params)
        return optimizer.learn(state, x, fitness(space, x))[0]

    state = lax.fori_loop(0, generations, generation, state)
    handed = optimizer.hand_over(state)
    return (jax.tree.map(jnp.copy, handed._replace(shape=None)) if first else None), handed, state.best_x, state.best_f


def _renewed(space: Space, x: Array, best: Array, key: Array) -> Array:
    """A population ``[N, d]``, best first, made ready for data that may have changed (Grefenstette, Genetic Algorithms for Changing
    Environments, 1992): the worse half gives way to ``best`` and immigrants around it, at distances of all sizes up to the initial steps.
    """
    half = x.shape[0] // 2
    u = unit(jax.random.fold_in(key, IMMIGRANTS_STREAM), (half, x.shape[1] + 1), x.dtype)
    parent = jnp.broadcast_to(best[None], (half, best.size))
    away = space.step[None] * 10 ** (-IMMIGRANTS_DECADES * u[:, :1]) * normal(u[:, 1:])
    newcomers = space.confine(key, parent + away, parent).at[0].set(best)
    return jnp.concatenate([x[: x.shape[0] - half], newcomers])
