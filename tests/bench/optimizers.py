"""Our optimizers beside evosax, pycma, scipy and nevergrad on shifted and rotated test functions and a small network.

    python tests/bench/optimizers.py --dims 10,50,337 --evals 15000 --instances 5

Everybody has the same instances, starts, initial step, population and number of evaluations. Instances are drawn anew in each run
unless ``--seed`` says which. evosax's genetic algorithm and annealing get the best of five schedules on each function, chosen after the
fact: more than a user would have. A figure is the mean of log10(f - f*), floored at -8; a win or a loss is a difference of more than
0.05. Peers that are not installed are named and left out.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial

from tars_jax.optim import CMAES, GeneticAlgorithm, HybridOptimization, MonteCarlo, Optimizer, SimulatedAnnealing, Stop
from tars_jax.optim.fitness import Fitness
from tars_jax.optim.search import advance, start_run

POP, FLOOR = 30, 1e-8
DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # final step of evosax's schedules, as a share of the first
MLP = (2, 16, 16, 1)
NUM_WEIGHTS = 337  # of that network


class Instances(NamedTuple):
    """``[I]`` problems: which function, and where and how it lies."""

    which: Any  # int32 [I]
    rotation: Any  # [I, d, d]; the network's inputs [I, 200, 2]
    shift: Any  # [I, d]; the network's teacher
    x0: Any  # [I, d]


def functions(xp: Any, d: int) -> dict[str, Callable[[Any], Any]]:
    """The functions, with their minimum 0 at 0, for numpy or jax.numpy."""
    i, pi = xp.arange(d, dtype=xp.float32), np.pi

    def rosenbrock(z: Any) -> Any:
        x = z + 1
        return xp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def ackley(z: Any) -> Any:
        return 20 - 20 * xp.exp(-0.2 * xp.sqrt(xp.mean(z**2))) + np.e - xp.exp(xp.mean(xp.cos(2 * pi * z)))

    def griewank(z: Any) -> Any:
        z = 60 * z  # its box is 600 wide, ours 10
        return 1 + xp.sum(z**2) / 4000 - xp.prod(xp.cos(z / xp.sqrt(i + 1)))

    def levy(z: Any) -> Any:
        w = 1 + z / 4
        ends = xp.sin(pi * w[0]) ** 2 + (w[-1] - 1) ** 2 * (1 + xp.sin(2 * pi * w[-1]) ** 2)
        return ends + xp.sum((w[:-1] - 1) ** 2 * (1 + 10 * xp.sin(pi * w[:-1] + 1) ** 2))

    return {
        "sphere": lambda z: xp.sum(z**2),
        "ellipsoid": lambda z: xp.sum(10 ** (6 * i / (d - 1)) * z**2),
        "rosenbrock": rosenbrock,
        "schwefel1.2": lambda z: xp.sum(xp.cumsum(z) ** 2),
        "rastrigin": lambda z: 10 * d + xp.sum(z**2 - 10 * xp.cos(2 * pi * z)),
        "ackley": ackley,
        "griewank": griewank,
        "levy": levy,
    }


def network(xp: Any, weights: Any, inputs: Any) -> Any:
    """A multilayer perceptron of the sizes MLP, its weights in one vector."""
    x, at = inputs, 0
    for rows, columns in itertools.pairwise(MLP):
        matrix, bias = weights[at : at + rows * columns], weights[at + rows * columns : at + (rows + 1) * columns]
        x, at = x @ matrix.reshape(rows, columns) + bias[None], at + (rows + 1) * columns
        x = xp.tanh(x) if at < NUM_WEIGHTS else x
    return x


def names(d: int) -> list[str]:
    return ["network"] if d == NUM_WEIGHTS else list(functions(np, d))


def value(xp: Any, d: int, problem: Instances, x: Any) -> Any:
    """A problem's function, 0 at ``shift``; the network has to imitate the one whose weights are ``shift``."""
    if d == NUM_WEIGHTS:
        return xp.mean((network(xp, x, problem.rotation) - network(xp, problem.shift, problem.rotation)) ** 2)
    z, calls = problem.rotation @ (x - problem.shift), list(functions(xp, d).values())
    return calls[problem.which](z) if xp is np else lax.switch(problem.which, calls, z)


def draw_instances(rng: np.random.Generator, d: int, repeats: int) -> Instances:
    """``repeats`` fresh instances of every function."""
    which = np.repeat(np.arange(len(names(d)), dtype=np.int32), repeats)
    n = len(which)
    if d == NUM_WEIGHTS:
        inputs, teacher = rng.uniform(-2, 2, (n, 200, MLP[0])), rng.normal(size=(n, d))
        return Instances(which, *(array.astype(np.float32) for array in (inputs, teacher, 0.3 * rng.normal(size=(n, d)))))
    rotation = np.stack([np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in which])
    arrays = rotation, rng.uniform(-4, 4, (n, d)), rng.uniform(-5, 5, (n, d))
    return Instances(which, *(array.astype(np.float32) for array in arrays))


def host_fitness(instances: Instances, index: int) -> Callable[[Any], float]:
    problem = Instances(*(field[index] if field.dtype == np.int32 else field[index].astype(np.float64) for field in instances))
    return lambda x: float(value(np, len(problem.x0), problem, np.asarray(x, np.float64)))


def step_of(d: int) -> float:
    return 0.5 if d == NUM_WEIGHTS else 2.0


# Ours: all instances at once.


def run_ours(optimizer: Optimizer[Any], instances: Instances, evals: int, seed: int) -> np.ndarray:
    generations, d = evals // POP, instances.x0.shape[1]
    optimizer = dataclasses.replace(optimizer, pop_size=POP, step=step_of(d))

    def one(key: Array, problem: Instances) -> Array:
        fitness = Fitness(Partial(functools.partial(value, jnp, d), problem))
        run = start_run(optimizer.init(key, problem.x0, horizon=generations), generations)
        return advance(optimizer, fitness, Stop(), run, jnp.int32(generations), jnp.int32(generations)).state.best_f

    keys = jax.random.split(jax.random.key(seed), len(instances.which))
    return np.asarray(jax.jit(jax.vmap(one))(keys, jax.tree.map(jnp.asarray, instances)))


OURS: dict[str, Optimizer[Any]] = {
    "tars GA": GeneticAlgorithm(),
    "tars SA": SimulatedAnnealing(),
    "tars MC": MonteCarlo(),
    "tars Hybrid": HybridOptimization(),
    "tars CMA-ES": CMAES(),
}


# Peers.


def run_evosax(name: str, instances: Instances, evals: int, seed: int) -> np.ndarray:
    """evosax's algorithms with a schedule from the initial step to each of DECAYS of it; the best schedule of each function counts."""
    import evosax.algorithms as algorithms

    generations, d = evals // POP, instances.x0.shape[1]
    scheduled = name in ("SimpleGA", "SimulatedAnnealing")

    def one(key: Array, problem: Instances, decay: Array) -> Array:
        schedule = {"std_schedule": lambda step: step_of(d) * decay ** (step / generations)} if scheduled else {}
        algorithm = getattr(algorithms, name)(population_size=POP, solution=problem.x0, **schedule)
        params, fitness = algorithm.default_params, jax.vmap(functools.partial(value, jnp, d, problem))
        keys = jax.random.split(key, 3)
        if isinstance(algorithm, algorithms.population_based.base.PopulationBasedAlgorithm):
            start = problem.x0[None] + step_of(d) * jax.random.normal(keys[0], (POP, d))
            state = algorithm.init(keys[1], start, fitness(start), params)
        else:
            params = params.replace(std_init=step_of(d)) if hasattr(params, "std_init") else params
            state = algorithm.init(keys[1], problem.x0, params)

        def generation(carry: Any, key: Array) -> Any:
            state, best = carry
            ask_key, tell_key = jax.random.split(key)
            x, state = algorithm.ask(ask_key, state, params)
            told = fitness(x)
            state, _ = algorithm.tell(tell_key, x, told, state, params)
            return (state, jnp.fmin(best, jnp.min(told))), None

        return lax.scan(generation, (state, jnp.float32(jnp.inf)), jax.random.split(keys[2], generations))[0][1]

    keys = jax.random.split(jax.random.key(seed), len(instances.which))
    decays = jnp.asarray(DECAYS if scheduled else (1.0,), jnp.float32)
    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, 0, None)), in_axes=(None, None, 0)))
    found = np.asarray(run(keys, jax.tree.map(jnp.asarray, instances), decays))  # [schedules, I]
    logs = gaps(found).reshape(len(found), len(names(d)), -1)
    best = logs.mean(2).argmin(0)  # schedule of each function
    return np.take_along_axis(found.reshape(logs.shape), best[None, :, None], 0).reshape(-1)


def run_pycma(fitness: Callable[[Any], float], x0: np.ndarray, evals: int, rng: np.random.Generator) -> float:
    """Restarts, with the same population, around x0 until the evaluations are spent."""
    import cma

    best, spent, step, start = np.inf, 0, step_of(len(x0)), x0.astype(np.float64)
    while spent + POP <= evals:
        options = {"popsize": POP, "verbose": -9, "seed": int(rng.integers(1, 2**31)), "maxfevals": evals - spent - POP + 1}
        search = cma.CMAEvolutionStrategy(start, step, options)
        while not search.stop() and spent + POP <= evals:
            population = search.ask()
            values = [fitness(x) for x in population]
            search.tell(population, values)
            best, spent = min(best, *values), spent + POP
        start = x0 + step * rng.normal(size=len(x0))
    return best


def run_scipy(method: str, fitness: Callable[[Any], float], x0: np.ndarray, evals: int, rng: np.random.Generator) -> float:
    from scipy import optimize

    d, spent, best = len(x0), 0, np.inf

    def counted(x: np.ndarray) -> float:
        nonlocal spent, best
        spent += 1
        found = fitness(x)
        if spent <= evals:
            best = min(best, found)
        return found

    bounds = list(zip(x0 - 10.0, x0 + 10.0, strict=True))
    if method == "differential evolution":
        start = x0 + step_of(d) * rng.normal(size=(POP, d))
        start = np.clip(start, x0 - 10, x0 + 10)
        optimize.differential_evolution(counted, bounds, init=start, maxiter=evals // POP - 1, polish=False, tol=0, rng=rng)
    else:
        alone = method != "dual annealing"  # its default calls L-BFGS with numerical gradients, whose evaluations count
        optimize.dual_annealing(counted, bounds, x0=x0.astype(np.float64), maxfun=evals, maxiter=evals, no_local_search=alone, rng=rng)
    return best


def run_nevergrad(name: str, fitness: Callable[[Any], float], x0: np.ndarray, evals: int, rng: np.random.Generator) -> float:
    import nevergrad

    parameter = nevergrad.p.Array(init=x0.astype(np.float64)).set_mutation(sigma=step_of(len(x0)))
    parameter.random_state.seed(int(rng.integers(2**31)))
    search, best = nevergrad.optimizers.registry[name](parameter, budget=evals, num_workers=POP), np.inf
    for _ in range(evals // POP):
        asked = [search.ask() for _ in range(POP)]
        for candidate in asked:
            found = fitness(candidate.value)
            search.tell(candidate, found)
            best = min(best, found)
    return best


def each(run: Callable[..., float], instances: Instances, evals: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([run(host_fitness(instances, i), instances.x0[i], evals, rng) for i in range(len(instances.which))])


EVOSAX = ("SimpleGA", "DifferentialEvolution", "SimulatedAnnealing", "iAMaLGaM_Full", "CMA_ES")
COUNTERPARTS = [
    ("tars GA", "evosax SimpleGA"),
    ("tars GA", "evosax DifferentialEvolution"),
    ("tars GA", "scipy differential evolution"),
    ("tars GA", "nevergrad TwoPointsDE"),
    ("tars SA", "evosax SimulatedAnnealing"),
    ("tars SA", "scipy dual annealing"),
    ("tars SA", "scipy dual annealing alone"),
    ("tars SA", "nevergrad OnePlusOne"),
    ("tars MC", "evosax iAMaLGaM_Full"),
    ("tars CMA-ES", "evosax CMA_ES"),
    ("tars CMA-ES", "pycma"),
    ("tars Hybrid", "pycma"),
    ("tars Hybrid", "nevergrad NGOpt"),
]


def contestants() -> dict[str, Callable[[Instances, int, int], np.ndarray]]:
    """Name -> best f of every instance; ours first, then the peers that are installed."""
    runs: dict[str, Any] = {name: functools.partial(run_ours, optimizer) for name, optimizer in OURS.items()}
    peers: dict[str, dict[str, Any]] = {
        "evosax": {f"evosax {name}": functools.partial(run_evosax, name) for name in EVOSAX},
        "cma": {"pycma": functools.partial(each, run_pycma)},
        "scipy": {
            f"scipy {name}": functools.partial(each, functools.partial(run_scipy, name))
            for name in ("differential evolution", "dual annealing", "dual annealing alone")
        },
        "nevergrad": {
            f"nevergrad {name}": functools.partial(each, functools.partial(run_nevergrad, name))
            for name in ("OnePlusOne", "TwoPointsDE", "NGOpt")
        },
    }
    for module, group in peers.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: left out")
        else:
            runs |= group
    return runs


def gaps(found: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(np.nan_to_num(found, nan=np.inf, posinf=1e12), FLOOR))


def report(d: int, logs: dict[str, np.ndarray]) -> None:
    """The table of a dimension, and wins and losses against the counterparts."""
    columns = names(d)
    print("\n| d = " + str(d) + " | mean | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for name, log in sorted(logs.items(), key=lambda item: item[1].mean()):
        print(f"| {name} | **{log.mean():.2f}** | " + " | ".join(f"{column.mean():.2f}" for column in log.reshape(len(columns), -1)) + " |")
    print()
    for ours, theirs in COUNTERPARTS:
        if ours in logs and theirs in logs:
            difference = logs[ours] - logs[theirs]
            wins, losses = int((difference < -0.05).sum()), int((difference > 0.05).sum())
            ties = difference.size - wins - losses
            ratio = 10 ** difference.mean()
            print(f"{ours} against {theirs}: geometric mean ratio {ratio:.2g}, {wins} wins, {losses} losses, {ties} ties")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default=f"10,50,{NUM_WEIGHTS}", help=f"numbers of coordinates; {NUM_WEIGHTS} is the network")
    parser.add_argument("--evals", type=int, default=15_000)
    parser.add_argument("--instances", type=int, default=5, help="of each function")
    parser.add_argument("--seed", type=int, help="fresh if not given")
    parser.add_argument("--only", help="names to run, separated by commas")
    parser.add_argument("--skip", default="", help="names, or beginnings of names, not to run, separated by commas")
    arguments = parser.parse_args()
    seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.evals} evaluations, population {POP}, {arguments.instances} instances a function")
    for d in map(int, arguments.dims.split(",")):
        instances, logs = draw_instances(np.random.default_rng(seed + d), d, arguments.instances), {}
        for name, run in contestants().items():
            if arguments.only and name not in arguments.only.split(","):
                continue
            if arguments.skip and name.startswith(tuple(arguments.skip.split(","))):
                continue
            began = time.process_time()
            try:
                logs[name] = gaps(run(instances, arguments.evals, seed))
            except Exception as error:  # nevergrad's NGOpt fails on the network within pycma
                if name in OURS:
                    raise
                print(f"{name}: left out, it failed: {str(error).strip().splitlines()[:1]}", flush=True)
                continue
            print(f"{name}: {logs[name].mean():.2f} in {time.process_time() - began:.0f} s of CPU time", flush=True)
        report(d, logs)


if __name__ == "__main__":
    main()
