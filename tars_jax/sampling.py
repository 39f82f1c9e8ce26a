"""Choosing tokens: a compiled program in which per-row arrays say what each row wants, and a smaller one for rows that want little.

Filters act in llama.cpp's order: penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature; mirostat takes the place
of those after top-n-sigma. At temperature 0 only biases, penalties and masks act. A row's noise depends only on its seed and its position,
so a request's tokens do not depend on who shares its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tars_jax.filters import draw_filtered, position_keys
from tars_jax.penalties import adjust, penalize
from tars_jax.ranking import argmax, top_k
from tars_jax.rows import CANDIDATES
from tars_jax.sample_rows import SampleRows

MAX_TOP_LOGPROBS = 20


class Sampled(NamedTuple):
    """tokens int32 [R]; logprob float32 [R]; top_ids int32, top_logprobs float32 [R, MAX_TOP_LOGPROBS]; mu float32 [R]."""

    tokens: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    mu: jax.Array  # bits: where mirostat stands now


def sample(logits: jax.Array, rows: SampleRows, table: jax.Array, mu: jax.Array, *, plain: bool = False) -> Sampled:
    """One token per row from float32 logits [R, V].

    table: int32 [S, L], the tokens of each slot so far; mu: float32 [S], where mirostat stands in each. Log-probabilities are the
    model's own, before penalties and filters. plain: all rows are, see `rows.is_plain`.
    """
    mu = jnp.where(jnp.isnan(rows.mu), mu.at[rows.slot].get(mode="fill", fill_value=0.0), rows.mu)
    if plain:
        tokens, _ = _choose(penalize(logits, rows, table), rows, mu, plain=True)
        return Sampled(tokens, *_no_logprobs(logits), mu)
    tokens, mu = _choose(adjust(logits, rows, table), rows, mu)
    own, ids, top = lax.cond((rows.top_logprobs >= 0).any(), log_probabilities, lambda z, _: _no_logprobs(z), logits, tokens)
    return Sampled(tokens, own, ids, top, mu)


def _choose(logits: jax.Array, rows: SampleRows, mu: jax.Array, *, plain: bool = False) -> tuple[jax.Array, jax.Array]:
    """Tokens and where mirostat stands then. Greedy rows cost an argmax, rows with a small top-k a partial sort of few, others several
    passes over all logits; each way is taken only if some row needs it."""
    narrow = _narrow(rows)
    wide = rows.random & ~narrow
    tokens = lax.cond((~rows.random).any(), argmax, lambda z: jnp.zeros(z.shape[0], jnp.int32), logits)
    tokens = lax.cond(narrow.any(), lambda: jnp.where(narrow, _draw_few(logits, rows), tokens), lambda: tokens)

    def draw_wide() -> tuple[jax.Array, jax.Array]:
        drawn, after = draw_filtered(logits, rows, mu, plain=plain)
        return jnp.where(wide, drawn, tokens), jnp.where(wide, after, mu)

    return lax.cond(wide.any(), draw_wide, lambda: (tokens, mu))


def _narrow(rows: SampleRows) -> jax.Array:
    return rows.random & (rows.top_k > 0) & (rows.top_k <= CANDIDATES) & ~rows.special


def _draw_few(logits: jax.Array, rows: SampleRows) -> jax.Array:
    values, ids = top_k(logits, min(CANDIDATES, logits.shape[1]))
    rank = jax.vmap(_rank)(values, rows.temperature, rows.top_k, rows.top_p, rows.min_p, position_keys(rows))
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]


def _rank(values: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, key: jax.Array) -> jax.Array:
    """Rank drawn from one row's descending logits [C], by the Gumbel-max trick."""
    rank = jnp.arange(values.shape[0], dtype=jnp.int32)
    probabilities = jax.nn.softmax(jnp.where(rank < top_k, values, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities
    keep = (rank < top_k) & ((before < top_p) | (top_p >= 1)) & (probabilities >= min_p * probabilities[0])
    noise = jax.random.gumbel(key, values.shape)
    return jnp.argmax(jnp.where(keep | (rank == 0), values / temperature + noise, -jnp.inf)).astype(jnp.int32)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of given tokens [R] under logits [R, V], with the best tokens and theirs, as in `Sampled`."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, ids = top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_TOP_LOGPROBS - values.shape[1]))
    top = jnp.pad(values - normalizer, missing, constant_values=-jnp.inf)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
    return own[:, 0], jnp.pad(ids, missing), top


def _no_logprobs(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (logits.shape[0], MAX_TOP_LOGPROBS)
    return jnp.zeros(shape[0], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
