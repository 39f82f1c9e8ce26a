"""Adapters: small changes of a model, kept apart from it: low-rank updates of weights (LoRA, Hu et al. 2021, arXiv 2106.09685), other
norms, and steering vectors.

An update of a weight W [O, K] is ``scale * a @ b`` with a [O, r] and b [r, K]. LoRA's papers and files call our b "A" and our a "B".
Names and the order of rows are those of `model.spec`, whatever file an adapter came from.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.errors import refuse
from tars_jax.kernels import Tiled
from tars_jax.model import Decoder, leaf_name
from tars_jax.quant import LowRank, QArray


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """``scale * a @ b``, to be added to a weight [O, K]."""

    a: np.ndarray  # float32 [O, r]
    b: np.ndarray  # float32 [r, K]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Updates by the names of the weights they belong to, e.g. ``layers.3.q``. norms: float32 [H], to be used instead of the model's, by
    name, e.g. ``layers.3.mlp_norm``; steering: float32 [H], added to the residual stream after a layer, by its number."""

    updates: Mapping[str, Update]
    source: str = "the adapter"  # for messages
    norms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    steering: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        """The largest rank of its updates."""
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def nbytes(self) -> int:
        arrays = [array for update in self.updates.values() for array in (update.a, update.b)]
        return sum(array.nbytes for array in (*arrays, *self.norms.values(), *self.steering.values()))


def is_norm(name: str | None) -> bool:
    """Whether a weight of this name is a norm of the residual stream, which an adapter may hold."""
    return (name or "").rpartition(".")[2] in ("attention_norm", "mlp_norm", "norm")


def misfits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with an adapter for a model whose weights have these shapes, a line a fault."""
    faults = []
    for name, update in adapter.updates.items():
        outputs, inputs, ranks = update.a.shape[0], update.b.shape[-1], (update.a.shape[1], update.b.shape[0])
        if len(shapes.get(name, ())) != 2:
            faults.append(f"the model has no matrix {name}")
        elif (outputs, inputs) != shapes[name]:
            faults.append(f"{name} is for a matrix of {[outputs, inputs]}, the model's has {list(shapes[name])}")
        elif ranks[0] != ranks[1] or not ranks[0]:
            faults.append(f"{name} has the ranks {ranks[0]} and {ranks[1]}")
        elif not (np.isfinite(update.a).all() and np.isfinite(update.b).all() and np.isfinite(update.scale)):
            faults.append(f"{name} holds numbers that are not finite")
    width = shapes.get("norm", ())
    vectors = {name: (vector, is_norm(name) and name in shapes) for name, vector in adapter.norms.items()}
    vectors |= {f"layer {i}": (vector, f"layers.{i}.down" in shapes) for i, vector in adapter.steering.items()}
    for name, (vector, is_there) in vectors.items():
        if not is_there:
            faults.append(f"the model has no {name}")
        elif vector.shape != width:
            faults.append(f"the vector for {name} has the shape {list(vector.shape)}, the model's residual stream {list(width)}")
        elif not np.isfinite(vector).all():
            faults.append(f"the vector for {name} holds numbers that are not finite")
    return faults


def apply_adapter(params: Decoder, adapter: Adapter, strength: float = 1.0) -> Decoder:
    """The parameters with a `LowRank` leaf for every weight that the adapter updates, ``strength`` times; the base stays as it is.
    Norms go ``strength`` of the way to the adapter's, steering vectors become part of the layers' output biases.

    Several adapters add up, in one `LowRank`. Raises InvalidRequest that lists all updates that do not fit.
    """
    check_fits(params, adapter)
    changes: dict[str, Callable[[Any], Any]] = {}
    changes |= {name: partial(_add, update=update, strength=strength) for name, update in adapter.updates.items()}
    changes |= {name: partial(_towards, goal=norm, strength=strength) for name, norm in adapter.norms.items()}
    params = change_weights(params, changes)
    return steer(params, {i: jnp.asarray(vector * np.float32(strength)) for i, vector in adapter.steering.items()})


def steer(params: Decoder, vectors: Mapping[int, jax.Array]) -> Decoder:
    """The parameters with float32 [H] added to the residual stream after these layers; or [N, H], one for each of N equal runs of
    rows, as a `LowRank` has them."""
    layers = list(params.layers)
    for i, vector in vectors.items():
        bias = layers[i].down_bias
        total = vector if bias is None else jnp.broadcast_to(bias, vector.shape) + vector
        layers[i] = dataclasses.replace(layers[i], down_bias=total)
    return dataclasses.replace(params, layers=tuple(layers))


def check_fits(params: Decoder, adapter: Adapter) -> None:
    """Raise InvalidRequest that lists all updates which do not fit these parameters."""
    refuse(misfits(adapter, weight_shapes(params)), f"{adapter.source} does not fit this model")


def weight_shapes(params: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name, whatever its layout; a matrix tied to the embedding counts as the head it is."""
    return {name: tuple(leaf.shape) for name, leaf in _weights(_untied(params, ["lm_head"]))[0].items()}


def change_weights(params: Decoder, changes: Mapping[str, Callable[[Any], Any]]) -> Decoder:
    """The parameters with the named weights changed."""
    leaves, tree = _weights(_untied(params, changes))
    for name, change in changes.items():
        leaves[name] = change(leaves[name])
    return jax.tree.unflatten(tree, leaves.values())


def is_weight(leaf: Any) -> bool:
    """Whether a node of the parameter tree is one weight, though made of several arrays."""
    return isinstance(leaf, Tiled | QArray | LowRank)


def _weights(params: Decoder) -> tuple[dict[str, Any], Any]:
    """The weights by name, and the tree they make."""
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
    return {leaf_name(path): leaf for path, leaf in paths}, tree


def _untied(params: Decoder, names: Collection[str]) -> Decoder:
    """An adapter means one use of a tied matrix, the embedding or the head, as in PEFT and llama.cpp: where one is named each gets
    its own leaf, on the same arrays."""
    if params.lm_head is not None or not {"embed", "lm_head"} & set(names):
        return params
    return dataclasses.replace(params, lm_head=params.embed)


def _add(leaf: Any, update: Update, strength: float) -> LowRank:
    a, b, scale = jnp.asarray(update.a), jnp.asarray(update.b), jnp.float32(update.scale * strength)
    if not isinstance(leaf, LowRank):
        return LowRank(leaf, a.T, b, scale)
    a = jnp.concatenate([leaf.a * leaf.scale, a.T * scale])
    return LowRank(leaf.base, a, jnp.concatenate([leaf.b, b]), jnp.float32(1))


def _towards(norm: jax.Array, goal: np.ndarray, strength: float) -> jax.Array:
    there = jnp.asarray(goal, norm.dtype)
    return there if strength == 1 else norm + jnp.asarray(strength, norm.dtype) * (there - norm)
