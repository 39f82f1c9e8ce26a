"""What adapter files have in common: named halves of low-rank updates, put together and checked against the model."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import numpy as np

from tars_jax.adapters import Adapter, Update, is_norm, misfits
from tars_jax.config import ModelConfig
from tars_jax.errors import ModelFileError, refuse
from tars_jax.model import leaf_name, spec


@dataclasses.dataclass(frozen=True)
class Factor:
    """Half of an update, or a whole norm, as a file holds it, turned into our orientation and order of rows."""

    name: str  # in the file
    leaf: str | None  # the weight it belongs to; None: unknown
    side: Literal["a", "b", "norm"]
    value: np.ndarray  # a: [O, r]; b: [r, K]; a norm: [H]


def assemble(factors: Iterable[Factor], config: ModelConfig, scale: Callable[[str, int], float], source: str) -> Adapter:
    """The adapter of these halves; ``scale`` gives an update's factor from its leaf and rank.

    Raises ModelFileError that lists everything unknown, doubled, alone or misshaped together.
    """
    pairs: dict[str, dict[str, Factor]] = {}
    norms: dict[str, np.ndarray] = {}
    faults = []
    for factor in factors:
        if factor.leaf is None:
            faults.append(f"{factor.name} belongs to no weight of this architecture")
        elif factor.side == "norm" and factor.leaf in norms:
            faults.append(f"{factor.name} is there twice")
        elif factor.side == "norm":
            norms[factor.leaf] = np.ascontiguousarray(factor.value, np.float32)
        elif factor.side in pairs.setdefault(factor.leaf, {}):
            faults.append(f"{factor.name} and {pairs[factor.leaf][factor.side].name} are the same half")
        elif factor.value.ndim != 2 or 0 in factor.value.shape:
            faults.append(f"{factor.name} has the shape {list(factor.value.shape)}")
        else:
            pairs[factor.leaf][factor.side] = factor
    faults += [f"{only.name} has no other half" for pair in pairs.values() if len(pair) == 1 for only in pair.values()]
    updates = {}
    for leaf, pair in pairs.items():
        if len(pair) == 2:
            a, b = (np.ascontiguousarray(pair[side].value, np.float32) for side in ("a", "b"))
            updates[leaf] = Update(a, b, scale(leaf, a.shape[1]))
    adapter = Adapter(updates, source, norms=norms)
    faults += misfits(adapter, expected_shapes(config))
    if not faults and not updates and not norms:
        faults = ["it holds no update"]
    refuse(faults, f"{source} does not fit this model", ModelFileError)
    return adapter


def norm_factor(name: str, leaf: str | None, value: np.ndarray) -> Factor:
    """What a file holds under a weight's own name: a norm, or else nothing an adapter can have."""
    return Factor(name, leaf if is_norm(leaf) else None, "norm", value)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight an adapter may name; a tied matrix goes by both its names."""
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(spec(config))[0]}
    return {"lm_head": shapes["embed"]} | shapes


def common_alpha(adapter: Adapter) -> tuple[float, dict[str, np.ndarray]]:
    """An ``alpha`` for the whole file, which readers divide by each update's rank, and every a [O, r] scaled to match it."""
    updates = adapter.updates
    alpha = next((update.scale * update.rank for update in updates.values() if update.scale), 1.0)
    return alpha, {leaf: update.a * np.float32(update.scale * update.rank / alpha) for leaf, update in updates.items()}
