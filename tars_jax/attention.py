"""Ragged paged attention in plain jax: the reference of every kernel, and the path where there is none.

Flash-style: a loop over blocks of queries, and within it over chunks of the row's own pages with a running softmax, so
that nothing of size T x S exists and only pages in use are read (Dao et al. 2022, arXiv 2205.14135).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tars_jax.cache import RaggedBatch, decode

QUERY_BLOCK = 32  # queries of one row handled together; 1 when every row has one query
CHUNK_TOKENS = 256  # cached tokens per inner iteration
MASKED = -1e30  # finite, so that a fully masked chunk gives exp(0) * 0 and not NaN


class _Softmax(NamedTuple):
    """Running softmax of a query block: maximum and sum [KH, Q, 1], weighted values [KH, Q, hd], all float32."""

    maximum: jax.Array
    total: jax.Array
    values: jax.Array


def ragged_attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, batch: RaggedBatch, *, scale: float, window: int = 0, softcap: float = 0.0
) -> jax.Array:
    """Causal attention of every token to its own row's cached tokens.

    q: [T, H, hd]; k_pages, v_pages: [N, KH, page, hd]; window: last tokens a query sees, 0 for all;
    softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2), 0: not. Returns [T, H, hd]
    in q's dtype; padding tokens give zeros.
    """
    num_tokens, heads, head_dim = q.shape
    num_rows, kv_heads = batch.kv_lengths.shape[0], k_pages.shape[1]
    block = 1 if num_tokens == num_rows else min(QUERY_BLOCK, num_tokens)
    starts, lengths = batch.query_starts[:-1], jnp.diff(batch.query_starts)
    block_ends = jnp.cumsum((lengths + block - 1) // block)
    # [KH, T + block, G, hd]: the tail lets the last block of the last row be sliced without clamping
    padded = jnp.pad(q.astype(jnp.float32) * scale, ((0, block), (0, 0), (0, 0)))
    padded = padded.reshape(-1, kv_heads, heads // kv_heads, head_dim).swapaxes(0, 1)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        first = i - jnp.where(row > 0, block_ends[row - 1], 0)  # block number within the row
        begin = starts[row] + first * block
        position = batch.kv_lengths[row] - lengths[row] + first * block + jnp.arange(block, dtype=jnp.int32)
        queries = lax.dynamic_slice_in_dim(padded, begin, block, axis=1)
        last = jnp.minimum(position[-1], batch.kv_lengths[row] - 1)
        result = _attend_row(queries, position, last, batch.page_tables[row], k_pages, v_pages, window, softcap)
        keep = jnp.arange(block) < lengths[row] - first * block  # the block's tail belongs to the next row
        old = lax.dynamic_slice_in_dim(out, begin, block, axis=1)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(keep[None, :, None, None], result, old), begin, axis=1)

    out = lax.fori_loop(0, block_ends[-1], body, jnp.zeros_like(padded))
    return out[:, :num_tokens].swapaxes(0, 1).reshape(q.shape).astype(q.dtype)


def _attend_row(
    queries: jax.Array,
    position: jax.Array,
    last: jax.Array,
    table: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    window: int,
    softcap: float,
) -> jax.Array:
    """One block of one row's queries [KH, B, G, hd] at positions [B] over the row's pages up to ``last``."""
    kv_heads, block, group, head_dim = queries.shape
    page = k_pages.shape[2]
    pages = min(max(CHUNK_TOKENS // page, 1), table.shape[0])
    table = jnp.pad(table, (0, -table.shape[0] % pages))
    flat = queries.reshape(kv_heads, block * group, head_dim)
    query_position = jnp.repeat(position, group)[None, :, None]

    def chunk(c: jax.Array, acc: _Softmax) -> _Softmax:
        ids = lax.dynamic_slice_in_dim(table, c * pages, pages)
        k, v = (decode(p[ids]).swapaxes(0, 1).reshape(kv_heads, pages * page, head_dim) for p in (k_pages, v_pages))
        scores = jnp.einsum("kqd,ksd->kqs", flat, k)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        at = c * pages * page + jnp.arange(pages * page, dtype=jnp.int32)[None, None, :]
        seen = at <= query_position
        if window:
            seen &= at > query_position - window
        scores = jnp.where(seen, scores, MASKED)
        maximum = jnp.maximum(acc.maximum, scores.max(-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - maximum), 0.0)
        # Unwritten slots, and pages given back behind the window, hold anything; their weight is 0, but 0 * NaN would not be.
        ours = (at <= last) & (at > position[0] - window) if window else at <= last
        values = jnp.einsum("kqs,ksd->kqd", weights, jnp.where(ours.swapaxes(1, 2), v, 0.0))
        decay = jnp.exp(acc.maximum - maximum)
        return _Softmax(maximum, acc.total * decay + weights.sum(-1, keepdims=True), acc.values * decay + values)

    rows = (kv_heads, block * group)
    start = _Softmax(jnp.full((*rows, 1), MASKED), jnp.zeros((*rows, 1)), jnp.zeros((*rows, head_dim)))
    first_chunk = jnp.maximum(position[0] - window + 1, 0) // (pages * page) if window else 0
    acc = lax.fori_loop(first_chunk, last // (pages * page) + 1, chunk, start)
    return (acc.values / jnp.maximum(acc.total, 1e-30)).reshape(queries.shape)
