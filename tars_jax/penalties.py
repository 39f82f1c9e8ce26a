"""What changes a row's logits before a token is chosen: biases, penalties for repetition, masks. Logits are float32 [R, V].

Each acts only where a row asks for it, and costs nothing in a step where none does. ``table`` is int32 [S, L], the tokens of
each slot so far.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tars_jax.sample_rows import SampleRows

Change = Callable[[jax.Array, SampleRows, jax.Array], jax.Array]  # logits, rows, table -> logits
Matching = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]  # size, counts, matches, and what stands size before
LOG_FLOAT_MAX = 88.7228391  # of float32: a DRY penalty grows no further


def adjust(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    """All of them, in llama.cpp's order: bias, penalties, DRY, then the mask (which no other may undo) and top-n-sigma."""
    logits = penalize(_where_any(rows.biased, _bias, logits, rows, table), rows, table)
    logits = _where_any(_has_dry(rows), _dry, logits, rows, table)
    logits = _where_any(rows.masked, _mask, logits, rows, table)
    return _where_any(rows.random & (rows.top_n_sigma > 0), _top_n_sigma, logits, rows, table)


def penalize(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    """The penalties for repetition alone."""
    repeated = (rows.repeat_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return _where_any(repeated & (rows.window > 0), _penalize, logits, rows, table)


def _where_any(wanted: jax.Array, change: Change, logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    return lax.cond(wanted.any(), change, lambda z, *_: z, logits, rows, table)


def _bias(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    tokens, values = rows.extras.biases[:, 0], lax.bitcast_convert_type(rows.extras.biases[:, 1], jnp.float32)
    tokens = jnp.where(rows.biased[:, None] & (tokens >= 0), tokens, logits.shape[1])
    return logits.at[_each(rows), tokens].add(values, mode="drop")


def _penalize(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858), presence and frequency penalties over each row's window."""
    history, _, recent = _history(rows, table, rows.window)
    counts = jnp.zeros_like(logits).at[_each(rows), jnp.where(recent, history, logits.shape[1])].add(1.0, mode="drop")
    penalty = rows.repeat_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    subtract = counts * rows.frequency_penalty[:, None] + rows.presence_penalty[:, None]
    return jnp.where(counts > 0, repeated - subtract, logits)


def _has_dry(rows: SampleRows) -> jax.Array:
    return (rows.dry_multiplier > 0) & (rows.dry_window > 0)


def _dry(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    """DRY ("don't repeat yourself", P. E. Weidmann, github.com/oobabooga/text-generation-webui/pull/5677), as llama.cpp has it.

    A token that would prolong a repetition of the last n tokens, n at least the allowed length, loses
    multiplier * base ^ (n - allowed length). Repetitions do not reach over a breaker, which itself is never penalised.
    """
    vocab, length = logits.shape[1], rows.length[:, None]
    history, index, recent = _history(rows, table, rows.dry_window)
    breaks = recent & _has_bit(rows.extras.breakers, history)
    limit = jnp.minimum(length - 1 - jnp.max(jnp.where(breaks, index, -1), axis=1, keepdims=True), rows.dry_window[:, None])
    base, allowed = rows.dry_base[:, None], rows.dry_allowed_length[:, None]
    steepest = jnp.where(base > 1.000001, LOG_FLOAT_MAX / jnp.log(jnp.maximum(base, 1.000001)), 0.0).astype(jnp.int32)
    limit = jnp.where(_has_dry(rows)[:, None], jnp.minimum(limit, allowed + steepest), 0)
    repeats = _repeats(history, recent, length, limit)
    counted = recent & (repeats >= allowed)
    longest = jnp.zeros_like(logits, jnp.int32).at[_each(rows), jnp.where(counted, history, vocab)].max(repeats, mode="drop")
    penalty = rows.dry_multiplier[:, None] * base ** (longest - allowed).astype(jnp.float32)
    tokens = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32)[None], logits.shape)
    return jnp.where((longest > 0) & ~_has_bit(rows.extras.breakers, tokens), logits - penalty, logits)


def _repeats(history: jax.Array, recent: jax.Array, length: jax.Array, limit: jax.Array) -> jax.Array:
    """For each position, how many tokens before it are the same as before the row's end, at most ``limit``: int32 [R, L].

    One comparison of all positions for every token of the longest repetition.
    """

    def matching(state: Matching) -> Matching:
        size, counts, matches, earlier, inside = state
        earlier, inside = (jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in (earlier, inside))  # what stands size + 1 before
        end = jnp.take_along_axis(history, jnp.maximum(length - 1 - size, 0), axis=1)
        matches &= inside & (earlier == end) & (size < limit)
        return size + 1, counts + matches.astype(jnp.int32), matches, earlier, inside

    start = jnp.int32(0), jnp.zeros_like(history), recent, history, recent
    return lax.while_loop(lambda state: state[2].any(), matching, start)[1]


def _mask(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    index = jnp.arange(logits.shape[1], dtype=jnp.int32)
    allowed = _has_bit(rows.extras.allowed, jnp.broadcast_to(index[None], logits.shape))
    return jnp.where(rows.masked[:, None] & ~allowed, -jnp.inf, logits)


def _top_n_sigma(logits: jax.Array, rows: SampleRows, table: jax.Array) -> jax.Array:
    """Only what is within n standard deviations of the best (Tang et al. 2024, arXiv 2411.07641)."""
    possible = logits > -jnp.inf
    sigma = jnp.std(logits, axis=1, keepdims=True, where=possible)
    floor = logits.max(axis=1, keepdims=True) - rows.top_n_sigma[:, None] * sigma
    return jnp.where((rows.top_n_sigma[:, None] > 0) & (logits < floor), -jnp.inf, logits)


def _each(rows: SampleRows) -> jax.Array:
    return jnp.arange(rows.slot.shape[0], dtype=jnp.int32)[:, None]


def _history(rows: SampleRows, table: jax.Array, window: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's tokens int32 [R, L], their positions [1, L], and which of them are the last ``window`` [R] so far."""
    history = table.at[rows.slot].get(mode="fill", fill_value=0)
    index = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    return history, index, (index < rows.length[:, None]) & (index >= (rows.length - window)[:, None])


def _has_bit(bits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether each row's bit set uint32 [R, W] has the row's tokens int32 [R, N]: bool [R, N]."""
    words = jnp.take_along_axis(bits, tokens // 32, axis=1)
    return (words >> (tokens % 32).astype(jnp.uint32)) & jnp.uint32(1) > 0
