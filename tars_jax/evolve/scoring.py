"""What a population's members think of a batch: log-probabilities of completions, by one teacher-forced pass.

The frozen lower blocks run once for the batch (`trunk`), the evolved upper ones once for each member, all members in one pass
(`score`). Only logits that predict a completion are computed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from tars_jax import ops, struct
from tars_jax.cache import RaggedBatch, init_cache
from tars_jax.config import ModelConfig
from tars_jax.evolve.batches import PAGE, ScoreBatch, repeat
from tars_jax.evolve.programs import program
from tars_jax.model import Decoder, Layer, logits, run_blocks

LOGIT_ROWS = 128  # rows of logits held at once: 25 MB with a vocabulary of 49,152


@struct.dataclass
class Scores:
    """Of N members on R examples, float32 [N, R] each: mean log-probability of the completion's tokens, and 1 where greedy
    decoding would write exactly the completion, else 0."""

    log_probability: jax.Array
    exact: jax.Array


@program(("config", "dtype", "first"))
def trunk(params: Decoder, rows: RaggedBatch, *, config: ModelConfig, dtype: str, first: int) -> jax.Array:
    """States [T, D] that enter block ``first``."""
    return blocks(params.layers[:first], config, ops.take(params.embed, rows.tokens, jnp.dtype(dtype)), rows)


@program(("config", "first", "members"))
def score(params: Decoder, states: jax.Array, batch: ScoreBatch, *, config: ModelConfig, first: int, members: int) -> Scores:
    """Scores of ``members`` members, whose blocks from ``first`` on hold their `LowRank` leaves, from `trunk`'s states [T, D]."""
    tokens, examples = states.shape[0], batch.sizes.shape[0]
    x = blocks(params.layers[first:], config, jnp.tile(states, (members, 1)), repeat(batch.rows, members), first)
    wanted = x.reshape(members, tokens, -1)[:, batch.at].reshape(-1, x.shape[1])
    found, best = _log_probabilities(params, config, wanted, jnp.tile(batch.targets, members))

    def per_example(values: jax.Array) -> jax.Array:
        return jax.vmap(lambda v: jax.ops.segment_sum(v, batch.owner, examples + 1)[:-1])(values.reshape(members, -1))

    wrong = per_example(1.0 - best.astype(jnp.float32))
    return Scores(per_example(found) / batch.sizes.astype(jnp.float32)[None], (wrong == 0).astype(jnp.float32))


def blocks(layers: Sequence[Layer], config: ModelConfig, x: jax.Array, rows: RaggedBatch, first: int = 0) -> jax.Array:
    """Neighbouring blocks, ``first`` and those after it, on whole sequences; nothing is cached."""
    cache = init_cache(dataclasses.replace(config, num_layers=1), 1 + rows.page_tables.size, PAGE, x.dtype)
    return run_blocks(layers, config, x, rows, cache, pages=0, context=config.context_length, first=first)[0]


def _log_probabilities(params: Decoder, config: ModelConfig, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of targets [N] after states [N, D], and whether each is the most probable token."""
    if params.norm.ndim == 2:  # a member's own, to be used before rows of several members come together
        states, params = ops.rms_norm(states, params.norm, config.norm_eps), dataclasses.replace(params, norm=None)
    count = states.shape[0]
    rows = min(LOGIT_ROWS, count)
    padding = -count % rows

    def block(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = logits(params, config, part[0])
        found, top = jnp.take_along_axis(scores, part[1][:, None], axis=1)[:, 0], scores.max(axis=1)
        return found - top - jnp.log(jnp.exp(scores - top[:, None]).sum(axis=1)), found >= top

    parts = jnp.pad(states, ((0, padding), (0, 0))).reshape(-1, rows, states.shape[1])
    found, best = lax.map(block, (parts, jnp.pad(targets, (0, padding)).reshape(-1, rows)))
    return found.reshape(-1)[:count], best.reshape(-1)[:count]
