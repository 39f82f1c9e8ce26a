"""Several steps of rows that all decode, in one program: the host comes in once for all of them.

A step of a small model takes a few milliseconds, of which the host's part, beside the device on the same processor, would be a tenth.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax import sharding
from tars_jax.cache import RaggedBatch
from tars_jax.config import ModelConfig
from tars_jax.engine.adapters import fill_scales
from tars_jax.engine.sampler import SampleBatch, output_width, pack
from tars_jax.engine.speculation import FROM_DEVICE
from tars_jax.engine.step import EngineState, Layout
from tars_jax.engine.structure import Structure
from tars_jax.model import forward, logits
from tars_jax.sample_rows import unpack_rows
from tars_jax.sampling import sample

MOST_STEPS = 8  # of a program


@partial(jax.jit, static_argnames=("layout", "structure", "config", "dtype", "mesh"), donate_argnames="state")
def run_decodes(
    arrays: list[jax.Array],
    state: EngineState,
    numbers: jax.Array,
    samples: SampleBatch,
    ends: jax.Array,
    steps: jax.Array,
    *,
    layout: Layout,
    structure: Structure,
    config: ModelConfig,
    dtype: str,
    mesh: Mesh | None = None,
) -> tuple[EngineState, jax.Array]:
    """``(state, out)``: out is int32 [MOST_STEPS, R, ...], for each step what `read_row` reads; the token is -1 in steps that did not
    take place.

    numbers: of the first step, in which token r is row r's last one. samples: of these rows, all plain. ends: int32 [R, MOST_ENDS], tokens
    that end a row, or -1: when all have ended nothing more is run. steps: int32, at most MOST_STEPS.
    """
    params, _ = structure.fill(arrays)
    parts = layout.split(numbers)
    ragged = RaggedBatch(*(parts[field.name] for field in dataclasses.fields(RaggedBatch)))
    strengths = jax.lax.bitcast_convert_type(parts["strengths"], jnp.float32)
    params = fill_scales(params, strengths[ragged.rows])
    rows = unpack_rows(samples.numbers, samples.extras)
    run = forward if mesh is None else partial(sharding.sharded_forward, mesh=mesh)
    max_rows, context = state.tokens.shape
    is_token, is_row = ragged.positions >= 0, rows.slot < max_rows
    slots = jnp.where(is_token, parts["slots"][ragged.rows], max_rows)

    known = state.tokens.at[slots, ragged.positions].get(mode="fill", fill_value=0)
    first = jnp.where(ragged.tokens == FROM_DEVICE, known, ragged.tokens)
    state = dataclasses.replace(state, tokens=state.tokens.at[slots, ragged.positions].set(first, mode="drop"))

    def has_work(carry: tuple[jax.Array, jax.Array, EngineState, jax.Array]) -> jax.Array:
        i, ended, _, _ = carry
        return (i < steps) & ~ended.all()

    def step(carry: tuple[jax.Array, jax.Array, EngineState, jax.Array]) -> tuple[jax.Array, jax.Array, EngineState, jax.Array]:
        i, ended, state, out = carry
        positions = jnp.where(is_token, ragged.positions + i, -1)
        last = state.tokens.at[slots, positions].get(mode="fill", fill_value=0)
        lengths = jnp.where(ragged.kv_lengths > 0, ragged.kv_lengths + i, 0)
        now = dataclasses.replace(ragged, tokens=last, positions=positions, kv_lengths=lengths)
        hidden, cache = run(params, config, now, state.cache, context=context, dtype=jnp.dtype(dtype))
        scores = logits(fill_scales(params, strengths), config, hidden[: layout.rows])
        if mesh is not None:
            scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
        length = rows.length + i
        sampled = sample(scores, dataclasses.replace(rows, length=length), state.tokens, state.mu, plain=True)
        read = state.tokens.at[rows.slot, length - 1].get(mode="fill", fill_value=0)
        tokens = state.tokens.at[rows.slot, length].set(sampled.tokens, mode="drop")
        out = out.at[i].set(pack(sampled, read))
        ended |= (sampled.tokens[:, None] == ends).any(axis=1)
        return i + 1, ended, dataclasses.replace(state, cache=cache, tokens=tokens), out

    out = jnp.full((MOST_STEPS, layout.rows, output_width()), -1, jnp.int32)
    last = state.tokens.at[rows.slot, rows.length - 1].get(mode="fill", fill_value=0)
    is_unread = ragged.tokens[: layout.rows] == FROM_DEVICE  # one that the host knows has ended nothing: it may be a prompt's
    ended = ~is_row | is_unread & (last[:, None] == ends).any(axis=1)
    taken, _, state, out = jax.lax.while_loop(has_work, step, (jnp.int32(0), ended, state, out))
    # Where the next program, which was perhaps sent already, looks for the last token it finds that all have ended.
    slots = jnp.where(taken < steps, rows.slot, max_rows)
    tokens = state.tokens.at[slots, rows.length + steps - 1].set(ends[:, 0], mode="drop")
    return dataclasses.replace(state, tokens=tokens), out
