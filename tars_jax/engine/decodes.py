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
from tars_jax.sample_rows import SampleRows, unpack_rows
from tars_jax.sampling import Sampled, sample

MOST_STEPS = 8  # of a program

Carry = tuple[jax.Array, jax.Array, EngineState, jax.Array]  # steps taken, bool [R] of rows that have ended, state, output so far


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
    rows = unpack_rows(samples.numbers, samples.extras)
    strengths = jax.lax.bitcast_convert_type(parts["strengths"], jnp.float32)
    layers = fill_scales(params, strengths[ragged.rows])
    run = forward if mesh is None else partial(sharding.sharded_forward, mesh=mesh)
    max_rows, context = state.tokens.shape
    slots = jnp.where(ragged.positions >= 0, parts["slots"][ragged.rows], max_rows)

    def decode(i: jax.Array, state: EngineState) -> tuple[EngineState, Sampled]:
        now = _later(ragged, i)
        now = dataclasses.replace(now, tokens=state.tokens.at[slots, now.positions].get(mode="fill", fill_value=0))
        hidden, cache = run(layers, config, now, state.cache, context=context, dtype=jnp.dtype(dtype))
        scores = logits(fill_scales(params, strengths), config, hidden[: layout.rows])
        if mesh is not None:
            scores = jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
        sampled = sample(scores, dataclasses.replace(rows, length=rows.length + i), state.tokens, state.mu, plain=True)
        return dataclasses.replace(state, cache=cache), sampled

    def has_work(carry: Carry) -> jax.Array:
        i, ended, _, _ = carry
        return (i < steps) & ~ended.all()

    def step(carry: Carry) -> Carry:
        i, ended, state, out = carry
        state, sampled = decode(i, state)
        read = _last_tokens(state.tokens, rows, i)
        tokens = state.tokens.at[rows.slot, rows.length + i].set(sampled.tokens, mode="drop")
        ended |= (sampled.tokens[:, None] == ends).any(axis=1)
        return i + 1, ended, dataclasses.replace(state, tokens=tokens), out.at[i].set(pack(sampled, read))

    state = dataclasses.replace(state, tokens=_with_known(state.tokens, slots, ragged))
    is_unread = ragged.tokens[: layout.rows] == FROM_DEVICE  # one that the host knows has ended nothing: it may be a prompt's
    ended = (rows.slot >= max_rows) | is_unread & (_last_tokens(state.tokens, rows, 0)[:, None] == ends).any(axis=1)
    out = jnp.full((MOST_STEPS, layout.rows, output_width()), -1, jnp.int32)
    taken, _, state, out = jax.lax.while_loop(has_work, step, (jnp.int32(0), ended, state, out))
    # Where the next program, which was perhaps sent already, looks for the last token it finds that all have ended.
    missing = jnp.where(taken < steps, rows.slot, max_rows), rows.length + steps - 1
    return dataclasses.replace(state, tokens=state.tokens.at[missing].set(ends[:, 0], mode="drop")), out


def _with_known(table: jax.Array, slots: jax.Array, ragged: RaggedBatch) -> jax.Array:
    """The token table with a batch's tokens, as far as the host knows them."""
    there = table.at[slots, ragged.positions].get(mode="fill", fill_value=0)
    tokens = jnp.where(ragged.tokens == FROM_DEVICE, there, ragged.tokens)
    return table.at[slots, ragged.positions].set(tokens, mode="drop")


def _later(ragged: RaggedBatch, steps: jax.Array) -> RaggedBatch:
    """A batch of decodes so many steps later, but for its tokens."""
    positions = jnp.where(ragged.positions >= 0, ragged.positions + steps, -1)
    return dataclasses.replace(ragged, positions=positions, kv_lengths=jnp.where(ragged.kv_lengths > 0, ragged.kv_lengths + steps, 0))


def _last_tokens(tokens: jax.Array, rows: SampleRows, steps: jax.Array | int) -> jax.Array:
    """Of each row after so many steps, int32 [R]; 0 of padding."""
    return tokens.at[rows.slot, rows.length + steps - 1].get(mode="fill", fill_value=0)
