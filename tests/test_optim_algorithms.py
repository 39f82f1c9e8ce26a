"""Each optimizer on functions with a known minimum, and what is particular to it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tars_jax.errors import InvalidRequest
from tars_jax.optim import (
    CMAES,
    AnnealingParams,
    Budget,
    Cycles,
    EvolutionStrategy,
    GeneticAlgorithm,
    GeneticParams,
    HybridOptimization,
    MonteCarlo,
    SimulatedAnnealing,
    Start,
    islands,
    minimize,
    polish,
    referee,
)
from tars_jax.optim.gaussian import learn, start_gaussian
from tars_jax.optim.montecarlo import boltzmann_weights, elite_weights

TREE = {"a": jnp.zeros(2), "b": jnp.zeros((2, 1))}


def bowl(x: Any) -> Any:
    """Minimum 0 at a = 1, b = -1; a hundred times steeper along b."""
    return jnp.sum((x["a"] - 1) ** 2) + 100 * jnp.sum((x["b"] + 1) ** 2)


def tilted(x: Any) -> Any:
    """A narrow valley across the axes; minimum 0 at 0.5."""
    z = x - 0.5
    return jnp.sum(z**2) + 1e3 * jnp.sum(z) ** 2


@pytest.mark.parametrize(
    "optimizer",
    [
        GeneticAlgorithm(pop_size=30),
        GeneticAlgorithm(pop_size=30, crossover="sbx"),
        SimulatedAnnealing(pop_size=30),
        SimulatedAnnealing(pop_size=30, exchange="swap", schedule="exponential"),
        MonteCarlo(pop_size=30),
        MonteCarlo(pop_size=30, method="importance"),
        HybridOptimization(pop_size=30),
        CMAES(pop_size=30),
        CMAES(pop_size=30, covariance="low_rank"),
        islands(GeneticAlgorithm(pop_size=15), count=2, migrate_every=5),
    ],
    ids=lambda o: "-".join([type(o).__name__, *(str(v) for v in vars(o).values() if isinstance(v, str))]),
)
def test_the_minimum_of_a_bowl_is_found_on_a_tree(optimizer: Any) -> None:
    result = minimize(bowl, TREE, optimizer, budget=Budget(evals=6000))
    assert result.fun < 0.02
    assert result.x["b"].ravel().tolist() == pytest.approx([-1, -1], abs=0.02)


def test_an_evolution_strategy_follows_optax_transforms_and_schedules() -> None:
    decay = optax.exponential_decay(1.0, 200, 0.01)
    optimizer = EvolutionStrategy(pop_size=30, transform=optax.adam(lambda step: 0.1 * decay(step)), sigma_schedule=decay)
    result = minimize(bowl, TREE, optimizer, budget=Budget(evals=6000))
    assert result.fun < 0.1
    assert result.history.step[-1] < 0.02 * result.history.step[0]


@pytest.mark.parametrize("method", ["metropolis", "smc"])
def test_walkers_come_down(method: Any) -> None:
    result = minimize(bowl, TREE, MonteCarlo(pop_size=30, method=method), budget=Budget(evals=6000))
    assert result.fun < 2


@pytest.mark.parametrize("optimizer", [CMAES(pop_size=12), MonteCarlo(pop_size=12)])
def test_covariance_follows_a_narrow_valley(optimizer: Any) -> None:
    assert minimize(tilted, jnp.zeros(6), optimizer, budget=Budget(evals=6000)).fun < 1e-6


def test_ask_and_tell_are_pure_and_minimize_is_their_loop() -> None:
    optimizer = GeneticAlgorithm(pop_size=16)
    ask, tell = jax.jit(optimizer.ask), jax.jit(optimizer.tell)
    state = optimizer.init(jax.random.key(5), TREE, optimizer.default_params(TREE), horizon=20)
    for _ in range(20):
        population, asked = ask(state, optimizer.params)
        again, _ = ask(state, optimizer.params)
        assert bool(jnp.all(population["a"] == again["a"]))
        state, info = tell(asked, population, jax.vmap(bowl)(population), optimizer.params)
    assert population["b"].shape == (16, 2, 1)
    best, value = optimizer.best(state)
    assert float(bowl(best)) == pytest.approx(float(value)) == pytest.approx(float(info.best))
    assert float(value) == pytest.approx(minimize(bowl, TREE, optimizer, budget=Budget(generations=20), key=5).fun, rel=1e-3)


def test_a_fitness_of_the_wrong_length_is_refused() -> None:
    optimizer = GeneticAlgorithm(pop_size=16)
    population, state = optimizer.ask(optimizer.init(0, TREE))
    with pytest.raises(InvalidRequest, match="needs"):
        optimizer.tell(state, population, jnp.zeros(3))


def test_elites_survive_their_generation() -> None:
    optimizer = GeneticAlgorithm(pop_size=8, crossover="arithmetic", elites=2)
    propose, learn = jax.jit(optimizer.propose), jax.jit(optimizer.learn)
    _, state = optimizer.ask(optimizer.init(0, jnp.zeros(2)))
    state, _ = learn(state, state.x + 1, jnp.arange(8.0))
    state, _ = learn(propose(state, optimizer.params)[1], state.x, jnp.full(8, 50.0))
    assert state.fitness.tolist() == [0, 1, 50, 50, 50, 50, 50, 50]


def test_noisy_elites_are_asked_for_again_and_believed() -> None:
    optimizer = GeneticAlgorithm(pop_size=8, crossover="arithmetic", elites=2, noisy=True)
    propose, learn = jax.jit(optimizer.propose), jax.jit(optimizer.learn)
    x, state = propose(optimizer.init(0, jnp.zeros(2)), optimizer.params)
    state, _ = learn(state, x, jnp.arange(8.0))
    asked, state = propose(state, optimizer.params)
    assert bool(jnp.all(asked[:2] == x[:2]))
    state, _ = learn(state, asked, jnp.full(8, 50.0))
    assert float(state.fitness[0]) == 50


def test_steps_grow_while_children_succeed_by_the_fifth_rule() -> None:
    optimizer = GeneticAlgorithm(pop_size=8, crossover="arithmetic", adaptation="fifth")
    propose, learn = jax.jit(optimizer.propose), jax.jit(optimizer.learn)
    x, state = propose(optimizer.init(0, jnp.zeros(2)), optimizer.params)
    state, first = learn(state, x, jnp.arange(8.0))
    x, state = propose(state, optimizer.params)
    assert float(learn(state, x, jnp.full(8, -1.0))[1].step) > float(first.step)
    assert float(learn(state, x, jnp.full(8, 99.0))[1].step) < float(first.step)


def test_parameters_may_be_traced_to_compare_settings() -> None:
    optimizer = GeneticAlgorithm(pop_size=8)

    def one(weight: Any) -> Any:
        params = GeneticParams(differential_weight=weight)
        state = optimizer.init(0, jnp.zeros(3), params)
        return optimizer.propose(replace(state, best_f=jnp.float32(1)), params)[1].asked[1].mean()

    assert jax.vmap(one)(jnp.array([0.2, 0.9])).tolist() != [0, 0]


def test_the_temperature_starts_where_the_mean_rise_has_its_acceptance_and_falls() -> None:
    optimizer = SimulatedAnnealing(pop_size=12, chains=3, params=AnnealingParams(initial_acceptance=0.5))
    propose, learn = jax.jit(optimizer.propose), jax.jit(optimizer.learn)
    state, seen = optimizer.init(0, jnp.full(4, 3.0), horizon=40), []
    for _ in range(40):
        x, state = propose(state, optimizer.params)
        state, _ = learn(state, x, jnp.sum(x**2, 1))
        seen.append(float(state.temperature))
    first = propose(optimizer.init(0, jnp.full(4, 3.0)), optimizer.params)[0]
    told = np.sum(np.asarray(first) ** 2, 1)
    assert seen[0] == pytest.approx(np.abs(told - told.mean()).mean() / np.log(2), rel=1e-4)
    assert seen[-1] < 0.1 * seen[0]
    assert (np.diff([t for t in seen if np.isfinite(t)]) <= 0).all()


def test_annealing_reheats_a_bounded_number_of_times() -> None:
    optimizer = SimulatedAnnealing(pop_size=8, max_reheats=2)
    propose, learn = jax.jit(optimizer.propose), jax.jit(optimizer.learn)
    state = optimizer.init(0, jnp.ones(2), horizon=80)
    for _ in range(80):
        x, state = propose(state, optimizer.params)
        state, _ = learn(state, x, jnp.sum(x**2, 1) + jnp.where(state.generation > 5, 100.0, 0.0))
    assert int(state.reheats) == 2


def test_tempering_swaps_the_better_chain_to_the_colder_place() -> None:
    optimizer = SimulatedAnnealing(pop_size=8, chains=2, exchange="swap")
    state = optimizer.init(0, jnp.zeros(2))
    state = replace(state, fitness=jnp.array([9.0, 1.0]), temperature=jnp.float32(0.1), generation=jnp.int32(2))
    swapped = optimizer._exchanged(state, state.temperature, jnp.full(2, 0.999), optimizer.params)
    assert swapped.fitness.tolist() == [1, 9]


def test_elite_weights_sum_to_one_above_zero_and_follow_rank() -> None:
    weights = np.asarray(elite_weights(jnp.array([3.0, 1.0, 2.0, 4.0]), 0.5))
    assert weights[weights > 0].sum() == pytest.approx(1)
    assert np.argsort(-weights).tolist() == [1, 2, 0, 3]


def test_boltzmann_weights_have_the_effective_number_asked_for() -> None:
    fitness = jax.random.normal(jax.random.key(0), (40,)) * 1e4
    weights = boltzmann_weights(fitness, 0.25)
    assert float(1 / jnp.sum(weights**2)) == pytest.approx(10, rel=0.01)


def test_a_generation_without_any_fitness_changes_no_distribution() -> None:
    before = start_gaussian(jnp.zeros(3), jnp.float32(1), "full")
    z = jax.random.normal(jax.random.key(0), (8, 3))
    after = learn(before, z, z, jnp.full(8, jnp.inf), elite_weights(jnp.full(8, jnp.inf), 0.5), jnp.int32(1))
    assert jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, after) == jax.tree.map(lambda _: True, before)


def test_a_sample_at_the_mean_does_not_blow_the_covariance_up() -> None:
    before = start_gaussian(jnp.zeros(3), jnp.float32(1), "full")
    z = jax.random.normal(jax.random.key(0), (8, 3)).at[0].set(0)
    fitness = jnp.arange(8.0)[::-1]  # the sample without a move is the worst
    after = learn(before, z, z, fitness, elite_weights(fitness, 0.5), jnp.int32(1))
    assert float(jnp.max(jnp.abs(after.factor))) < 2


def test_steps_in_many_coordinates_shorten_once_samples_stop_succeeding() -> None:
    gaussian, steps = start_gaussian(jnp.zeros(200), jnp.float32(1), "low_rank"), []
    z = jax.random.normal(jax.random.key(0), (8, 200))
    for generation, fitness in enumerate([0.0, -1.0, -2.0, 9.0, 9.0, 9.0]):
        told = fitness + 0.01 * jnp.arange(8.0)
        gaussian = learn(gaussian, z, z, told, elite_weights(told, 0.5), jnp.int32(generation + 1))
        steps.append(float(gaussian.sigma))
    assert steps[0] < steps[1] < steps[2]
    assert steps[5] < steps[2]


def test_a_spent_stage_hands_on_the_shape_it_has_learnt() -> None:
    result = minimize(tilted, jnp.zeros(6), GeneticAlgorithm(pop_size=12), budget=Budget(generations=60))
    start = GeneticAlgorithm(pop_size=12).hand_over(result.state)
    state = MonteCarlo(pop_size=12).init(0, jnp.zeros(6), start=start)
    assert bool(jnp.all(state.gaussian.factor == result.state.gaussian.factor))
    assert float(state.best_f) == result.fun


def test_a_stage_hands_its_best_to_the_next() -> None:
    start = Start(jnp.array([[5.0, 5.0], [1.0, 2.0]]), jnp.array([9.0, 3.0]), jnp.float32(0.25))
    for optimizer in (GeneticAlgorithm(), SimulatedAnnealing(), MonteCarlo(), MonteCarlo(method="smc"), CMAES(), HybridOptimization()):
        state = optimizer.init(0, jnp.zeros(2), start=start)
        assert (state.best_x.tolist(), float(state.best_f)) == ([1, 2], 3)


def test_the_pipeline_runs_all_stages_and_begins_anew_with_what_is_left() -> None:
    result = minimize(lambda x: jnp.sum(x**2), jnp.ones(2), HybridOptimization(pop_size=12), budget=Budget(generations=400))
    assert result.generations == 400
    assert int(result.state.rounds) > 3
    assert result.fun < 1e-6


def test_islands_without_migration_are_independent_restarts() -> None:
    single = GeneticAlgorithm(pop_size=8)
    both = islands(single, count=2)
    x, _ = both.propose(both.init(0, jnp.zeros(3)), both.params)
    assert x.shape == (16, 3)
    assert not bool(jnp.all(x[1:8] == x[9:]))


def test_migration_needs_an_optimizer_that_takes_guests() -> None:
    with pytest.raises(InvalidRequest, match="own samples"):
        minimize(bowl, TREE, islands(CMAES(pop_size=8), migrate_every=3))


def test_polish_lowers_the_fitness_and_says_by_how_much() -> None:
    result = minimize(bowl, TREE, GeneticAlgorithm(pop_size=30), budget=Budget(generations=12))
    polished = polish(bowl, result)
    assert polished.fun < 1e-6 < result.fun
    assert polished.gain == pytest.approx(result.fun - polished.fun)


def test_polish_refuses_what_has_no_gradient() -> None:
    result = minimize(bowl, TREE, GeneticAlgorithm(pop_size=30), budget=Budget(generations=12))
    with pytest.raises(InvalidRequest, match="gradients"):
        polish(lambda x: float(np.asarray(x["a"]).sum()), result)


def test_the_referee_sees_through_luck() -> None:
    def noisy(x: Any, key: Any) -> Any:
        return x + jax.random.normal(key)

    verdict = referee(noisy, jnp.array([0.3, 0.0, 2.0]), repeats=32)
    assert verdict.order.tolist() == [1, 0, 2]
    assert ((verdict.low <= verdict.mean) & (verdict.mean <= verdict.high)).all()


def test_cycles_improve_and_follow_new_data() -> None:
    def distance(target: Any, x: Any) -> Any:
        return jnp.sum((x - target) ** 2)

    at = lambda value: jax.tree_util.Partial(distance, jnp.full(3, value))  # noqa: E731
    cycles = Cycles(at(1.0), jnp.zeros(3), [GeneticAlgorithm(pop_size=8), CMAES(pop_size=8)], limits_ms=(5.0, 5.0))
    first = cycles.run()
    for _ in range(30):
        last = cycles.run()
    assert last.best < 0.05
    assert len(last.milliseconds) == len(first.generations) == 2
    for _ in range(60):
        last = cycles.run(at(-1.0))
    assert last.best < 0.05
    assert cycles.x.tolist() == pytest.approx([-1] * 3, abs=0.3)
