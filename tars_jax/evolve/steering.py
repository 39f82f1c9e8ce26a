"""A space of few numbers: steering vectors, added to the residual stream after chosen layers (Turner et al. 2023, arXiv 2308.10248).

llama.cpp calls them control vectors. They are measured in the size that the stream has there: one step size suits all layers.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import struct
from tars_jax.adapters import Adapter, steer
from tars_jax.cache import RaggedBatch
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.batches import ScoreBatch, score_batch
from tars_jax.evolve.data import Example
from tars_jax.evolve.programs import program
from tars_jax.evolve.scoring import blocks, trunk
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder, Layer

UNIT = 0.25  # of the stream's size: a step of the usual 2 % is then 0.5 % of it, and coarser ones cost other text more than they bring


@struct.dataclass
class SteeringVectors:
    """A `space.Space`. sizes: float32 [L], the stream's root mean square after each layer; width: H, of the stream."""

    sizes: jax.Array
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        return len(self.layers) * self.width

    def updated(self, params: Decoder, vectors: jax.Array) -> Decoder:
        """The parameters with output biases, [H] for a layer, or [N, H] for N members."""
        return steer(params, dict(zip(self.layers, _scaled(self.sizes, vectors), strict=True)))

    def adapter(self, vector: jax.Array) -> Adapter:
        """The vectors themselves."""
        scaled = map(np.asarray, _scaled(self.sizes, vector))
        return Adapter({}, "the evolved steering", steering=dict(zip(self.layers, scaled, strict=True)))

    def drift(self, vector: jax.Array) -> float:
        """Norm of the vectors over that of the states they are added to."""
        sizes = np.asarray(self.sizes, np.float64)
        moved = UNIT * sizes[:, None] * np.asarray(vector, np.float64).reshape(len(sizes), -1)
        return math.sqrt(np.sum(moved**2) / np.sum(sizes**2 * self.width))


@jax.jit
def _scaled(sizes: jax.Array, vectors: jax.Array) -> list[jax.Array]:
    return [part * (UNIT * size) for part, size in zip(jnp.split(vectors, len(sizes), axis=-1), sizes, strict=True)]


def find_steering(
    params: Decoder, model: Model, settings: Settings, layers: Sequence[int], task: Sequence[Example], other: Sequence[Example]
) -> Iterator[SteeringVectors | None]:
    """As `spaces.find` says. The sizes are medians over tokens: the first of a sequence are often hundreds of times as large
    (Sun et al. 2024, arXiv 2402.17762). Raises InvalidRequest for layer 0, which a control vector's file cannot name."""
    chosen = [layer for layer in layers if layer]
    if not chosen or (len(chosen) < len(layers) and settings.layers != "all"):
        raise InvalidRequest("steering vectors are added after layer 1 and later ones: llama.cpp's files cannot name layer 0")
    return _measured(params, model, chosen, score_batch([*task, *other]))


def _measured(params: Decoder, model: Model, layers: Sequence[int], batch: ScoreBatch) -> Iterator[SteeringVectors | None]:
    at = np.asarray(batch.at)[np.asarray(batch.owner) < len(batch.sizes)]
    x = trunk(params, batch.rows, config=model.config, dtype=model.dtype, first=layers[0])
    yield None
    sizes = []
    for i in range(layers[0], layers[-1] + 1):
        first = i if model.config.no_rope_interval else 0  # else all blocks are one program
        x = _leave(params.layers[i], x, batch.rows, config=model.config, first=first)
        if i in layers:
            states = np.asarray(x, np.float64)[at]
            sizes.append(math.sqrt(np.median(np.mean(states**2, axis=1))))
        yield None
    yield SteeringVectors(jnp.asarray(sizes, jnp.float32), tuple(layers), model.config.hidden_size)


@program(("config", "first"))
def _leave(layer: Layer, x: jax.Array, rows: RaggedBatch, *, config: ModelConfig, first: int) -> jax.Array:
    """States [T, H] that leave a block."""
    return blocks([layer], config, x, rows, first)
