"""Sequences laid out as a ragged batch, and its copies for a population: N members are N equal runs, as `quant.LowRank` wants them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import struct
from tars_jax.cache import RaggedBatch
from tars_jax.evolve.data import Example

PAGE = 16  # tokens of a page
STEPS = 4  # sizes between two powers of two: at most a quarter of a batch is padding, and few programs are compiled


@struct.dataclass
class ScoreBatch:
    """A batch of R examples and the M predictions in it that count.

    at: int32 [M], tokens whose logits predict targets: int32 [M]; owner: int32 [M], the example each belongs to, R for padding.
    sizes: int32 [R], predictions of each example.
    """

    rows: RaggedBatch
    at: jax.Array
    targets: jax.Array
    owner: jax.Array
    sizes: jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a batch has at least: where many batches have the same sizes, one program runs them all."""

    tokens: int = 0
    predictions: int = 0
    pages: int = 0  # of each sequence


def sizes_for(examples: Sequence[Example], count: int) -> Sizes:
    """Sizes in which any ``count`` of the examples fit."""
    tokens = round_up(sum(sorted((len(example) - 1 for example in examples), reverse=True)[:count]))
    predictions = sum(sorted((len(example.completion) for example in examples), reverse=True)[:count])
    return Sizes(tokens, round_up(predictions, 8), round_up(-(-tokens // PAGE), 1))  # the last sequence may be drawn out to all tokens


def round_up(count: int, unit: int = PAGE) -> int:
    """The next of the sizes that batches have: multiples of ``unit``, in steps of at most a quarter."""
    step = max(unit, (1 << max(count - 1, 0).bit_length()) // (2 * STEPS))
    return -(-count // step) * step


def layout(sequences: Sequence[Sequence[int]], *, room: int = 0, tokens: int = 0, pages: int = 0) -> RaggedBatch:
    """One run of tokens for each sequence, ``tokens`` in all or more, in ``pages`` pages or more each; ``room``: tokens that its pages
    hold beyond it.

    The last sequence is drawn out with zeros to a round number of tokens. Attention is causal, so nothing before them changes.
    """
    counts = [len(sequence) for sequence in sequences]
    flat = np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences])
    tokens = max(tokens, round_up(len(flat)))
    counts[-1] += tokens - len(flat)
    width = max(pages, round_up(-(-(max(counts) + room) // PAGE), 1))
    return RaggedBatch(
        tokens=jnp.asarray(np.pad(flat, (0, tokens - len(flat)))),
        positions=jnp.asarray(np.concatenate([np.arange(count) for count in counts]), jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        kv_lengths=jnp.asarray(counts, jnp.int32),
        page_tables=jnp.asarray(1 + np.arange(len(counts) * width).reshape(-1, width), jnp.int32),
        prompts_at=jnp.zeros(1, jnp.int32),
    )


def score_batch(examples: Sequence[Example], least: Sizes = Sizes()) -> ScoreBatch:
    """Lay out examples, in these sizes or larger ones, so that each completion token is predicted from all tokens before it."""
    sequences = [(*example.prompt, *example.completion)[:-1] for example in examples]  # the last token predicts nothing
    sizes = [len(example.completion) for example in examples]
    ends = np.cumsum([len(sequence) for sequence in sequences])
    at = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)])
    padding = (0, max(least.predictions, round_up(len(at), 8)) - len(at))
    targets = np.concatenate([example.completion for example in examples])
    owner = np.repeat(np.arange(len(examples)), sizes)
    return ScoreBatch(
        rows=layout(sequences, tokens=least.tokens, pages=least.pages),
        at=jnp.asarray(np.pad(at, padding), jnp.int32),
        targets=jnp.asarray(np.pad(targets, padding), jnp.int32),
        owner=jnp.asarray(np.pad(owner, padding, constant_values=len(examples)), jnp.int32),
        sizes=jnp.asarray(sizes, jnp.int32),
    )


def repeat(rows: RaggedBatch, members: int) -> RaggedBatch:
    """The batch, ``members`` times over, each with pages of its own."""
    tokens, (sequences, width) = rows.tokens.shape[0], rows.page_tables.shape
    starts = jnp.arange(members, dtype=jnp.int32)[:, None] * tokens + rows.query_starts[None, :-1]
    pages = 1 + jnp.arange(members * sequences * width, dtype=jnp.int32)
    return RaggedBatch(
        tokens=jnp.tile(rows.tokens, members),
        positions=jnp.tile(rows.positions, members),
        query_starts=jnp.append(starts.reshape(-1), jnp.int32(members * tokens)),
        kv_lengths=jnp.tile(rows.kv_lengths, members),
        page_tables=pages.reshape(-1, width),
        prompts_at=rows.prompts_at,
    )
