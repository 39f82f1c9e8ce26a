"""Where evolution searches: low-rank updates of chosen matrices, ``W + scale * a @ b``.

``a`` [O, r] is searched and starts at zero, ``b`` [r, K] is fixed (`basis`). A member's noise on ``a`` is low-rank noise on W, as
in EGGROLL (arXiv 2511.16652), which draws both factors anew each generation, so that the sum of its updates soon has full rank;
here the sum is itself an adapter of rank r, and what was evaluated is what is exported, to the bit.
The scale follows each matrix's root mean square: a has no unit, and one step size suits all.
"""

import math
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tars_jax.adapters import Adapter, Update, change_weights
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.kernels import Tiled, untile
from tars_jax.model import Decoder
from tars_jax.quant import LowRank, QArray, dequantize, innermost

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
Factors = dict[str, jax.Array]  # name of a matrix -> its ``a``: [O, r], or [N, O, r] for N members


@struct.dataclass
class Space:
    """What is fixed, by the names of the matrices: b, float32 [r, K], and the scale, a float32 scalar. The search is for a vector of
    D = r * (sum of outputs) numbers, ``a`` of one matrix after the other."""

    b: dict[str, jax.Array]
    scale: dict[str, jax.Array]
    outputs: tuple[int, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        return self.rank * sum(self.outputs)

    def split(self, vectors: jax.Array) -> Factors:
        """``a`` of every matrix: [D] -> [O, r] each, [N, D] -> [N, O, r]."""
        return dict(zip(self.b, _split(vectors, self.outputs, self.rank), strict=True))


@partial(jax.jit, static_argnames=("outputs", "rank"))
def _split(vectors: jax.Array, outputs: tuple[int, ...], rank: int) -> list[jax.Array]:
    ends = np.cumsum(outputs) * rank
    parts = jnp.split(vectors, ends[:-1].tolist(), axis=-1)
    return [part.reshape(*vectors.shape[:-1], -1, rank) for part in parts]


def choose_layers(spec: str, config: ModelConfig) -> list[int]:
    """Layers by number: ``last:6``, ``all``, or a list such as ``0-3,29``. Raises InvalidRequest."""
    count = config.num_layers
    if spec == "all":
        return list(range(count))
    if match := re.fullmatch(r"last:(\d+)", spec):
        layers = list(range(max(count - int(match[1]), 0), count))
    elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", spec):
        ends = [part.partition("-") for part in spec.split(",")]
        layers = sorted({i for first, _, last in ends for i in range(int(first), min(int(last or first), count) + 1)})
    else:
        raise InvalidRequest(f'layers are "all", "last:6" or a list such as "0-3,29", got {spec!r}')
    if not layers or layers[-1] >= count:
        raise InvalidRequest(f"no such layers: {spec!r}; the model has the layers 0 to {count - 1}")
    return layers


def matrix_names(layers: Collection[int], matrices: Collection[str], config: ModelConfig) -> list[str]:
    """Names of the parameters, e.g. ``layers.29.q``. Raises InvalidRequest for kinds of matrices that no block has."""
    known = [kind for kind in MATRICES if kind != "gate" or config.gated_mlp]
    if wrong := [kind for kind in matrices if kind not in known]:
        raise InvalidRequest(f"no such matrix: {wrong[0]!r}; a block of this model has {', '.join(known)}")
    return [f"layers.{layer}.{kind}" for layer in layers for kind in known if kind in matrices]


def make_space(params: Decoder, b: Mapping[str, np.ndarray]) -> Space:
    """The space of updates in these directions."""
    matrices = {name: weight(params, name) for name in b}
    rank = len(next(iter(b.values())))
    scale = {name: jnp.float32(root_mean_square(w) / math.sqrt(rank)) for name, w in matrices.items()}
    rows = {name: jnp.asarray(value, jnp.float32) for name, value in b.items()}
    return Space(rows, scale, tuple(w.shape[0] for w in matrices.values()), rank)


def updated(params: Decoder, space: Space, vectors: jax.Array) -> Decoder:
    """The parameters with a `LowRank` on every matrix of the space, of one update [D] or of N [N, D]."""
    a = space.split(vectors)
    return change_weights(params, {name: partial(LowRank, a=a[name], b=space.b[name], scale=space.scale[name]) for name in a})


def to_adapter(space: Space, vector: jax.Array, source: str = "the evolved adapter") -> Adapter:
    """The update as an adapter."""
    a = space.split(vector)
    return Adapter({n: Update(np.asarray(a[n]), np.asarray(space.b[n]), float(space.scale[n])) for n in a}, source)


def drift(space: Space, vector: jax.Array) -> float:
    """Norm of an update over the norm of the matrices it changes."""
    moved = total = 0.0
    for name, a in space.split(vector).items():
        left, right = np.asarray(a, np.float64), np.asarray(space.b[name], np.float64)
        square = float(space.scale[name]) ** 2
        moved += square * float(np.sum((left.T @ left) * (right @ right.T)))
        total += square * space.rank * left.shape[0] * right.shape[1]
    return math.sqrt(moved / total)


def weight(params: Decoder, name: str) -> Any:
    """A matrix of a block by its name."""
    _, layer, kind = name.split(".")
    return getattr(params.layers[int(layer)], kind)


def root_mean_square(w: Any) -> float:
    """Of a weight's elements, whatever its layout; low-rank updates on it are left out."""
    return float(np.sqrt(_mean_square(innermost(w))))


@jax.jit
def _mean_square(w: Tiled | QArray | jax.Array) -> jax.Array:
    dense = untile(w) if isinstance(w, Tiled) else dequantize(w)
    return jnp.mean(jnp.square(dense.astype(jnp.float32)))
