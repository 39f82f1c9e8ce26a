"""Pytrees as vectors: structure, masks, bounds, steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax.errors import InvalidRequest
from tars_jax.optim.space import Box, make_space

X0 = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(7)}
MASK = {"w": np.array([[1, 0, 1], [1, 1, 0]], bool), "b": True, "n": False}


def test_a_tree_comes_back_from_its_vector_with_its_shapes_and_dtypes() -> None:
    space = make_space(X0, mask=MASK)
    back = space.unflatten(space.flatten(X0))
    assert jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.all(a == b)), X0, back) == {"w": True, "b": True, "n": True}


def test_masked_values_never_move() -> None:
    space = make_space(X0, mask=MASK)
    moved = space.unflatten(jnp.full(space.size, 9.0))
    assert space.size == 6
    assert moved["w"].tolist() == [[9, 1, 9], [9, 9, 5]]
    assert moved["n"] == 7


def test_steps_follow_the_leaf_they_are_given_for() -> None:
    space = make_space({"a": jnp.zeros(2), "b": jnp.zeros(3)}, step={"a": 0.1, "b": jnp.array([1.0, 2.0, 3.0])})
    assert space.step.tolist() == pytest.approx([0.1, 0.1, 1, 2, 3])


def test_a_step_that_is_not_given_is_the_size_of_its_leaf() -> None:
    space = make_space({"a": jnp.full(2, -3.0), "b": jnp.full(2, 4.0), "zero": jnp.zeros(1)})
    assert space.step.tolist() == pytest.approx([3, 3, 4, 4, 10**0.5])


def test_a_step_within_a_box_is_a_share_of_its_width() -> None:
    assert make_space(jnp.zeros(2), Box(-1.0, 3.0)).step.tolist() == pytest.approx([1.2, 1.2])


@pytest.mark.parametrize("mode", ["reflect", "clip", "resample"])
def test_every_mode_keeps_far_points_inside(mode: str) -> None:
    space = make_space(jnp.zeros(4), Box(-1.0, jnp.array([2.0, 1.0, jnp.inf, 0.5]), mode=mode))
    x = 100 * jax.random.normal(jax.random.key(0), (64, 4))
    inside = space.confine(jax.random.key(1), x, jnp.zeros_like(x))
    assert bool(jnp.all((inside >= space.lower[None]) & (inside <= space.upper[None])))


def test_points_inside_stay_where_they_are() -> None:
    x = jnp.array([[0.5, -0.25]])
    for mode in ("reflect", "clip", "resample"):
        space = make_space(jnp.zeros(2), Box(-1.0, 1.0, mode=mode))
        assert bool(jnp.all(space.confine(jax.random.key(0), x, x) == x))


def test_reflection_mirrors_at_the_bound_however_far() -> None:
    space = make_space(jnp.zeros(4), Box(jnp.array([-1.0, -1.0, -1.0, -jnp.inf]), jnp.array([1.0, 1.0, jnp.inf, 1.0])))
    x = jnp.array([1.25, 5.5, -3.0, 2.0])  # the second one turns back at 1, -1, 1
    assert space.confine(jax.random.key(0), x, jnp.zeros(4)).tolist() == pytest.approx([0.75, 0.5, 1.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x0": jnp.arange(3)}, "floating-point"),
        ({"x0": jnp.zeros(3), "mask": False}, "nothing to optimise"),
        ({"x0": jnp.zeros(3), "bounds": Box(1.0, -1.0)}, "not below"),
        ({"x0": jnp.zeros(3), "bounds": Box(1.0, 2.0)}, "outside its bounds"),
        ({"x0": jnp.zeros(3), "bounds": Box(-1.0, 1.0, mode="wrap")}, "none of reflect"),
        ({"x0": jnp.array([0.0, jnp.nan])}, "not finite"),
        ({"x0": jnp.zeros(3), "step": 0.0}, "not positive"),
        ({"x0": jnp.zeros(3), "step": jnp.ones(2)}, "does not fit"),
        ({"x0": {"a": jnp.zeros(3)}, "step": {"b": 1.0}}, "structure"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments: dict, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        make_space(**arguments)
