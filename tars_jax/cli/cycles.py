"""``tars bench optim``: how long the cycles of real-time optimization take."""

import itertools
import json
from typing import Annotated, Any

import typer

from tars_jax.cli.output import note
from tars_jax.errors import InvalidRequest

LAYERS = (2, 16, 16, 1)  # of the network that is optimized: 337 weights
SAMPLES = 200
NAMES = ("genetic algorithm", "simulated annealing", "Monte Carlo", "cycle")
PERCENTILES = (50, 95, 99)


def optim(
    cycles: Annotated[int, typer.Option("--cycles", "-n", help="Cycles timed.")] = 500,
    population: Annotated[int, typer.Option("--population", "-p", help="Individuals a generation.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the network, the data and the search.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure real-time cycles (GA, SA, MC) that optimize a network of 337 weights on 200 samples; limits 5, 3 and 2 ms."""
    if cycles < 20:
        raise InvalidRequest(f"--cycles {cycles}: percentiles need at least 20")
    import numpy as np

    from tars_jax.optim.cycles import LIMITS_MS

    note("compiling and calibrating ...")
    pipeline = _pipeline(population, seed)
    first = pipeline.run()
    done = [pipeline.run() for _ in range(cycles)]
    stages = np.array([cycle.milliseconds for cycle in done])
    times = np.column_stack([stages, stages.sum(1)])
    table = np.percentile(times, PERCENTILES, axis=0).T
    limits = (*LIMITS_MS, sum(LIMITS_MS))
    if as_json:
        rows = {
            name: dict(zip(("p50", "p95", "p99", "limit"), (*row, limit), strict=True))
            for name, row, limit in zip(NAMES, table.tolist(), limits, strict=True)
        }
        print(json.dumps({"ms": rows, "generations": done[-1].generations, "cycles": cycles, "first": first.best, "last": done[-1].best}))
        return
    print(f"{'ms':<22}{'p50':>8}{'p95':>8}{'p99':>8}{'limit':>8}{'generations':>13}")
    for name, row, limit, count in zip(NAMES, table, limits, (*done[-1].generations, sum(done[-1].generations)), strict=True):
        late = "" if row[1] <= limit else "  p95 is over the limit"
        print(f"{name:<22}{row[0]:>8.2f}{row[1]:>8.2f}{row[2]:>8.2f}{limit:>8.0f}{count:>13}{late}")
    print(f"\nloss {first.best:.4g} after the first cycle, {done[-1].best:.4g} after {cycles + 1}")


def _pipeline(population: int, seed: int) -> Any:
    """Cycles on a small regression, compiled."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from tars_jax.optim.cycles import STAGES, Cycles

    rng = np.random.default_rng(seed)
    inputs = rng.uniform(-2, 2, (SAMPLES, LAYERS[0])).astype(np.float32)
    targets = np.sin(2 * inputs[:, :1]) * inputs[:, 1:]
    shapes = list(itertools.pairwise(LAYERS))
    weights = [(jnp.asarray(rng.normal(0, rows**-0.5, (rows, columns)), jnp.float32), jnp.zeros(columns)) for rows, columns in shapes]

    def loss(data: Any, weights: Any) -> Any:
        x, targets = data
        for matrix, bias in weights[:-1]:
            x = jnp.tanh(x @ matrix + bias[None])
        matrix, bias = weights[-1]
        return jnp.mean((x @ matrix + bias[None] - targets) ** 2)

    data = jnp.asarray(inputs), jnp.asarray(targets)
    return Cycles(jax.tree_util.Partial(loss, data), weights, [replace(stage, pop_size=population) for stage in STAGES], key=seed)
