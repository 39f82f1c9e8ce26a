"""The sampler as the tests use it: a row is a dictionary of what it wishes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.rows import is_plain, pack_biases, pack_row
from tars_jax.sample_rows import Extras, unpack_rows
from tars_jax.sampling import Sampled, sample

VOCAB = 300
TABLE = 16  # tokens of a history
Wish = dict[str, Any]  # fields of a row; and "allow", "breakers", "bias"
run = jax.jit(sample, static_argnames="plain")


def extras(wishes: tuple[Wish, ...]) -> Extras:
    def bits(name: str) -> np.ndarray:
        words = np.zeros((len(wishes), -(-VOCAB // 32)), np.uint32)
        for r, wish in enumerate(wishes):
            for token in wish.get(name, ()):
                words[r, token // 32] |= np.uint32(1 << (token % 32))
        return words

    biases = np.stack([pack_biases(tuple(wish.get("bias", {}).items())) for wish in wishes])
    return Extras(jnp.asarray(bits("allow")), jnp.asarray(bits("breakers")), jnp.asarray(biases))


def draw(logits: np.ndarray, *wishes: Wish, history: Any = None, lengths: Any = None, mu: Any = None, rows: int = 8) -> Sampled:
    """history: one list of tokens per row, of which the first ``lengths`` count. rows: at least so many are drawn, greedy ones that are
    left out of the result beside those wished for, so that tests share a program."""
    wished, wishes = len(wishes), (*wishes, *({},) * (rows - len(wishes)))
    count = len(wishes)
    given = np.zeros((wished, 0), np.int32) if history is None else np.asarray(history, np.int32)
    history = np.pad(given, ((0, count - wished), (0, TABLE - given.shape[1])))
    lengths = np.pad(np.zeros(wished, np.int32) if lengths is None else lengths, (0, count - wished))
    mu = np.pad(np.zeros(wished) if mu is None else mu, (0, count - wished)).astype(np.float32)
    logits = np.pad(logits, ((0, count - wished), (0, 0)))
    numbers = [
        pack_row(
            **{key: value for key, value in wish.items() if key not in ("allow", "breakers", "bias")},
            slot=r,
            length=int(lengths[r]),
            masked="allow" in wish,
            biased="bias" in wish,
        )
        for r, wish in enumerate(wishes)
    ]
    packed = unpack_rows(jnp.asarray(np.stack(numbers)), extras(wishes))
    arguments = jnp.asarray(logits, jnp.float32), packed, jnp.asarray(history), jnp.asarray(mu)
    drawn = run(*arguments)
    if all(map(is_plain, numbers)):  # then the smaller program does the same
        np.testing.assert_array_equal(run(*arguments, plain=True).tokens, drawn.tokens)
    return jax.tree.map(lambda x: x[:wished], jax.device_get(drawn))


def frequencies(logits: np.ndarray, wish: Wish, draws: int = 4000, **state: Any) -> np.ndarray:
    """How often each token is drawn from one row of logits, over many seeds."""
    wishes = [{**wish, "seed": seed} for seed in range(draws)]
    repeated = {name: np.repeat(np.asarray(value), draws, 0) for name, value in state.items()}
    tokens = draw(np.repeat(logits, draws, 0), *wishes, **repeated).tokens
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / draws


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
