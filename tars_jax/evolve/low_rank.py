"""The usual space of a search: low-rank updates of chosen matrices, ``W + scale * a.T @ b``.

``a`` [r, O] is searched and starts at zero, ``b`` [r, K] is fixed (`basis`). A member's noise on ``a`` is low-rank noise on W, as
in EGGROLL (arXiv 2511.16652), which draws both factors anew each generation, so that the sum of its updates soon has full rank;
here the sum is itself an adapter of rank r, and what was evaluated is what is exported, to the bit.
The scale follows each matrix's root mean square: a has no unit, and one step size suits all.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import struct
from tars_jax.adapters import Adapter, Update, change_weights
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.basis import find_basis
from tars_jax.evolve.data import Example
from tars_jax.evolve.settings import Settings
from tars_jax.kernels import Tiled, untile
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder
from tars_jax.quant import LowRank, QArray, dequantize, innermost

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
Factors = dict[str, jax.Array]  # name of a matrix -> its ``a``: [r, O], or [N, r, O] for N members


@struct.dataclass
class LowRankUpdates:
    """A `space.Space`. What is fixed, by the names of the matrices: b, float32 [r, K], and the scale, a float32 scalar. The search is for
    a vector of D = r * (sum of outputs) numbers, ``a`` of one matrix after the other."""

    b: dict[str, jax.Array]
    scale: dict[str, jax.Array]
    outputs: tuple[int, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        return self.rank * sum(self.outputs)

    def split(self, vectors: jax.Array) -> Factors:
        """``a`` of every matrix: [D] -> [r, O] each, [N, D] -> [N, r, O]."""
        return dict(zip(self.b, _split(vectors, self.outputs, self.rank), strict=True))

    def updated(self, params: Decoder, vectors: jax.Array) -> Decoder:
        """The parameters with a `LowRank` on every matrix, of one update [D] or of N [N, D]."""
        a = self.split(vectors)
        return change_weights(params, {name: partial(LowRank, a=a[name], b=self.b[name], scale=self.scale[name]) for name in a})

    def adapter(self, vector: jax.Array) -> Adapter:
        """The update as LoRA of this rank; nothing is rounded or cut off."""
        a = self.split(vector)
        return Adapter({n: Update(np.asarray(a[n]).T, np.asarray(self.b[n]), float(self.scale[n])) for n in a}, "the evolved adapter")

    def drift(self, vector: jax.Array) -> float:
        """Norm of an update over the norm of the matrices it changes."""
        moved = total = 0.0
        for name, a in self.split(vector).items():
            left, right = np.asarray(a, np.float64), np.asarray(self.b[name], np.float64)
            square = float(self.scale[name]) ** 2
            moved += square * float(np.sum((left @ left.T) * (right @ right.T)))
            total += square * self.rank * left.shape[1] * right.shape[1]
        return math.sqrt(moved / total)


@partial(jax.jit, static_argnames=("outputs", "rank"))
def _split(vectors: jax.Array, outputs: tuple[int, ...], rank: int) -> list[jax.Array]:
    ends = np.cumsum(outputs) * rank
    parts = jnp.split(vectors, ends[:-1].tolist(), axis=-1)
    return [part.reshape(*vectors.shape[:-1], rank, -1) for part in parts]


def matrix_names(layers: Collection[int], matrices: Collection[str], config: ModelConfig) -> list[str]:
    """Names of the parameters, e.g. ``layers.29.q``. Raises InvalidRequest for kinds of matrices that no block has."""
    known = [kind for kind in MATRICES if kind != "gate" or config.gated_mlp]
    if wrong := [kind for kind in matrices if kind not in known]:
        raise InvalidRequest(f"no such matrix: {wrong[0]!r}; a block of this model has {', '.join(known)}")
    return [f"layers.{layer}.{kind}" for layer in layers for kind in known if kind in matrices]


def find_low_rank(
    params: Decoder, model: Model, settings: Settings, layers: Sequence[int], task: Sequence[Example], other: Sequence[Example]
) -> Iterator[LowRankUpdates | None]:
    """As `spaces.find` says."""
    names, rank = matrix_names(layers, settings.matrices, model.config), settings.rank

    def found() -> Iterator[LowRankUpdates | None]:
        basis: dict[str, np.ndarray] = {}
        for part in find_basis(params, model.config, model.dtype, names, rank, task, other):
            basis |= part
            yield None
        matrices = {name: weight(params, name) for name in names}
        scale = {name: jnp.float32(root_mean_square(w) / math.sqrt(rank)) for name, w in matrices.items()}
        b = {name: jnp.asarray(basis[name], jnp.float32) for name in names}
        yield LowRankUpdates(b, scale, tuple(w.shape[0] for w in matrices.values()), rank)

    return found()


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
