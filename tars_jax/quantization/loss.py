"""What the losses of a model with other weights are: against the source's own predictions, and against a text.

All candidates are evaluated as dense float32 weights in the same shapes, so each of these is one program whatever the types are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax import ops
from tars_jax.cache import RaggedBatch
from tars_jax.config import ModelConfig
from tars_jax.evolve.batches import layout
from tars_jax.evolve.scoring import LOGIT_ROWS, blocks
from tars_jax.model import Decoder, leaf_name, logits
from tars_jax.quant import Observed

_STEP_TOKENS = 1024  # of a pass


def mean_squares(params: Decoder, config: ModelConfig, chunks: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Mean squares of every matrix's inputs over the tokens of chunks of one length: canonical name -> float32 [K].

    params: dense. A tied embedding's inputs are those of the output head.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(
        params if params.lm_head is not None else dataclasses.replace(params, lm_head=params.embed)
    )
    names = [leaf_name(path) for path, _ in paths]
    sums: dict[str, np.ndarray] = {}

    def record(index: jax.Array, squares: jax.Array) -> None:
        name = names[int(index)]
        sums[name] = sums.get(name, 0.0) + np.asarray(squares, np.float64)

    leaves = [
        Observed(leaf, jnp.int32(i), record) if leaf.ndim == 2 and name != "embed" else leaf
        for i, (name, (_, leaf)) in enumerate(zip(names, paths, strict=True))
    ]
    observed = jax.tree.unflatten(tree, leaves)
    rows = max(_STEP_TOKENS // len(chunks[0]), 1)
    steps = [chunks[start : start + rows] for start in range(0, len(chunks) - rows + 1, rows)] or [chunks]
    for step in steps:
        _observe(observed, layout(step), config=config).block_until_ready()
    jax.effects_barrier()
    if params.lm_head is None:
        sums["embed"] = sums.pop("lm_head")
    tokens = sum(len(chunk) for step in steps for chunk in step)
    return {name: (total / tokens).astype(np.float32) for name, total in sums.items()}


@partial(jax.jit, static_argnames="config")
def _observe(params: Decoder, rows: RaggedBatch, *, config: ModelConfig) -> jax.Array:
    states = _states(params, rows, config)
    return _by_rows(lambda part: logits(params, config, part[0]).max(axis=1), (states,))


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """How far a model's predictions on some text are from the source's: mean Kullback-Leibler divergence in nats a token.

    It is the rise of the loss on text that the source itself would write. On a sample it tells models apart that the loss on the sample
    does not: both have the same minimum, but this has no noise from what the text happens to say.
    """

    rows: RaggedBatch
    reference: jax.Array  # float16 [T, V] log-probabilities
    config: ModelConfig

    @classmethod
    def of(cls, source: Decoder, config: ModelConfig, chunks: Sequence[Sequence[int]]) -> "Divergence":
        rows = layout(chunks)
        return cls(rows, _predictions(source, rows, config=config), config)

    def __call__(self, params: Decoder) -> float:
        return float(_divergence(params, self.rows, self.reference, config=self.config))


def chunk_losses(
    params: Decoder, config: ModelConfig, chunks: Sequence[Sequence[int]], done: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Mean negative log-likelihood of the second half of each chunk [N], float64: `perplexity`'s is exp of their mean."""
    losses = []
    for chunk in chunks:
        half = len(chunk) // 2
        found = _losses(params, layout([chunk]), jnp.asarray([*chunk[1:], 0], jnp.int32), config=config)
        losses.append(np.asarray(found, np.float64)[half : len(chunk) - 1].mean())
        done()
    return np.array(losses)


@partial(jax.jit, static_argnames="config")
def _predictions(params: Decoder, rows: RaggedBatch, *, config: ModelConfig) -> jax.Array:
    states = _states(params, rows, config)
    return _by_rows(lambda part: jax.nn.log_softmax(logits(params, config, part[0])).astype(jnp.float16), (states,))


@partial(jax.jit, static_argnames="config")
def _divergence(params: Decoder, rows: RaggedBatch, reference: jax.Array, *, config: ModelConfig) -> jax.Array:
    def block(part: tuple[jax.Array, ...]) -> jax.Array:
        ours, theirs = jax.nn.log_softmax(logits(params, config, part[0])), part[1].astype(jnp.float32)
        return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)

    return _by_rows(block, (_states(params, rows, config), reference)).mean()


@partial(jax.jit, static_argnames="config")
def _losses(params: Decoder, rows: RaggedBatch, targets: jax.Array, *, config: ModelConfig) -> jax.Array:
    def block(part: tuple[jax.Array, ...]) -> jax.Array:
        scores = jax.nn.log_softmax(logits(params, config, part[0]))
        return -jnp.take_along_axis(scores, part[1][:, None], axis=1)[:, 0]

    return _by_rows(block, (_states(params, rows, config), targets))


def _states(params: Decoder, rows: RaggedBatch, config: ModelConfig) -> jax.Array:
    return blocks(params.layers, config, ops.take(params.embed, rows.tokens, jnp.dtype("float32")), rows)


def _by_rows(block: Callable[[tuple[jax.Array, ...]], jax.Array], parts: tuple[jax.Array, ...]) -> jax.Array:
    """``block`` of arrays [T, ...], some rows at a time: all of a vocabulary's logits never stand in memory together."""
    count = parts[0].shape[0]
    rows = math.gcd(count, LOGIT_ROWS)
    found = lax.map(block, tuple(part.reshape(-1, rows, *part.shape[1:]) for part in parts))
    return found.reshape(count, *found.shape[2:])
