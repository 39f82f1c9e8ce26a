"""A search under way: the compiled loop, the host loop, and what the host does between slices of them.

A fitness that jax can trace runs in one compiled ``lax.while_loop`` which leaves early; a black box in a host loop around the same
``propose`` and ``learn``. Both are cut into slices where the host has something to do: a clock, a callback, a checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tars_jax import struct
from tars_jax.errors import FlatFitness
from tars_jax.optim import checkpoint
from tars_jax.optim.base import Info, Optimizer
from tars_jax.optim.convergence import Budget, Monitor, Reason, Stop, judge, start_monitor
from tars_jax.optim.fitness import Fitness, HostFitness
from tars_jax.optim.space import Tree

MAX_SLICE = 4096  # generations whose history one call of the compiled loop can hold
SLICE_SECONDS = 0.1  # how often the clock is read under a time budget
FIELDS = tuple(Info.__dataclass_fields__)  # columns of a history
Callback = Callable[[int, dict[str, float]], bool | None]


@dataclass(frozen=True)
class Result:
    """What a search found."""

    x: Tree  # the best individual, x0's pytree
    fun: float  # its fitness
    evals: int
    generations: int
    history: np.recarray  # a row a generation, with the fields of Info
    reason: str  # target, stagnation, spread, diversity, step, evals, generations, seconds or callback
    seconds: float
    state: Any  # the optimizer's state, to go on from


@struct.dataclass
class Run:
    """A search under way, as a pytree."""

    state: Any
    monitor: Monitor
    history: Array  # [C, fields] the last C generations, generation g in row (g - 1) % C


def start_run(state: Any, max_generations: int | None) -> Run:
    """A run before its first generation; the history's size is a power of two, so that few programs serve all budgets."""
    rows = MAX_SLICE if max_generations is None else min(MAX_SLICE, 1 << (max_generations - 1).bit_length())
    return Run(state, start_monitor(state), jnp.zeros((rows, len(FIELDS)), state.best_f.dtype))


def advance(optimizer: Optimizer[Any], fitness: Fitness, stop: Stop, run: Run, limit: Array, until: Array) -> Run:
    """Generations until a test hits or ``until`` are told; ``limit`` is what the budget pays for. Pure: may be vmapped over runs."""

    def body(run: Run) -> Run:
        x, state = optimizer.propose(run.state, optimizer.params)
        return record(optimizer, stop, replace(run, state=state), x, fitness(state.space, x), limit)

    return lax.while_loop(lambda run: (run.monitor.reason == Reason.RUNNING) & (run.state.generation < until), body, run)


def record(optimizer: Optimizer[Any], stop: Stop, run: Run, x: Array, told: Array, limit: Array) -> Run:
    """Tell a generation, judge it, note it in the history."""
    state, info = optimizer.learn(run.state, x, told)
    monitor = judge(run.monitor, stop, state, info, told, limit, optimizer)
    row = jnp.stack([getattr(info, name) for name in FIELDS])
    return Run(state, monitor, run.history.at[(state.generation - 1) % run.history.shape[0]].set(row))


advance_compiled = jax.jit(advance)
_record = jax.jit(record)
_propose = jax.jit(lambda optimizer, state: optimizer.propose(state, optimizer.params))


def advance_on_host(optimizer: Optimizer[Any], fitness: HostFitness, stop: Stop, run: Run, limit: Array, until: Array) -> Run:
    """:func:`advance` for a black box."""
    while int(run.monitor.reason) == Reason.RUNNING and int(run.state.generation) < int(until):
        x, state = _propose(optimizer, run.state)
        run = _record(optimizer, stop, replace(run, state=state), x, jnp.asarray(fitness(state.space, x)), limit)
    return run


class Search:
    """The host's side of a run: slices, the clock, history, callback and checkpoint."""

    def __init__(
        self,
        run: Run,
        budget: Budget,
        pop_size: int,
        sign: int = 1,
        callback: Callback | None = None,
        path: Path | None = None,
        every: int = 10,
    ) -> None:
        self.run, self.budget, self.pop_size, self.sign = run, budget, pop_size, sign
        self.callback, self.path, self.every = callback, path, every
        self.began = time.monotonic()
        self.limit = budget.max_generations(pop_size) or np.iinfo(np.int32).max
        self.rows = np.zeros((0, len(FIELDS)), run.history.dtype)
        self.rate = 0.0  # generations a second
        self.ended: Reason | None = None  # by the host
        if path is not None and path.exists():
            self._resume(path)

    @property
    def generation(self) -> int:
        return int(self.run.state.generation)

    @property
    def reason(self) -> Reason:
        return self.ended or Reason(int(self.run.monitor.reason))

    def drive(self, step: Callable[[Run, Array, Array], Run]) -> None:
        """Slices until something ends the run. Raises FlatFitness."""
        while self.reason == Reason.RUNNING:
            first, started = self.generation, time.monotonic()
            self.run = step(self.run, jnp.int32(self.limit), jnp.int32(self._until()))
            self._collect(first)
            if len(self.rows) > 1:  # the first slice compiles
                self.rate = (self.generation - first) / (time.monotonic() - started)
            self._between_slices()
        if self.reason == Reason.FLAT:
            seen = int(self.run.state.evals)
            value = self.sign * float(self.run.monitor.low)
            what = f"the same fitness, {value:g}" if np.isfinite(value) else "no finite fitness"
            raise FlatFitness(f"all {seen} individuals have {what}: start elsewhere, take larger steps or grade the fitness")

    def _until(self) -> int:
        """The generation at which the host wants the run back."""
        ends = [self.limit, self.generation + len(self.run.history)]
        if self.callback is not None or self.path is not None:
            ends.append(self.generation + self.every - self.generation % self.every)
        if self.budget.seconds is not None:
            ends.append(self.generation + max(1, int(self.rate * min(SLICE_SECONDS, self._left()))))
        return min(ends)

    def _left(self) -> float:
        """Seconds left of a time budget."""
        return (self.budget.seconds or 0.0) - (time.monotonic() - self.began)

    def _collect(self, first: int) -> None:
        """Take the rows of the generations after ``first`` out of the ring."""
        ring = np.asarray(self.run.history)
        self.rows = np.concatenate([self.rows, ring[np.arange(first, self.generation) % len(ring)]])

    def _between_slices(self) -> None:
        due = self.reason != Reason.RUNNING or self.generation % self.every == 0
        if self.path is not None and due and self.reason != Reason.FLAT:
            checkpoint.save(self.path, (self.run.state, self.run.monitor), {"rows": self.rows}, generation=self.generation)
        if self.callback is not None and due and self.callback(self.generation, self._row()):
            self.ended = Reason.CALLBACK
        if self.budget.seconds is not None:
            if self._left() <= 0:
                self.ended = Reason.SECONDS
            planned = min(self.limit, self.generation + int(self.rate * max(self._left(), 0)))
            self.run = replace(self.run, state=replace(self.run.state, horizon=jnp.int32(planned)))

    def _row(self) -> dict[str, float]:
        """The last generation's numbers."""
        return dict(zip(FIELDS, map(float, self._history()[-1]), strict=True))

    def _history(self) -> np.recarray:
        rows = self.rows.copy()
        rows[:, [FIELDS.index("best"), FIELDS.index("average")]] *= self.sign
        history = np.recarray(len(rows), [(name, rows.dtype) for name in FIELDS])
        for name, column in zip(FIELDS, rows.T, strict=True):
            history[name] = column
        return history

    def _resume(self, path: Path) -> None:
        """Go on from a file; a budget larger than the one that ended there counts anew."""
        (state, monitor), arrays, _ = checkpoint.load(path, (self.run.state, self.run.monitor))
        horizon = self.run.state.horizon
        if int(monitor.reason) == Reason.GENERATIONS and int(state.generation) < self.limit:
            monitor = replace(monitor, reason=jnp.int32(Reason.RUNNING))
        self.run, self.rows = replace(self.run, state=replace(state, horizon=horizon), monitor=monitor), arrays["rows"]

    def result(self) -> Result:
        """What was found."""
        state, reason = self.run.state, self.reason
        if reason == Reason.GENERATIONS and self.budget.generations != self.limit:
            reason = Reason.EVALS
        x = state.space.unflatten(state.best_x)
        seconds = time.monotonic() - self.began
        return Result(x, self.sign * float(state.best_f), int(state.evals), self.generation, self._history(), str(reason), seconds, state)
