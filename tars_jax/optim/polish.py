"""Polish: a few steps of L-BFGS on a differentiable fitness, from where a search ended; reported apart from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Optimizer
from tars_jax.optim.fitness import Fitness, as_partial, traced_kind
from tars_jax.optim.search import Result
from tars_jax.optim.space import Space, Tree, make_space


@dataclass(frozen=True)
class Polished:
    """What the gradient steps made of a result."""

    x: Tree
    fun: float
    gain: float  # by how much they lowered the fitness; never below zero
    steps: int


def polish(fitness: Callable[[Tree], Any], result: Result, optimizer: Optimizer[Any] | None = None, max_steps: int = 100) -> Polished:
    """Minimise ``fitness`` of one individual by L-BFGS from ``result.x``. ``optimizer``: whose bounds and mask hold here too.

    Raises InvalidRequest where jax cannot trace the fitness.
    """
    if traced_kind(fitness, result.x, 1, "individual") is None:
        raise InvalidRequest("polish follows gradients: it needs a fitness of one individual that jax can trace")
    space = make_space(result.x, optimizer.bounds if optimizer else None, optimizer.mask if optimizer else None)
    start = space.flatten(result.x)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax counts on
        x, value, steps = _descend(Fitness(as_partial(fitness)), space, start, jnp.int32(max_steps))
    better = bool(value < result.fun)
    fun = float(value) if better else result.fun
    return Polished(space.unflatten(x) if better else result.x, fun, result.fun - fun, int(steps))


@jax.jit
def _descend(fitness: Fitness, space: Space, start: Array, max_steps: Array) -> tuple[Array, Array, Array]:
    """The best point of a descent ``[d]``, its fitness, and the steps taken until nothing improved."""
    import optax

    solver = optax.lbfgs()

    def at(x: Array) -> Array:
        return fitness(space, jnp.clip(x, space.lower, space.upper)[None])[0]

    def step(carry: Any) -> Any:
        x, state, best, best_value, steps, _ = carry
        value, slope = optax.value_and_grad_from_state(at)(x, state=state)
        change, state = solver.update(slope, state, x, value=value, grad=slope, value_fn=at)
        x = jnp.clip(optax.apply_updates(x, change), space.lower, space.upper)
        found = at(x)
        better = found < best_value
        return x, state, jnp.where(better, x, best), jnp.where(better, found, best_value), steps + 1, better

    def going(carry: Any) -> Array:
        return carry[-1] & (carry[-2] < max_steps)

    first = (start, solver.init(start), start, at(start), jnp.int32(0), jnp.asarray(True))
    return lax.while_loop(going, step, first)[2:5]
