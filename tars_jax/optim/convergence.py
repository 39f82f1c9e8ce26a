"""When a search is over, and why: tests on the numbers of each generation, inside the compiled loop.

The stagnation window follows Hansen, The CMA Evolution Strategy: A Tutorial, B.3 (https://arxiv.org/abs/1604.00772).
"""

from enum import IntEnum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Info, Optimizer, State, patience, tied

ROUNDING = 4  # of floating-point numbers, in their relative spacing
WARM_UP = 10  # generations that may be flat before it is an error


class Reason(IntEnum):
    """Why a run ended; ``str(reason)`` is the word in a result."""

    RUNNING = 0
    TARGET = 1
    STAGNATION = 2
    SPREAD = 3
    DIVERSITY = 4
    STEP = 5
    EVALS = 6
    GENERATIONS = 7
    SECONDS = 8
    FLAT = 9
    CALLBACK = 10

    def __str__(self) -> str:
        return self.name.lower()


@struct.dataclass
class Stop:
    """Tests that end a run. None turns one off.

    ``window``: generations without a relative improvement of the best by ``tolerance``; "auto" is the larger of 100 + 30 d / N and a fifth
    of the planned run. ``spread``, ``diversity`` and ``step`` are relative: to the size of the fitness, to the first population's
    diversity, to the initial step. ``ties``: share of a generation that is equally good while the best has not improved for 10 + 30 d / N
    generations; for a smooth fitness only rounding is left then. Optimizers that keep to a schedule (annealing) or start anew (hybrid)
    go on to the end of their budget: for them only ``target`` and a ``window`` in numbers count.
    """

    target: float | None = None  # fitness at or below it
    window: int | str | None = struct.field(pytree_node=False, default="auto")
    tolerance: float | None = 1e-9
    spread: float | None = 1e-12
    diversity: float | None = 1e-9
    step: float | None = 1e-9
    ties: float | None = None


@struct.dataclass
class Budget:
    """What a run may spend: individuals evaluated, generations, seconds of wall-clock time; at least one, whichever ends first."""

    evals: int | None = None
    generations: int | None = None
    seconds: float | None = None

    def max_generations(self, pop_size: int) -> int | None:
        """Whole generations within ``evals`` and ``generations``; None if only time limits the run."""
        limits = [self.generations, None if self.evals is None else self.evals // pop_size]
        return min((limit for limit in limits if limit is not None), default=None)

    def validate(self, pop_size: int) -> None:
        """Raise InvalidRequest for a budget that is empty or buys no generation."""
        if self.evals is None and self.generations is None and self.seconds is None:
            raise InvalidRequest("Budget() limits nothing: give evals=, generations= or seconds=")
        generations = self.max_generations(pop_size)
        if (generations is not None and generations < 1) or (self.seconds is not None and self.seconds <= 0):
            raise InvalidRequest(f"{self} does not pay for one generation of {pop_size} individuals")


@struct.dataclass
class Monitor:
    """What the tests remember."""

    reason: Array  # int32, a Reason
    low: Array  # smallest and largest finite fitness ever told: equal means flat
    high: Array
    reference: Array  # best fitness at the last real improvement
    improved: Array  # int32, generation of that improvement
    diversity: Array  # of the first generation


def start_monitor(state: State) -> Monitor:
    """A monitor before the first generation."""
    inf = jnp.full((), jnp.inf, state.best_f.dtype)
    return Monitor(jnp.int32(Reason.RUNNING), inf, -inf, inf, jnp.int32(0), jnp.zeros_like(inf))


def judge(monitor: Monitor, stop: Stop, state: State, info: Info, told: Array, limit: Array, optimizer: Optimizer[Any]) -> Monitor:
    """The monitor after a generation. ``told [N]``: its fitness; ``limit``: generations the budget pays for."""
    finite = jnp.isfinite(told)
    low = jnp.minimum(monitor.low, jnp.min(jnp.where(finite, told, jnp.inf)))
    high = jnp.maximum(monitor.high, jnp.max(jnp.where(finite, told, -jnp.inf)))
    scale = jnp.abs(info.best)
    gain = monitor.reference - info.best
    better = gain > (0.0 if stop.tolerance is None else stop.tolerance) * jnp.where(jnp.isfinite(scale), scale, 1)
    reference = jnp.where(better, info.best, monitor.reference)
    improved = jnp.where(better, state.generation, monitor.improved)
    diversity = jnp.where(monitor.diversity > 0, monitor.diversity, info.diversity)
    flat = ~(low < high)
    reason = monitor.reason
    for code, hit in _tests(stop, state, info, told, improved, diversity, scale, optimizer):
        reason = jnp.where((reason == Reason.RUNNING) & hit & ~flat, jnp.int32(code), reason)
    target = jnp.asarray(False) if stop.target is None else info.best <= stop.target
    reason = jnp.where(target, jnp.int32(Reason.TARGET), reason)
    spent = state.generation >= limit
    reason = jnp.where((reason == Reason.RUNNING) & flat & ((state.generation >= WARM_UP) | spent), jnp.int32(Reason.FLAT), reason)
    reason = jnp.where((reason == Reason.RUNNING) & spent, jnp.int32(Reason.GENERATIONS), reason)
    return Monitor(reason, low, high, reference, improved, diversity)


def _tests(
    stop: Stop, state: State, info: Info, told: Array, improved: Array, diversity: Array, scale: Array, optimizer: Optimizer[Any]
) -> list[tuple[Reason, Array]]:
    tests: list[tuple[Reason, Array]] = []
    if stop.window is not None and not (stop.window == "auto" and optimizer.paced):
        still = state.generation - improved
        tests.append((Reason.STAGNATION, still >= _window(stop.window, state, optimizer.pop_size)))
    if optimizer.paced:
        return tests
    if stop.step is not None:
        tests.append((Reason.STEP, info.step <= stop.step))
    if stop.diversity is not None:
        tests.append((Reason.DIVERSITY, info.diversity <= stop.diversity * diversity))
    if stop.ties is not None:
        still = state.generation - improved
        tests.append((Reason.SPREAD, (still >= patience(state, optimizer.pop_size)) & tied(told, stop.ties)))
    if stop.spread is not None:
        resolution = ROUNDING * float(np.finfo(scale.dtype).eps)  # below it fitness differs by rounding
        tests.append((Reason.SPREAD, info.spread <= jnp.maximum(stop.spread, resolution) * scale))
    return tests


def _window(window: int | str, state: State, pop_size: int) -> Any:
    if isinstance(window, int):
        return window
    return jnp.maximum(100 + -(-30 * state.space.size // pop_size), state.horizon // 5)
