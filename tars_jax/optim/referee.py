"""The referee: candidates are evaluated again on fresh data, so that a lucky evaluation does not win.

The interval is a percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tars_jax.errors import InvalidRequest
from tars_jax.optim.base import as_key, ranked_last
from tars_jax.optim.space import Tree

RESAMPLES = 1000


@dataclass(frozen=True)
class Verdict:
    """Means of the repeated evaluations, best candidate first in ``order``, with bounds of their confidence intervals."""

    x: Tree  # the winner
    order: np.ndarray  # [M] candidates, best mean first
    mean: np.ndarray  # [M] by candidate
    low: np.ndarray  # [M]
    high: np.ndarray  # [M]


def referee(
    fitness: Callable[[Tree, Array], Any], candidates: Tree, key: Array | int = 0, repeats: int = 16, confidence: float = 0.95
) -> Verdict:
    """Evaluate ``candidates`` (a leading axis M) ``repeats`` times each and pick the one with the smallest mean.

    ``fitness(individual, key)`` draws its data from the key: a repeat has the same key, so the same data, for all candidates.
    """
    if repeats < 2 or not 0 < confidence < 1:
        raise InvalidRequest(f"repeats={repeats} must be at least 2 and confidence={confidence} between 0 and 1")
    data_key, draw_key = jax.random.split(as_key(key))
    keys = jax.random.split(data_key, repeats)
    values = ranked_last(jax.vmap(lambda x: jax.vmap(lambda key: jnp.asarray(fitness(x, key)))(keys))(candidates))  # [M, repeats]
    chosen = jax.random.randint(draw_key, (RESAMPLES, repeats), 0, repeats)
    means = np.asarray(jnp.mean(values[:, chosen], 2))  # [M, RESAMPLES]
    mean, tail = np.asarray(jnp.mean(values, 1)), 50 * (1 - confidence)
    order = np.argsort(mean, stable=True)
    low, high = np.percentile(means, [tail, 100 - tail], axis=1)
    return Verdict(jax.tree.map(lambda leaf: leaf[order[0]], candidates), order, mean, low, high)
