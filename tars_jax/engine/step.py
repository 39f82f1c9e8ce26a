"""One step on the device: run the planned tokens. The logits are the second program's (`sampler`), for there may be few.

The device keeps each row's token history, so a decode's input token never visits the host between two steps.
"""

import dataclasses
import math
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax import kernels, sharding, struct
from tars_jax.cache import KVCache, RaggedBatch, init_cache
from tars_jax.compile_cache import Recipe
from tars_jax.config import EngineConfig, ModelConfig
from tars_jax.engine.adapters import fill_scales
from tars_jax.engine.sampler import SampleBatch
from tars_jax.engine.scheduler import Span
from tars_jax.engine.speculation import DRAFT_TOKENS, FROM_DEVICE
from tars_jax.engine.structure import Structure
from tars_jax.model import forward, logits
from tars_jax.sample_rows import unpack_rows
from tars_jax.sampling import sample


@struct.dataclass
class EngineState:
    """What lives on the device between steps. tokens: int32 [max_rows, max_context], each slot's token history; mu: float32
    [max_rows], where mirostat stands in each; draft: the draft model's cache, in pages of the same numbers."""

    cache: KVCache
    tokens: jax.Array
    mu: jax.Array
    draft: KVCache | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What stands where in the input of a step of T tokens and R rows, at most R of whose tokens are followed by a sampled one. It is
    one array of int32, since each array handed to a program costs the host."""

    tokens: int  # T
    rows: int  # R
    pages: int  # P, of a row's table
    ranks: int = 0  # of the adapters that requests choose among; 0: there are none

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        T, R = self.tokens, self.rows
        return {
            "tokens": (T,),  # FROM_DEVICE: what stands in the token table
            "positions": (T,),  # -1 for padding
            "query_starts": (R + 1,),
            "kv_lengths": (R,),
            "page_tables": (R, self.pages),
            "prompts_at": (1,),
            "slots": (R,),  # of each row in the token table; max_rows for padding
            "sample_at": (R,),  # tokens whose successor is sampled; T for padding
            "strengths": (R, self.ranks),  # of each row's adapters, float32 bits
        }

    def split(self, numbers: Any) -> dict[str, Any]:
        """The parts of the numbers: views of a numpy array, slices of a traced one."""
        parts, at = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            parts[name] = numbers[at : at + size].reshape(shape)
            at += size
        return parts

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def init_state(config: ModelConfig, engine: EngineConfig, draft: ModelConfig | None = None, mesh: Mesh | None = None) -> EngineState:
    """Empty caches and token table for a resolved engine configuration."""
    num_pages = 1 + -(-engine.cache_tokens // engine.page_size)
    has_kernels = jax.default_backend() == "cpu" and kernels.available()
    allocate = _empty if has_kernels and mesh is None else jnp.zeros
    if mesh is not None:
        allocate = partial(jnp.zeros, device=NamedSharding(mesh, sharding.CACHE))
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    caches = [init_cache(c, num_pages, engine.page_size, jnp.dtype(engine.cache_dtype), allocate) for c in (config, draft) if c]
    tokens = jax.device_put(np.zeros((engine.max_rows, engine.max_context), np.int32), whole)  # jnp.zeros would be compiled first
    mu = jax.device_put(np.zeros(engine.max_rows, np.float32), whole)
    return EngineState(cache=caches[0], tokens=tokens, mu=mu, draft=caches[1] if draft else None)


@partial(jax.jit, static_argnames=("layout", "structure", "config", "draft", "dtype", "mesh"), donate_argnames="state")
def run_step(
    arrays: list[jax.Array],
    state: EngineState,
    numbers: jax.Array,
    *,
    layout: Layout,
    structure: Structure,
    config: ModelConfig,
    draft: ModelConfig | None,
    dtype: str,
    mesh: Mesh | None = None,
) -> tuple[EngineState, jax.Array, jax.Array]:
    """``(state, last, hidden)``: hidden is [T, H], the last layer's states; last is [max_rows, H], those of the tokens at ``sample_at``
    in their order, then zeros.

    arrays: of the parameters, and those of the draft model, flattened.
    """
    params, draft_params = structure.fill(arrays)
    parts = layout.split(numbers)
    ragged = RaggedBatch(*(parts[field.name] for field in dataclasses.fields(RaggedBatch)))
    max_rows, context = state.tokens.shape
    token_slots = jnp.where(ragged.positions < 0, max_rows, parts["slots"][ragged.rows])
    known = state.tokens.at[token_slots, ragged.positions].get(mode="fill", fill_value=0)
    ragged = dataclasses.replace(ragged, tokens=jnp.where(ragged.tokens == FROM_DEVICE, known, ragged.tokens))
    tokens = state.tokens.at[token_slots, ragged.positions].set(ragged.tokens, mode="drop")
    run = forward if mesh is None else partial(sharding.sharded_forward, mesh=mesh)
    strengths = jax.lax.bitcast_convert_type(parts["strengths"], jnp.float32)[ragged.rows]  # [T, ranks]
    hidden, cache = run(fill_scales(params, strengths), config, ragged, state.cache, context=context, dtype=jnp.dtype(dtype))
    draft_cache = state.draft
    if draft is not None and state.draft is not None:  # what the model reads, its draft reads too
        _, draft_cache = forward(draft_params, draft, ragged, state.draft, context=context, dtype=jnp.dtype(dtype))
    last = hidden.at[parts["sample_at"]].get(mode="fill", fill_value=0)
    last = jnp.pad(last, ((0, max_rows - len(last)), (0, 0)))
    if mesh is not None:
        last = jax.lax.with_sharding_constraint(last, NamedSharding(mesh, PartitionSpec()))
    return EngineState(cache=cache, tokens=tokens, mu=state.mu, draft=draft_cache), last, hidden


@partial(jax.jit, static_argnames=("layout", "structure", "config", "draft", "dtype"), donate_argnames="state")
def run_draft(
    arrays: list[jax.Array],
    state: EngineState,
    numbers: jax.Array,
    samples: SampleBatch,
    *,
    layout: Layout,
    structure: Structure,
    config: ModelConfig,
    draft: ModelConfig,
    dtype: str,
) -> EngineState:
    """Let the draft model continue R rows of one token each, up to their ``kv_lengths``; what it says goes to the token table, where
    the next step finds it. It samples with the noise that the model's own tokens will get, so that the two often agree."""
    _, params = structure.fill(arrays)
    parts = layout.split(numbers)
    ragged = RaggedBatch(*(parts[field.name] for field in dataclasses.fields(RaggedBatch)))
    max_rows, context = state.tokens.shape
    rows = unpack_rows(samples.numbers, samples.extras)

    def body(i: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        tokens, cache = carry
        active = (ragged.positions >= 0) & (ragged.positions + i + 1 < ragged.kv_lengths)
        positions, slots = jnp.where(active, ragged.positions + i, -1), jnp.where(active, parts["slots"], max_rows)
        last = tokens.at[slots, positions].get(mode="fill", fill_value=0)
        now = dataclasses.replace(
            ragged, tokens=last, positions=positions, kv_lengths=jnp.where(active, positions + 1, jnp.minimum(ragged.kv_lengths, 1))
        )
        hidden, cache = forward(params, draft, now, cache, context=context, dtype=jnp.dtype(dtype))
        scores = logits(params, draft, hidden)
        sampled = sample(scores, dataclasses.replace(rows, slot=slots, length=positions + 1), tokens, state.mu)
        return tokens.at[slots, positions + 1].set(sampled.tokens, mode="drop"), cache

    tokens, cache = jax.lax.fori_loop(0, DRAFT_TOKENS, body, (state.tokens, state.draft))
    return dataclasses.replace(state, tokens=tokens, draft=cache)


def _empty(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Memory that is taken up as it is written."""
    make = jax.jit(kernels.empty, static_argnames=("shape", "dtype"))
    array: jax.Array = Recipe(make, (), {"shape": shape, "dtype": dtype}, 0).make()()
    return array


@partial(jax.jit, donate_argnames="tokens")
def write_history(tokens: jax.Array, slot: jax.Array, history: jax.Array) -> jax.Array:
    """The token table with a slot's row, int32 [max_context]: of a sequence whose first tokens no step has read, as they were cached."""
    return tokens.at[slot].set(history)


def bucket_of(count: int) -> int:
    """The power of two that holds ``count``: steps come in few shapes."""
    return 1 << max(count - 1, 0).bit_length()


def buckets(engine: EngineConfig) -> list[int]:
    """Every size of step an engine may take, smallest first."""
    return [1 << i for i in range(bucket_of(engine.max_step_tokens).bit_length())]


class Batches:
    """Makes the steps' inputs for one engine."""

    def __init__(self, engine: EngineConfig, ranks: int = 0) -> None:
        self._engine, self._ranks = engine, ranks
        self._empty: dict[int, np.ndarray] = {}

    def layout(self, bucket: int) -> Layout:
        """Of a step of ``bucket`` tokens."""
        engine = self._engine
        return Layout(bucket, min(bucket, engine.max_rows), -(-engine.max_context // engine.page_size), self._ranks)

    def empty(self, bucket: int) -> np.ndarray:
        """Padding alone."""
        if bucket not in self._empty:
            layout = self.layout(bucket)
            numbers = np.zeros(layout.size, np.int32)
            parts = layout.split(numbers)
            parts["positions"][:], parts["slots"][:], parts["sample_at"][:] = -1, self._engine.max_rows, bucket
            self._empty[bucket] = numbers
        return self._empty[bucket]

    def build(self, plan: SequenceOf[Span]) -> tuple[int, np.ndarray]:
        """A plan's bucket and numbers. A fresh array every time: a step that is still running may read the last one."""
        size = bucket_of(sum(span.tokens for span in plan))
        numbers = self.empty(size).copy()
        parts = self.layout(size).split(numbers)
        at = sample = 0
        for r, span in enumerate(plan):
            _fill(parts, r, span, at)
            at += span.tokens
            if span.samples:
                count = 1 + len(span.guesses)
                parts["sample_at"][sample : sample + count] = range(at - count, at)
                sample += count
        parts["query_starts"][len(plan) :] = at
        parts["prompts_at"][:] = sum(span.tokens for span in plan if not span.reads_prompt)
        return size, numbers

    def build_drafts(self, plan: SequenceOf[Span]) -> tuple[int, np.ndarray]:
        """Bucket and numbers of `run_draft` for spans that decode: the token of each row, and where its guesses end."""
        size, numbers = self.build([dataclasses.replace(span, guesses=()) for span in plan])
        ends = self.layout(size).split(numbers)["kv_lengths"]
        ends[: len(plan)] += [len(span.guesses) for span in plan]
        return size, numbers


def _fill(parts: dict[str, Any], r: int, span: Span, at: int) -> None:
    sequence, end = span.sequence, span.start + span.count
    known = sequence.tokens[span.start : end]
    parts["tokens"][at : at + span.tokens] = [*known, *[FROM_DEVICE] * (span.count - len(known)), *span.guesses]
    parts["positions"][at : at + span.tokens] = range(span.start, span.start + span.tokens) if span.tokens > 1 else span.start
    parts["query_starts"][r], parts["kv_lengths"][r], parts["slots"][r] = at, span.start + span.tokens, sequence.slot
    parts["page_tables"][r, : len(sequence.pages)] = sequence.pages
    for share in sequence.adapters:
        parts["strengths"].view(np.float32)[r, share.start : share.stop] += share.strength
