"""The second program of a step: logits where a token follows, and that token.

It is one of its own, so that a long prompt's step has logits for its last token alone, so that masks can be made while the device runs
the layers, and so that steps of all sizes share a few of it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax import grammar
from tars_jax.config import ModelConfig
from tars_jax.engine.adapters import fill_scales
from tars_jax.engine.request import TokenLogprob
from tars_jax.engine.scheduler import Span
from tars_jax.engine.sequence import MOST_ENDS, Sequence
from tars_jax.engine.structure import Structure
from tars_jax.model import Decoder, logits
from tars_jax.rows import COLUMN, pack_row
from tars_jax.sample_rows import Extras, no_extras, unpack_rows
from tars_jax.sampling import MAX_TOP_LOGPROBS, Sampled, log_probabilities, sample


class SampleBatch(NamedTuple):
    """How R rows are sampled. numbers: int32 [R, len(rows.FIELDS)], see `rows.pack_row`."""

    numbers: jax.Array
    extras: Extras


def head(params: Decoder) -> Decoder:
    """What `logits` needs of the parameters."""
    return dataclasses.replace(params, layers=(), embed=params.embed if params.lm_head is None else None)


@partial(jax.jit, static_argnames=("structure", "config", "plain", "mesh"), donate_argnames=("tokens", "mu"))
def run_sampler(
    arrays: list[jax.Array],
    tokens: jax.Array,
    mu: jax.Array,
    last: jax.Array,
    strengths: jax.Array,
    batch: SampleBatch,
    *,
    structure: Structure,
    config: ModelConfig,
    plain: bool = False,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(tokens, mu, out)``: the token table int32 [S, L] with the rows' new tokens, where mirostat stands in each slot, and what
    `read_row` reads, int32 [R, 4 + 2 * MAX_TOP_LOGPROBS].

    arrays: of the `head`, flattened; last: states of the last layer, of which the first R are sampled after; strengths: float32
    [R, ranks], of their adapters, where one updates the head; plain: all rows are, see `rows.is_plain`."""
    params = fill_scales(structure.fill(arrays), strengths)
    scores = logits(params, config, last[: len(strengths)])
    if mesh is not None:
        scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
    rows = unpack_rows(batch.numbers, batch.extras)
    sampled = sample(scores, rows, tokens, mu, plain=plain)
    read = tokens.at[rows.slot, rows.length - 1].get(mode="fill", fill_value=0)
    tokens = tokens.at[rows.slot, rows.length].set(sampled.tokens, mode="drop")
    mu = mu.at[rows.slot].set(sampled.mu, mode="drop")
    return tokens, mu, pack(sampled, read)


@partial(jax.jit, static_argnames=("structure", "config"))
def run_scores(
    arrays: list[jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    strengths: jax.Array,
    *,
    structure: Structure,
    config: ModelConfig,
) -> jax.Array:
    """What `read_row` reads for tokens that are given, int32 [T], as if they had been sampled after the last layer's states [T, H].
    strengths: float32 [T, ranks], those of the tokens' adapters."""
    params, _ = structure.fill(arrays)
    own, ids, top = log_probabilities(logits(fill_scales(params, strengths), config, hidden), targets)
    return pack(Sampled(targets, own, ids, top, jnp.zeros_like(own)), targets)


def output_width() -> int:
    """Numbers of a row of `pack`."""
    return 4 + 2 * MAX_TOP_LOGPROBS


def pack(sampled: Sampled, read: jax.Array) -> jax.Array:
    """What `read_row` reads, int32 [R, output_width()]."""
    floats = jnp.concatenate([sampled.logprob[:, None], sampled.top_logprobs, sampled.mu[:, None]], axis=1)
    numbers = [sampled.tokens[:, None], read[:, None], sampled.top_ids, jax.lax.bitcast_convert_type(floats, jnp.int32)]
    return jnp.concatenate(numbers, axis=1)


def read_row(row: np.ndarray, wanted: int) -> tuple[TokenLogprob, int]:
    """A row of `run_sampler`'s output: what was sampled, with ``wanted`` alternatives, and the token it was sampled after."""
    token, ids = int(row[0]), row[2 : 2 + wanted]
    floats = row[2 + MAX_TOP_LOGPROBS :].view(np.float32)
    top = tuple(zip(ids.tolist(), floats[1 : 1 + wanted].tolist(), strict=True))
    return TokenLogprob(token, float(floats[0]), top), int(row[1])


def read_mu(row: np.ndarray) -> float:
    """Where mirostat stands after the token of a row of `run_sampler`'s output."""
    return float(row[-1:].view(np.float32)[0])


class SampleBatches:
    """Makes the samplers' inputs for one engine."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._padding, self._vocab_size = pack_row(slot=max_rows), vocab_size
        self._unused: dict[int, Extras] = {}  # stay on the device

    def empty(self, rows: int) -> SampleBatch:
        """Padding alone."""
        if rows not in self._unused:
            self._unused[rows] = no_extras(rows, self._vocab_size)
        numbers: Any = np.tile(self._padding, (rows, 1))
        return SampleBatch(numbers, self._unused[rows])

    def ends(self, plan: SequenceOf[Span], rows: int) -> np.ndarray:
        """Of the rows of a plan that decode, tokens that end them: int32 [rows, MOST_ENDS], -1 where there are fewer."""
        ends = np.full((rows, MOST_ENDS), -1, np.int32)
        for row, span in enumerate(plan):
            ends[row] = span.sequence.ends
        return ends

    def build(self, plan: SequenceOf[Span], rows: int) -> SampleBatch:
        """The rows of a plan's samples, and padding."""
        batch = self.empty(rows)
        numbers: Any = batch.numbers
        extras, own = batch.extras._asdict(), dict[str, np.ndarray]()

        def writable(name: str) -> np.ndarray:
            if name not in own:
                own[name] = np.zeros(extras[name].shape, extras[name].dtype)
            return own[name]

        sampled = [(span.sequence, span.start + span.count + i) for span in plan if span.samples for i in range(1 + len(span.guesses))]
        wanted = [(row, *sample) for row, sample in enumerate(sampled) if sample[0].finish_reason is None]
        masks = [(sequence.mask, row) for row, sequence, _ in wanted if sequence.mask is not None]
        if grammars := [(mask.constraint, row) for mask, row in masks if mask.constraint is not None]:
            grammar.fill(grammars, writable("allowed"))
        for row, sequence, length in wanted:
            numbers[row] = _numbers(sequence, length)
            _fill_extras(writable, row, sequence, length)
        return SampleBatch(numbers, Extras(**(extras | own)))


def _numbers(sequence: Sequence, length: int) -> np.ndarray:
    row = sequence.numbers.copy()
    row[COLUMN["slot"]], row[COLUMN["length"]] = sequence.slot, length
    row[COLUMN["masked"]] = sequence.mask is not None and sequence.mask.acts(length - sequence.prompt_length)
    if sequence.params.mirostat and sequence.pending == 1:  # else its last value is not known here yet
        row[COLUMN["mu"]] = np.float32(sequence.mu).view(np.int32)
    return row


def _fill_extras(writable: Callable[[str], np.ndarray], row: int, sequence: Sequence, length: int) -> None:
    produced = length - sequence.prompt_length
    if sequence.mask is not None and sequence.mask.acts(produced):
        sequence.mask.fill(writable("allowed")[row], sequence.tokens, produced)
    if sequence.breakers is not None:
        writable("breakers")[row] = sequence.breakers
    if sequence.biases is not None:
        writable("biases")[row] = sequence.biases
