"""Ragged paged attention against softmax attention written out, over random batches."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars_jax.attention import ragged_attention
from tars_jax.cache import RaggedBatch, write, write_slots


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """One row: q [Tq, H, hd] are the last of k, v [S, KH, hd]."""
    queries, heads, dim = q.shape
    out = np.zeros_like(q)
    for t in range(queries):
        position = len(k) - queries + t
        first = max(position - window + 1, 0) if window else 0
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            scores = k[first : position + 1, kv] @ q[t, h] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[first : position + 1, kv]
    return out


def ragged(rows: list[tuple[int, int]], pad_tokens: int, pad_rows: int, page: int, rng: np.random.Generator) -> RaggedBatch:
    """rows: (cached before, new tokens) of each row; pages are handed out in random order."""
    counts = [new for _, new in rows]
    total = sum(counts)
    lengths = np.array([old + new for old, new in rows] + [0] * pad_rows, np.int32)
    width = max(-(-int(n) // page) for n in lengths) or 1
    order = rng.permutation(np.arange(1, 1 + width * len(lengths))).astype(np.int32)
    positions = np.concatenate([np.arange(old, old + new) for old, new in rows] + [np.full(pad_tokens, -1)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts), np.full(pad_rows, total)]).astype(np.int32)
    return RaggedBatch(np.zeros(total + pad_tokens, np.int32), positions, starts, lengths, order.reshape(len(lengths), width))


def check(
    rows: list[tuple[int, int]], *, pad_tokens: int = 0, pad_rows: int = 0, page: int = 4, window: int = 0, heads: tuple[int, int] = (4, 2)
) -> None:
    rng = np.random.default_rng(len(rows) + window)
    H, KH, dim = *heads, 8
    batch = ragged(rows, pad_tokens, pad_rows, page, rng)
    batch = batch.replace(
        **{f: jnp.asarray(getattr(batch, f)) for f in ("tokens", "positions", "query_starts", "kv_lengths", "page_tables")}
    )
    pool = np.full((2, int(batch.page_tables.max()) + 1, KH, page, dim), np.nan, np.float32)  # unwritten slots must not be read
    q = rng.normal(size=(len(batch.positions), H, dim)).astype(np.float32)
    expected = np.zeros_like(q)
    new_kv = rng.normal(size=(2, len(q), KH, dim)).astype(np.float32)
    for r, (old, new) in enumerate(rows):
        at = int(batch.query_starts[r])
        history = rng.normal(size=(2, old, KH, dim)).astype(np.float32)
        for i in range(old):
            pool[:, batch.page_tables[r, i // page], :, i % page] = history[:, i]
        k, v = np.concatenate([history, new_kv[:, at : at + new]], axis=1)
        expected[at : at + new] = reference(q[at : at + new], k, v, window)
    slots = write_slots(batch, page)
    k_pages, v_pages = (write(jnp.asarray(pool[i]), slots, jnp.asarray(new_kv[i])) for i in range(2))
    result = ragged_attention(jnp.asarray(q), k_pages, v_pages, batch, scale=dim**-0.5, window=window)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1)], ids=["MHA", "GQA", "MQA", "odd"])
def test_head_groupings(heads: tuple[int, int]) -> None:
    check([(5, 3), (0, 7)], heads=heads)


def test_one_token_per_row() -> None:
    check([(0, 1), (9, 1), (33, 1)], pad_rows=1, pad_tokens=1)


def test_long_prompt_in_blocks_and_chunks() -> None:
    check([(300, 70), (0, 40)], page=16)


def test_sliding_window_over_several_chunks() -> None:
    check([(600, 40), (700, 1)], page=16, window=50)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([0, 1, 5]),
)
def test_any_ragged_batch(rows: list[tuple[int, int]], pad_tokens: int, pad_rows: int, window: int) -> None:
    check(rows, pad_tokens=pad_tokens, pad_rows=pad_rows, window=window)
