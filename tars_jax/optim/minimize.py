"""``minimize``: a whole search in one call."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import Optimizer
from tars_jax.optim.convergence import Budget, Stop
from tars_jax.optim.fitness import Fitness, HostFitness, Kind, as_partial, traced_kind
from tars_jax.optim.search import Callback, Result, Search, advance_compiled, advance_on_host, start_run
from tars_jax.optim.space import Tree


def minimize(
    fitness: Callable[..., Any],
    x0: Tree,
    optimizer: Optimizer[Any],
    *,
    budget: Budget | None = None,
    stop: Stop | None = None,
    key: Array | int = 0,
    kind: Kind | None = None,
    driver: str = "auto",
    maximize: bool = False,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    every: int = 10,
    mesh: Mesh | None = None,
    axis: str | None = None,
    workers: int = 1,
) -> Result:
    """Search for the pytree near ``x0`` with the smallest ``fitness``.

    ``fitness`` takes one individual (a pytree like ``x0``) and gives a number, or takes a population (a leading axis of
    ``optimizer.pop_size`` on every leaf) and gives ``[pop_size]``; ``kind`` says which, otherwise both are tried. ``driver``: "traced"
    compiles the whole search, "host" calls a black box with numpy arrays, individuals in ``workers`` threads; "auto" traces what can be
    traced. Bind large arrays that a traced fitness needs with ``jax.tree_util.Partial``: arguments then, not constants of the program.

    ``budget`` defaults to 300 generations; evaluations are spent in whole generations. ``stop``: see :class:`Stop`.
    ``callback(generation, numbers)`` is called every ``every`` generations and ends the run by returning True. A ``checkpoint`` file is
    written as often, and read first if it exists: the run goes on bit for bit. ``mesh`` and ``axis`` spread the population over devices.
    The same key gives the same result, except under ``Budget(seconds=)``.

    Raises InvalidRequest for arguments that cannot work, FlatFitness if no two individuals ever differed in fitness, CheckpointError.
    """
    budget, n, sign = budget or Budget(generations=300), optimizer.pop_size, -1 if maximize else 1
    budget.validate(n)
    limit = budget.max_generations(n)
    traced = _traced_kind(driver, fitness, x0, n, kind)
    run = start_run(optimizer.init(key, x0, horizon=limit), limit)
    search = Search(run, budget, n, sign, callback, None if checkpoint is None else Path(checkpoint), every)
    if traced is None:
        black_box = HostFitness(fitness, kind, sign, workers)
        with black_box.threads():
            search.drive(partial(advance_on_host, optimizer, black_box, stop or Stop()))
    else:
        compiled = Fitness(as_partial(fitness), traced, sign, _sharding(mesh, axis, n))
        search.drive(partial(advance_compiled, optimizer, compiled, stop or Stop()))
    return search.result()


def _traced_kind(driver: str, fitness: Callable[..., Any], x0: Tree, pop_size: int, kind: Kind | None) -> Kind | None:
    """What a traced fitness takes; None for the host loop."""
    if driver not in ("auto", "traced", "host"):
        raise InvalidRequest(f"driver {driver!r} is none of auto, traced, host")
    if driver == "host":
        return None
    found = traced_kind(fitness, x0, pop_size, kind)
    if found is None and driver == "traced":
        raise InvalidRequest(
            "jax cannot trace this fitness to one number an individual: call it with jax.eval_shape to see why, or use driver='host'"
        )
    return found


def _sharding(mesh: Mesh | None, axis: str | None, pop_size: int) -> NamedSharding | None:
    """How the population's axis lies on the mesh."""
    if mesh is None:
        return None
    axis = axis or mesh.axis_names[0]
    if axis not in mesh.axis_names or pop_size % mesh.shape[axis]:
        raise InvalidRequest(f"a population of {pop_size} does not divide over axis {axis!r} of the mesh {dict(mesh.shape)}")
    return NamedSharding(mesh, PartitionSpec(axis))
