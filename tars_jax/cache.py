"""The paged KV cache and the ragged batch that reads and writes it.

A page holds ``page_size`` tokens of one sequence; a row's page table lists its pages in order. Page 0 belongs to nobody:
padding writes there. (Kwon et al. 2023, PagedAttention, arXiv 2309.06180.)
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from tars_jax import struct
from tars_jax.config import ModelConfig

SCALE_BYTES = 4  # of an 8-bit vector


@struct.dataclass
class KVCache:
    """Keys and values of every layer, [layers * num_pages, KV heads, page_size, head_dim] each: layer i's page p stands at
    i * num_pages + p. One array and not one a layer, because handing a buffer to a program costs the host microseconds.

    An int8 cache has vectors of head_dim + 4: the bytes of a float32 scale, then codes (see `encode`).
    """

    k: jax.Array
    v: jax.Array

    @property
    def page_size(self) -> int:
        return int(self.k.shape[2])


@struct.dataclass
class RaggedBatch:
    """T tokens of R sequences, each a run of neighbours in the token axis; padding tokens and rows come last.

    tokens, positions: int32 [T]; padding tokens have position -1.
    query_starts: int32 [R + 1], where each row's run begins; padding rows are empty runs.
    kv_lengths: int32 [R], tokens in the row's cache once this batch is written (0 for padding rows).
    page_tables: int32 [R, P].
    prompts_at: int32 [1], the token from which on all are a prompt's, those before being generated ones; None: there is no prompt. Kernels
    may have an arithmetic for each (with AMX quantised weights become bfloat16 for a prompt's tokens, while the others' states are rounded
    to 8 bits), so that what becomes of a token never depends on how many others are computed with it.
    """

    tokens: jax.Array
    positions: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_tables: jax.Array
    prompts_at: jax.Array | None = None

    @property
    def rows(self) -> jax.Array:
        """Row of each token, int32 [T]; padding tokens get the last row."""
        index = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        row = jnp.searchsorted(self.query_starts, index, side="right").astype(jnp.int32) - 1
        return jnp.minimum(row, self.kv_lengths.shape[0] - 1)

    @property
    def last_tokens(self) -> jax.Array:
        """Index of each row's last token, int32 [R]; 0 for padding rows."""
        return jnp.maximum(self.query_starts[1:] - 1, 0)


def init_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    allocate: Callable[[tuple[int, ...], jnp.dtype], jax.Array] = jnp.zeros,
) -> KVCache:
    """An empty cache of ``num_pages`` pages, page 0 included. Slots are written before they are read, so ``allocate`` may give
    an array with any contents."""
    width = config.head_dim + (SCALE_BYTES if dtype == jnp.int8 else 0)
    shape = (config.num_layers * num_pages, config.num_kv_heads, page_size, width)
    return KVCache(k=allocate(shape, dtype), v=allocate(shape, dtype))


def write_slots(batch: RaggedBatch, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Page and offset in it for each token, int32 [T] each; padding goes to page 0."""
    page_index = jnp.maximum(batch.positions, 0) // page_size
    page = jnp.where(batch.positions < 0, 0, batch.page_tables[batch.rows, page_index])
    return page, jnp.maximum(batch.positions, 0) % page_size


def write(pages: jax.Array, slots: tuple[jax.Array, jax.Array], values: jax.Array) -> jax.Array:
    """Put values [T, KV heads, head_dim] into pages."""
    return pages.at[slots[0], :, slots[1]].set(encode(values, pages.dtype))


def encode(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Vectors [..., hd] as a cache of this type holds them. With int8 the largest magnitude becomes 127, and what is not finite makes the
    whole vector NaN: [..., 4 + hd]."""
    if dtype != jnp.int8:
        return values.astype(dtype)
    wide = values.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    finite = jnp.isfinite(top)
    inverse = jnp.where(finite & (top >= 1e-36), 127 / top, 0.0)
    scale = jnp.where(finite, top / 127, jnp.nan)
    codes = jnp.round(jnp.where(finite, wide, 0.0) * inverse).astype(jnp.int8)
    return jnp.concatenate([jax.lax.bitcast_convert_type(scale[..., 0], jnp.int8), codes], axis=-1)


def decode(pages: jax.Array) -> jax.Array:
    """What `encode` made, as float32 [..., hd]."""
    if pages.dtype != jnp.int8:
        return pages.astype(jnp.float32)
    scale = jax.lax.bitcast_convert_type(pages[..., :SCALE_BYTES], jnp.float32)
    return pages[..., SCALE_BYTES:].astype(jnp.float32) * scale[..., None]


@partial(jax.jit, static_argnames="num_pages")
def gather_pages(caches: list[jax.Array], pages: jax.Array, *, num_pages: int) -> list[jax.Array]:
    """The contents of pages [n] in a cache's arrays [layers * num_pages, ...]: [n, layers, ...] each."""
    return [array.reshape(-1, num_pages, *array.shape[1:])[:, pages].swapaxes(0, 1) for array in caches]


@partial(jax.jit, static_argnames="num_pages", donate_argnames="caches")
def scatter_pages(caches: list[jax.Array], pages: jax.Array, contents: list[jax.Array], *, num_pages: int) -> list[jax.Array]:
    """Cache arrays with the contents of pages [n] replaced by what `gather_pages` gave."""
    views = [array.reshape(-1, num_pages, *array.shape[1:]) for array in caches]
    filled = [view.at[:, pages].set(content.swapaxes(0, 1)) for view, content in zip(views, contents, strict=True)]
    return [view.reshape(array.shape) for view, array in zip(filled, caches, strict=True)]
