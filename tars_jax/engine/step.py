"""One step on the device: run the planned tokens, sample where a sequence's last token is among them.

The device keeps each row's token history, so a decode's input token never visits the host between two steps.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax import kernels, sharding
from tars_jax.cache import KVCache, RaggedBatch, init_cache
from tars_jax.config import EngineConfig, ModelConfig
from tars_jax.engine.request import TokenLogprob
from tars_jax.engine.scheduler import Plan, Span
from tars_jax.engine.sequence import Sequence
from tars_jax.model import Decoder, forward, logits
from tars_jax.sampling import MAX_TOP_LOGPROBS, SampleRows, sample

FROM_DEVICE = -1  # input token: the one this row sampled last


@struct.dataclass
class EngineState:
    """What lives on the device between steps. tokens: int32 [max_rows, max_context], each slot's token history."""

    cache: KVCache
    tokens: jax.Array


@struct.dataclass
class StepBatch:
    """Input of a step of T tokens and R rows. slots: int32 [R], max_rows for padding; samples: bool [R]."""

    ragged: RaggedBatch
    slots: jax.Array
    samples: jax.Array
    rows: SampleRows


def init_state(config: ModelConfig, engine: EngineConfig, mesh: Mesh | None = None) -> EngineState:
    """An empty cache and token table for a resolved engine configuration."""
    num_pages = 1 + -(-engine.cache_tokens // engine.page_size)
    has_kernels = jax.default_backend() == "cpu" and kernels.available()
    allocate = kernels.empty if has_kernels and mesh is None else jnp.zeros
    if mesh is not None:
        allocate = partial(jnp.zeros, device=NamedSharding(mesh, sharding.CACHE))
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    cache = init_cache(config, num_pages, engine.page_size, jnp.dtype(engine.cache_dtype), allocate)
    return EngineState(cache=cache, tokens=jnp.zeros((engine.max_rows, engine.max_context), jnp.int32, device=whole))


@partial(jax.jit, static_argnames=("tree", "config", "dtype", "mesh"), donate_argnames="state")
def run_step(
    leaves: list[jax.Array],
    state: EngineState,
    batch: StepBatch,
    *,
    tree: jax.tree_util.PyTreeDef,
    config: ModelConfig,
    dtype: str,
    mesh: Mesh | None = None,
) -> tuple[EngineState, jax.Array]:
    """``(state, out)``: out is int32 [R, 2 + 2 * MAX_TOP_LOGPROBS], see `read_row`; rows that do not sample hold noise.

    The parameters come as the leaves of ``tree``: flattening 300 of them anew for each step would cost a quarter of a millisecond.
    """
    params: Decoder = jax.tree.unflatten(tree, leaves)
    ragged = batch.ragged
    max_rows, context = state.tokens.shape
    token_slots = jnp.where(ragged.positions < 0, max_rows, batch.slots[ragged.rows])
    known = state.tokens.at[token_slots, ragged.positions].get(mode="fill", fill_value=0)
    ragged = dataclasses.replace(ragged, tokens=jnp.where(ragged.tokens == FROM_DEVICE, known, ragged.tokens))
    tokens = state.tokens.at[token_slots, ragged.positions].set(ragged.tokens, mode="drop")
    run = forward if mesh is None else partial(sharding.sharded_forward, mesh=mesh)
    hidden, cache = run(params, config, ragged, state.cache, context=context, dtype=jnp.dtype(dtype))
    history = tokens.at[batch.slots].get(mode="fill", fill_value=0)
    sampled = sample(logits(params, config, hidden[ragged.last_tokens]), batch.rows, history, ragged.kv_lengths)
    target = jnp.where(batch.samples, batch.slots, max_rows)
    tokens = tokens.at[target, ragged.kv_lengths].set(sampled.tokens, mode="drop")
    floats = jnp.concatenate([sampled.logprob[:, None], sampled.top_logprobs], axis=1)
    out = jnp.concatenate([sampled.tokens[:, None], sampled.top_ids, jax.lax.bitcast_convert_type(floats, jnp.int32)], axis=1)
    return EngineState(cache=cache, tokens=tokens), out


def read_row(row: np.ndarray, wanted: int) -> tuple[int, TokenLogprob]:
    """A row of `run_step`'s output as token id and log-probability with ``wanted`` alternatives."""
    token, ids = int(row[0]), row[1 : 1 + wanted]
    floats = row[1 + MAX_TOP_LOGPROBS :].view(np.float32)
    top = tuple(zip(ids.tolist(), floats[1 : 1 + wanted].tolist(), strict=True))
    return token, TokenLogprob(token, float(floats[0]), top)


def bucket(count: int) -> int:
    """The power of two that holds ``count``: steps come in few shapes."""
    return 1 << max(count - 1, 0).bit_length()


def buckets(engine: EngineConfig) -> list[int]:
    """Every size of step an engine may take, smallest first."""
    return [1 << i for i in range(bucket(engine.max_step_tokens).bit_length())]


def empty_batch(T: int, engine: EngineConfig, vocab_size: int) -> StepBatch:
    """Padding alone: T tokens, R = min(T, max_rows) rows."""
    R = min(T, engine.max_rows)
    ragged = RaggedBatch(
        tokens=_filled(T),
        positions=_filled(T, value=-1),
        query_starts=_filled(R + 1),
        kv_lengths=_filled(R),
        page_tables=_filled(R, -(-engine.max_context // engine.page_size)),
    )
    return StepBatch(
        ragged=ragged, slots=_filled(R, value=engine.max_rows), samples=_filled(R, dtype=np.bool_), rows=_empty_rows(R, vocab_size)
    )


def build_batch(plan: Plan, engine: EngineConfig, vocab_size: int) -> StepBatch:
    """A plan as arrays, padded to its bucket."""
    batch: Any = empty_batch(bucket(sum(span.count for span in plan)), engine, vocab_size)
    at = 0
    for r, span in enumerate(plan):
        _fill_ragged(batch, r, span, at)
        at += span.count
        if span.samples:
            _fill_row(batch.rows, r, span.sequence, engine.max_context)
    batch.ragged.query_starts[len(plan) :] = at
    return batch


def _fill_ragged(batch: Any, r: int, span: Span, at: int) -> None:
    sequence, end = span.sequence, span.start + span.count
    known = sequence.tokens[span.start : end]
    batch.ragged.tokens[at : at + span.count] = known + [FROM_DEVICE] * (span.count - len(known))
    batch.ragged.positions[at : at + span.count] = range(span.start, end) if span.count > 1 else span.start
    batch.ragged.query_starts[r], batch.ragged.kv_lengths[r] = at, end
    batch.ragged.page_tables[r, : len(sequence.pages)] = sequence.pages
    batch.slots[r], batch.samples[r] = sequence.slot, span.samples


def _filled(*shape: int, value: float = 0, dtype: type = np.int32) -> Any:
    """A fresh host array (a step that is still running may read the last one); Any, since structs speak of device arrays."""
    return np.full(shape, value, dtype)


def _empty_rows(R: int, vocab_size: int) -> SampleRows:
    """Greedy rows: they cost nothing."""
    return SampleRows(
        temperature=_filled(R, dtype=np.float32),
        top_k=_filled(R),
        top_p=_filled(R, value=1, dtype=np.float32),
        min_p=_filled(R, dtype=np.float32),
        repeat_penalty=_filled(R, value=1, dtype=np.float32),
        presence_penalty=_filled(R, dtype=np.float32),
        frequency_penalty=_filled(R, dtype=np.float32),
        window=_filled(R),
        seed=_filled(R, dtype=np.uint32),
        top_logprobs=_filled(R, value=-1),
        masked=_filled(R, dtype=np.bool_),
        allowed=_filled(R, -(-vocab_size // 32), dtype=np.uint32),
    )


def _fill_row(rows: Any, r: int, sequence: Sequence, max_context: int) -> None:
    params = sequence.params
    for field in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"):
        getattr(rows, field)[r] = getattr(params, field)
    rows.window[r] = max_context if params.repeat_last_n < 0 else params.repeat_last_n
    rows.seed[r] = sequence.seed & 0xFFFFFFFF
    rows.top_logprobs[r] = params.top_logprobs if params.logprobs else -1
    if sequence.constraint is not None:
        rows.masked[r] = True
        sequence.constraint.fill(rows.allowed[r])
