"""`minimize`: fitness of all kinds, budgets, every reason to stop, determinism, meshes."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tars_jax.errors import FlatFitness, InvalidRequest
from tars_jax.optim import CMAES, Box, Budget, GeneticAlgorithm, MonteCarlo, SimulatedAnnealing, Stop, minimize
from tars_jax.optim.fitness import Fitness
from tars_jax.optim.search import advance, start_run

GA = GeneticAlgorithm(pop_size=16)
X0 = jnp.zeros(3)
FIFTY = Budget(generations=50)


def sphere(x: Any) -> Any:
    return jnp.sum((x - 1.5) ** 2)


def spheres(x: Any) -> Any:
    return jnp.sum((x - 1.5) ** 2, axis=1)


def test_an_individuals_fitness_is_vmapped() -> None:
    result = minimize(sphere, X0, GA, budget=FIFTY)
    assert result.fun < 1e-3
    assert result.x.tolist() == pytest.approx([1.5] * 3, abs=0.05)
    assert (result.evals, result.generations, len(result.history)) == (800, 50, 50)


def test_a_populations_fitness_is_called_on_all_at_once() -> None:
    assert minimize(spheres, X0, GA, budget=FIFTY, kind="population").fun == minimize(sphere, X0, GA, budget=FIFTY).fun


def test_a_population_fitness_is_recognised() -> None:
    assert minimize(lambda x: x.sum(axis=1) ** 2, X0, GA, budget=FIFTY).fun < 1e-3


def test_a_black_box_gets_numpy_and_gives_what_the_traced_loop_gives() -> None:
    seen = set()

    def box(x: Any) -> float:
        seen.add(type(x))
        return float(np.sum((x - np.float32(1.5)) ** 2))

    result = minimize(box, X0, GA, budget=FIFTY, driver="host")
    assert seen == {np.ndarray}
    assert result.fun == pytest.approx(minimize(sphere, X0, GA, budget=FIFTY).fun, abs=1e-3)


def test_a_black_box_may_take_a_population() -> None:
    result = minimize(lambda x: np.asarray(x, np.float64).sum(axis=1) ** 2, X0, GA, budget=FIFTY, driver="host")
    assert (result.fun < 1e-3, result.evals) == (True, 800)


def test_threads_change_nothing() -> None:
    def box(x: Any) -> float:
        return float(np.sum((np.asarray(x) - 1.5) ** 2))

    one, four = (minimize(box, X0, GA, budget=FIFTY, driver="host", workers=workers) for workers in (1, 4))
    assert one.fun == four.fun


def test_maximize_turns_the_sign_once() -> None:
    result = minimize(lambda x: -sphere(x), X0, GA, budget=FIFTY, maximize=True)
    assert -1e-3 < result.fun <= 0
    assert result.history.best[-1] == np.float32(result.fun)


def test_data_in_a_partial_are_arguments_not_constants() -> None:
    def distance(target: Any, x: Any) -> Any:
        return jnp.sum((x - target) ** 2)

    for target in (1.0, -2.0):
        result = minimize(Partial(distance, jnp.full(3, target)), X0, GA, budget=FIFTY)
        assert result.x.tolist() == pytest.approx([target] * 3, abs=0.1)


def test_the_best_is_kept_and_the_history_never_rises() -> None:
    history = minimize(sphere, X0, GA, budget=FIFTY, key=3).history
    assert (np.diff(history.best) <= 0).all()


def test_the_key_decides() -> None:
    first, again, other = (minimize(sphere, X0, GA, budget=FIFTY, key=key).fun for key in (1, jax.random.key(1), 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (Stop(target=1e-1), "target"),
        (Stop(window=5, tolerance=1e3), "stagnation"),
        (Stop(spread=1e3), "spread"),
        (Stop(diversity=0.3), "diversity"),
        (Stop(step=0.2), "step"),
    ],
)
def test_convergence_ends_a_run_and_says_why(stop: Stop, reason: str) -> None:
    result = minimize(sphere, X0, GA, budget=FIFTY, stop=stop)
    assert (result.reason, result.generations < 50) == (reason, True)


def test_budgets_end_a_run_and_say_which() -> None:
    assert minimize(sphere, X0, GA, budget=FIFTY).reason == "generations"
    spent = minimize(sphere, X0, GA, budget=Budget(evals=815))
    assert (spent.reason, spent.evals) == ("evals", 800)


def test_a_time_budget_ends_soon_after_it() -> None:
    minimize(sphere, X0, GA, budget=Budget(seconds=0.01), stop=Stop(spread=None, diversity=None, step=None, window=None))
    began = time.monotonic()
    result = minimize(sphere, X0, GA, budget=Budget(seconds=0.5), stop=Stop(spread=None, diversity=None, step=None, window=None))
    assert result.reason == "seconds"
    assert 0.5 <= time.monotonic() - began < 30
    assert result.generations > 1


def test_a_callback_sees_numbers_and_may_end_the_run() -> None:
    seen = []
    result = minimize(
        sphere, X0, GA, budget=FIFTY, callback=lambda generation, row: seen.append((generation, row["best"])) or generation >= 20
    )
    assert (result.reason, result.generations) == ("callback", 20)
    assert [generation for generation, _ in seen] == [10, 20]
    assert seen[-1][1] == np.float32(result.fun)


def test_nan_ranks_worst() -> None:
    def half(x: Any) -> Any:
        return jnp.where(x[0] > 0.5, sphere(x), jnp.nan)

    result = minimize(half, X0, GA, budget=FIFTY)
    assert result.fun < 0.05
    assert np.isfinite(result.history.average).all()


def test_a_flat_fitness_is_an_error() -> None:
    with pytest.raises(FlatFitness, match=r"all 160 individuals have the same fitness, 3"):
        minimize(lambda x: 0 * jnp.sum(x) + 3, X0, GA, budget=FIFTY)


def test_nothing_but_nan_is_an_error() -> None:
    with pytest.raises(FlatFitness, match="no finite fitness"):
        minimize(lambda x: jnp.sum(x) * jnp.nan, X0, GA, budget=FIFTY)


@pytest.mark.parametrize("optimizer", [SimulatedAnnealing, MonteCarlo, CMAES])
def test_an_optimum_on_a_reflecting_bound_lets_steps_shorten(optimizer: Any) -> None:
    result = minimize(sphere, X0, optimizer(pop_size=16, bounds=Box(-1.0, 1.0)), budget=FIFTY)
    assert result.fun == pytest.approx(0.75, abs=0.01)
    assert result.history.step[-1] < 0.1 * result.history.step[0]


@pytest.mark.parametrize("mode", ["reflect", "clip", "resample"])
def test_bounds_hold_and_an_optimum_on_them_is_found(mode: Any) -> None:
    result = minimize(sphere, X0, GeneticAlgorithm(pop_size=16, bounds=Box(-1.0, 1.0, mode=mode)), budget=FIFTY)
    assert float(jnp.max(result.x)) <= 1
    assert result.fun == pytest.approx(0.75, abs=0.05)


def test_masked_leaves_come_back_as_they_were() -> None:
    x0 = {"free": jnp.zeros(2), "held": jnp.array([7, 8])}
    ga = GeneticAlgorithm(pop_size=16, mask={"free": True, "held": False})
    result = minimize(lambda x: sphere(x["free"]) + jnp.sum(x["held"]).astype(jnp.float32), x0, ga, budget=FIFTY)
    assert result.x["held"].tolist() == [7, 8]
    assert result.fun == pytest.approx(15, abs=0.01)


def test_a_population_over_a_mesh_gives_the_same_bits() -> None:
    mesh = jax.make_mesh((8,), ("population",), axis_types=(jax.sharding.AxisType.Auto,))
    assert minimize(sphere, X0, GA, budget=FIFTY, mesh=mesh).fun == minimize(sphere, X0, GA, budget=FIFTY).fun


def test_runs_can_be_vmapped() -> None:
    def one(key: Any) -> Any:
        run = start_run(GA.init(key, X0, horizon=50), 50)
        return advance(GA, Fitness(Partial(sphere)), Stop(), run, jnp.int32(50), jnp.int32(50)).state.best_f

    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.jit(jax.vmap(one))(keys)
    assert found.tolist() == pytest.approx([minimize(sphere, X0, GA, budget=FIFTY, key=key).fun for key in keys], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"budget": Budget()}, "limits nothing"),
        ({"budget": Budget(evals=15)}, "does not pay"),
        ({"budget": Budget(seconds=-1.0)}, "does not pay"),
        ({"driver": "gpu"}, "none of auto"),
        ({"optimizer": GeneticAlgorithm(pop_size=2)}, "at least 4"),
        ({"optimizer": GeneticAlgorithm(pop_size=16, crossover="cut")}, "none of differential"),
        ({"optimizer": GeneticAlgorithm(pop_size=16, tournament_size=17)}, "between 1 and"),
        ({"fitness": lambda x: float(np.asarray(x).sum()), "driver": "traced"}, "cannot trace"),
        ({"mesh": jax.make_mesh((3,), ("p",), devices=jax.devices()[:3], axis_types=(jax.sharding.AxisType.Auto,))}, "does not divide"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        minimize(**{"fitness": sphere, "x0": X0, "optimizer": GA, "budget": FIFTY} | arguments)
