"""The directions of an evolved matrix's inputs: where the task stands out from other text.

The gradient of a matrix lies in the span of its inputs, and of those that precede a completion only. So few directions are enough,
and a search in them alone is smaller by K / r (EVA, arXiv 2410.07170, starts LoRA from the inputs' principal components). Directions
that other text uses as much are left out, so that other text is left alone: the generalised eigenvectors of the two covariances.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax import ops
from tars_jax.cache import RaggedBatch
from tars_jax.config import ModelConfig
from tars_jax.evolve.batches import ScoreBatch, score_batch, sizes_for
from tars_jax.evolve.data import Example
from tars_jax.evolve.programs import program
from tars_jax.evolve.scoring import blocks, trunk
from tars_jax.model import Decoder, Layer

BATCH_TOKENS = 128  # that run through a block together: a short piece of work
RIDGE = 0.1  # of the mean variance, added to each: directions that the other text hardly uses are not told apart by noise


def find_basis(
    params: Decoder, config: ModelConfig, dtype: str, names: Sequence[str], rank: int, task: Sequence[Example], other: Sequence[Example]
) -> Iterator[dict[str, np.ndarray]]:
    """Directions float32 [r, K] for the named matrices, block by block, each a bounded piece of work."""
    layers = sorted({int(name.split(".")[1]) for name in names})
    batches = [_batches(task), _batches(other)]
    states: list[list[jax.Array]] = [[], []]
    for kind, kept in zip(batches, states, strict=True):
        for batch, _ in kind:
            kept.append(trunk(params, batch.rows, config=config, dtype=dtype, first=layers[0]))
            yield {}
    for i in range(layers[0], layers[-1] + 1):
        first = i if config.no_rope_interval else 0  # else all blocks are one program
        kinds = [name for name in names if name.startswith(f"layers.{i}.")]
        sources = {SOURCES[name.rpartition(".")[2]] for name in kinds}
        rows: list[dict[str, list[np.ndarray]]] = [{source: [] for source in sources} for _ in batches]
        for kind, kept, read in zip(batches, states, rows, strict=True):
            for at, (batch, wanted) in enumerate(kind):
                inputs, kept[at] = _inputs(params.layers[i], kept[at], batch.rows, config=config, first=first)
                for source in sources:
                    read[source].append(np.asarray(inputs[source], np.float32)[wanted])
                yield {}
        for source in sources:
            found = contrast(np.concatenate(rows[0][source]), np.concatenate(rows[1][source]), rank)
            yield {name: found for name in kinds if SOURCES[name.rpartition(".")[2]] == source}


def _batches(examples: Sequence[Example]) -> list[tuple[ScoreBatch, np.ndarray]]:
    """The examples in batches of one shape, of about `BATCH_TOKENS` tokens, the last filled up; and the tokens in each that precede a
    completion's."""
    count = min(max(BATCH_TOKENS // max(map(len, examples)), 1), len(examples))
    sizes, found = sizes_for(examples, count), list[tuple[ScoreBatch, np.ndarray]]()
    for start in range(0, len(examples), count):
        part = examples[start : start + count]
        batch = score_batch([*part, *examples[: count - len(part)]], sizes)
        found.append((batch, np.asarray(batch.at)[np.asarray(batch.owner) < len(part)]))
    return found


def contrast(task: np.ndarray, other: np.ndarray, rank: int) -> np.ndarray:
    """Directions [r, K] in which ``task`` [n, K] has most energy for what ``other`` [m, K] has; each of root mean square 1.

    They are ``C^-1 task.T`` times the eigenvectors of ``task C^-1 task.T``, with C the covariance of ``other`` and a ridge; with fewer
    rows than columns its inverse is written as that of an m x m matrix (Woodbury). Beyond n directions there is nothing to tell apart:
    the rest is drawn at random.
    """
    wanted, wide = task.astype(np.float64), other.astype(np.float64)
    ridge = max(RIDGE * float(np.mean(wide**2)), 1e-12)
    solved: np.ndarray
    if len(wide) < wide.shape[1]:
        kernel = wide @ wide.T + ridge * len(wide) * np.eye(len(wide))
        solved = (wanted - (wanted @ wide.T) @ np.linalg.solve(kernel, wide)) / ridge  # task C^-1, [n, K]
    else:
        solved = np.linalg.solve(wide.T @ wide / len(wide) + ridge * np.eye(wide.shape[1]), wanted.T).T
    _, vectors = np.linalg.eigh(solved @ wanted.T)  # ascending
    directions = vectors[:, ::-1][:, :rank].T @ solved
    if len(directions) < rank:
        rest = np.random.default_rng(0).standard_normal((rank - len(directions), task.shape[1]))
        directions = np.concatenate([directions, rest])
    size = np.sqrt(np.mean(directions**2, axis=1, keepdims=True))
    return (directions / np.maximum(size, np.finfo(np.float64).tiny)).astype(np.float32)


SOURCES = {"q": "attention", "k": "attention", "v": "attention", "o": "heads", "gate": "mlp", "up": "mlp", "down": "inner"}


@program(("config", "first"))
def _inputs(layer: Layer, x: jax.Array, rows: RaggedBatch, *, config: ModelConfig, first: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Inputs [T, K] of a block's matrices, given the states [T, D] that enter it, and the states that leave it.

    They are read off by running the block with other weights: without ``down`` what leaves it is the state between attention and
    feed-forward, and with an identity for ``o`` the difference to what entered are the heads.
    """

    def run(**changes: jax.Array | None) -> jax.Array:
        return blocks([dataclasses.replace(layer, **changes)], config, x, rows, first)

    nothing = {"down": jnp.zeros((config.hidden_size, config.intermediate_size), x.dtype), "down_bias": None}
    width, eps, norm = config.num_heads * config.head_dim, config.norm_eps, layer.mlp_norm
    middle = run(**nothing)
    shifted = [jnp.eye(config.hidden_size, width, at, dtype=x.dtype) for at in range(0, width, config.hidden_size)]
    heads = jnp.concatenate([run(o=identity, o_bias=None, **nothing) - x for identity in shifted], axis=1)
    biases = layer.gate_bias, layer.up_bias
    if layer.gate is None:
        (inner,) = ops.norm_linear(middle, norm, eps, (layer.up,), biases[1:], config.activation)
    else:
        inner = ops.gated(middle, norm, eps, layer.gate, layer.up, biases, config.activation)
    inputs = {
        "attention": ops.rms_norm(x, layer.attention_norm, eps),
        "heads": lax.slice_in_dim(heads, 0, width, axis=1),
        "mlp": ops.rms_norm(middle, norm, eps),
        "inner": inner,
    }
    return inputs, run()
