"""Selection, crossover and mutation against what their papers promise."""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax.optim import operators

U = operators.unit(jax.random.key(0), (200, 500), jnp.float32)
A, B = jnp.zeros((200, 500)), jnp.ones((200, 500))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_tournament_is_one_among_different_individuals(size: int) -> None:
    ranks = np.asarray(operators.tournament(U, 10, size))
    shares = np.bincount(ranks.ravel(), minlength=10) / ranks.size
    assert shares == pytest.approx([comb(9 - rank, size - 1) / comb(10, size) for rank in range(10)], abs=0.005)


def test_larger_tournaments_take_over_sooner() -> None:
    """Goldberg and Deb (1991): about (ln N + ln ln N) / ln k generations until the best fills the population."""

    def takeover(size: int) -> float:
        rng, times = np.random.default_rng(0), []
        for _ in range(20):
            population, generations = np.arange(30), 0
            while (population != 0).any():
                winners = operators.tournament(jnp.asarray(rng.uniform(size=30), jnp.float32), 30, size)
                population, generations = np.sort(population)[np.asarray(winners)], generations + 1
                population[0] = 0
            times.append(generations)
        return float(np.mean(times))

    assert takeover(5) < takeover(3) < takeover(2) < 12


def test_blend_keeps_the_variance_at_its_neutral_alpha() -> None:
    a, b = jax.random.normal(jax.random.key(1), (2, 200, 500))
    assert float(jnp.var(operators.blend(U, a, b, 0.366))) == pytest.approx(1, abs=0.02)


def test_sbx_keeps_the_mean_and_stays_nearer_with_a_larger_eta() -> None:
    near, far = operators.simulated_binary(U, A, B, 20.0), operators.simulated_binary(U, A, B, 2.0)
    assert float(jnp.mean(far)) == pytest.approx(0.5, abs=0.01)
    nearest = [float(jnp.mean(jnp.minimum(jnp.abs(child), jnp.abs(child - 1)))) for child in (near, far)]
    assert nearest[0] < nearest[1] / 2


def test_uniform_crossover_takes_each_value_from_either_parent() -> None:
    child = operators.uniform(U, A, B)
    assert set(np.unique(child).tolist()) == {0, 1}
    assert float(jnp.mean(child)) == pytest.approx(0.5, abs=0.01)


def test_arithmetic_children_lie_on_the_line_between_their_parents() -> None:
    child = operators.arithmetic(U, A, B)
    assert bool(jnp.all(child == child[:, :1]) & jnp.all((child >= 0) & (child <= 1)))


def test_a_differential_child_differs_at_least_in_one_coordinate() -> None:
    weight, rate = jnp.full((200, 1), 0.5), jnp.zeros((200, 1))
    child = operators.differential(U, A, B, B, weight, rate)
    assert bool(jnp.all(jnp.sum(child != A, 1) == 1))


def test_polynomial_moves_stay_within_one_and_shrink_with_eta() -> None:
    moves = [operators.polynomial(U, eta) for eta in (5.0, 50.0)]
    assert all(float(jnp.max(jnp.abs(move))) <= 1 for move in moves)
    assert float(jnp.std(moves[1])) < 0.3 * float(jnp.std(moves[0]))


def test_normal_numbers_are_those_of_jax() -> None:
    key = jax.random.key(3)
    ours, theirs = operators.normal(operators.unit(key, (10_000,), jnp.float32)), jax.random.normal(key, (10_000,))
    assert float(jnp.max(jnp.abs(ours - theirs))) < 1e-3


def test_systematic_draws_are_as_even_as_they_can_be() -> None:
    chosen = operators.systematic(jnp.array([0.5, 0.25, 0.25, 0.0]), jnp.float32(0.3))
    assert np.bincount(np.asarray(chosen), minlength=4).tolist() == [2, 1, 1, 0]


def test_boltzmann_weights_give_nothing_to_what_has_no_fitness() -> None:
    weights = operators.boltzmann(jnp.array([1.0, jnp.inf, 1.0 + np.log(2)]), jnp.float32(1))
    assert weights.tolist() == pytest.approx([2 / 3, 0, 1 / 3])
