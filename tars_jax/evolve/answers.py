"""Greedy answers of a population: for fitness that looks at a text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax.cache import RaggedBatch, init_cache
from tars_jax.config import ModelConfig
from tars_jax.evolve.batches import PAGE, layout, repeat, round_up
from tars_jax.evolve.programs import program
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder, forward, logits


def answers(
    params: Decoder, model: Model, prompts: Sequence[Sequence[int]], *, members: int, max_tokens: int, least: int = 0
) -> list[list[str]]:
    """What each of ``members`` members (`LowRank` leaves of that many factors, or plain ones for 1) writes after each prompt. As many
    prompts of fewer than ``least`` tokens in all are one program."""
    total, least = sum(map(len, prompts)), round_up(least)
    filler = [0] * (max(least, round_up(total + 1)) - total)  # a sequence of its own, whose answer nobody reads
    rows = layout([*prompts, filler], room=max_tokens, pages=round_up(-(-(least + max_tokens) // PAGE), 1) if least else 0)
    ends = jnp.asarray(sorted(model.tokenizer.eog_ids), jnp.int32)
    tokens = _decode(params, rows, ends, config=model.config, dtype=model.dtype, members=members, steps=max_tokens)
    found = np.asarray(tokens).reshape(max_tokens, members, -1)[:, :, :-1]
    return [[_text(model, column) for column in member.T] for member in found.swapaxes(0, 1)]


def _text(model: Model, tokens: np.ndarray) -> str:
    ids = tokens.tolist()
    end = next((i for i, token in enumerate(ids) if token in model.tokenizer.eog_ids), len(ids))
    return model.tokenizer.decode(ids[:end])


@program(("config", "dtype", "members", "steps"))
def _decode(params: Decoder, rows: RaggedBatch, ends: jax.Array, *, config: ModelConfig, dtype: str, members: int, steps: int) -> jax.Array:
    """Tokens [steps, sequences] decoded greedily; zeros once every sequence has ended."""
    batch = repeat(rows, members)
    count = batch.kv_lengths.shape[0]
    cache = init_cache(config, 1 + batch.page_tables.size, PAGE, jnp.dtype(dtype))
    run = partial(forward, params, config, context=config.context_length, dtype=jnp.dtype(dtype))
    states, cache = run(batch, cache)

    def choose(states: jax.Array) -> jax.Array:
        return jnp.argmax(logits(params, config, states), axis=1).astype(jnp.int32)

    first = choose(states[batch.last_tokens])
    out = jnp.zeros((steps, count), jnp.int32).at[0].set(first)
    others = jnp.arange(count, dtype=jnp.int32) % rows.kv_lengths.shape[0] == rows.kv_lengths.shape[0] - 1  # the fillers

    def ended(tokens: jax.Array) -> jax.Array:
        return jnp.isin(tokens, ends) | others

    def going(carry: Any) -> jax.Array:
        return (carry[0] < steps) & ~carry[3].all()

    def step(carry: Any) -> Any:
        at, tokens, cache, done, out = carry
        positions = batch.kv_lengths + at - 1
        one = RaggedBatch(tokens, positions, jnp.arange(count + 1, dtype=jnp.int32), positions + 1, batch.page_tables)
        states, cache = run(one, cache)
        tokens = choose(states)
        return at + 1, tokens, cache, done | ended(tokens), out.at[at].set(tokens)

    return lax.while_loop(going, step, (jnp.int32(1), first, cache, ended(first), out))[4]
