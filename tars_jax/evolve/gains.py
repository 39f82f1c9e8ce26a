"""A space of few numbers: gains of the norms' weights, ``w * (1 + x)``, so that channels count more or less.

Tuning the norms alone is enough for much (Zhao et al. 2023, arXiv 2312.11420).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import struct
from tars_jax.adapters import Adapter, change_weights
from tars_jax.evolve.data import Example
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder


@struct.dataclass
class NormGains:
    """A `space.Space`: the norms' own weights by name, float32 [H] each."""

    weights: dict[str, jax.Array]

    @property
    def size(self) -> int:
        return sum(len(weight) for weight in self.weights.values())

    def updated(self, params: Decoder, vectors: jax.Array) -> Decoder:
        """The parameters with other norms, [H] each, or [N, H] for N members."""
        gained = _gained(list(self.weights.values()), vectors)

        def use(_: jax.Array, weight: jax.Array) -> jax.Array:
            return weight

        return change_weights(params, {name: partial(use, weight=weight) for name, weight in zip(self.weights, gained, strict=True)})

    def adapter(self, vector: jax.Array) -> Adapter:
        """The norms' weights to be used instead."""
        gained = _gained(list(self.weights.values()), vector)
        return Adapter({}, "the evolved norms", norms=dict(zip(self.weights, map(np.asarray, gained), strict=True)))

    def drift(self, vector: jax.Array) -> float:
        """Norm of the change over the norm of the weights."""
        before = np.concatenate([np.asarray(weight, np.float64) for weight in self.weights.values()])
        moved = before * np.asarray(vector, np.float64)
        return math.sqrt(np.sum(moved**2) / np.sum(before**2))


@jax.jit
def _gained(weights: list[jax.Array], vectors: jax.Array) -> list[jax.Array]:
    parts = jnp.split(vectors, np.cumsum([len(weight) for weight in weights])[:-1].tolist(), axis=-1)
    return [jnp.expand_dims(weight, range(part.ndim - 1)) * (1 + part) for weight, part in zip(weights, parts, strict=True)]


def find_gains(
    params: Decoder, model: Model, settings: Settings, layers: Sequence[int], task: Sequence[Example], other: Sequence[Example]
) -> Iterator[NormGains | None]:
    """As `spaces.find` says: the norms of the layers, and the last one if the last layer is among them."""
    norms = {f"layers.{i}.{kind}": getattr(params.layers[i], kind) for i in layers for kind in ("attention_norm", "mlp_norm")}
    if layers[-1] == len(params.layers) - 1:
        norms["norm"] = params.norm
    return iter([NormGains({name: jnp.asarray(weight, jnp.float32) for name, weight in norms.items()})])
