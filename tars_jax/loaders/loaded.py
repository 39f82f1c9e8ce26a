"""A model ready to run: configuration, parameters, tokenizer and chat template."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.cache import KVCache, RaggedBatch, init_cache
from tars_jax.chat import ChatTemplate
from tars_jax.config import GrammarKind, ModelConfig
from tars_jax.errors import ContextOverflow, InvalidRequest
from tars_jax.grammar import Constraint, GrammarCompiler
from tars_jax.kernels import Tiled, untile
from tars_jax.model import Decoder, forward, logits
from tars_jax.tokenizer import Tokenizer

SCORE_TOKENS = 512  # tokens scored at once by `Model.logits`


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """An opened model. ``dtype`` names the type activations are computed in."""

    name: str
    path: Path
    config: ModelConfig
    params: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    metadata: Mapping[str, Any]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(self.params)}  # tiled weights share one
        return sum(leaf.nbytes for leaf in arrays.values())

    @cached_property
    def digest(self) -> str:
        """What tells this model's weights from all others': the blob's name in a store, else the file's place, size and time."""
        if self.path.name.startswith("sha256-"):
            return self.path.name
        try:
            stat = self.path.stat()
        except OSError:
            return f"{self.name}-{id(self)}"
        return f"{self.path.resolve()}-{stat.st_size}-{stat.st_mtime_ns}"

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The conversation as the model's own template writes it, ready for the answer."""
        return self.chat_template.render(messages, tools=tools, **variables)

    def constraint(self, grammar: str, kind: GrammarKind = "json") -> Constraint:
        """A fresh matcher for a grammar. Raises InvalidRequest for what cannot be enforced."""
        return self._grammars.compile(grammar, kind)

    def logits(self, ids: Sequence[int], *, exact: bool = True) -> np.ndarray:
        """Logits after every token, float32 [T, V]. Raises InvalidRequest or ContextOverflow.

        ``exact`` computes with unrounded activations, whatever the layout of the weights; otherwise as the engine reads a prompt: its
        CPU kernels round activations to 8 bits, or with AMX activations and weights to bfloat16.
        """
        count = len(ids)
        if not count:
            raise InvalidRequest("logits need at least one token")
        if count > self.config.context_length:
            raise ContextOverflow(f"{count} tokens do not fit the model's context of {self.config.context_length}")
        page = 16
        pages = -(-count // page)
        cache = init_cache(self.config, 1 + pages, page, jnp.dtype(self.dtype))
        table = np.arange(1, pages + 1, dtype=np.int32)[None]
        parts = []
        for start in range(0, count, SCORE_TOKENS):
            chunk = np.asarray(ids[start : start + SCORE_TOKENS], np.int32)
            scores, cache = _score(
                self.params, cache, _single_row(chunk, start, table), config=self.config, dtype=self.dtype, context=count, exact=exact
            )
            parts.append(np.asarray(scores)[: len(chunk)])
        return np.concatenate(parts)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.config.vocab_size)


def _single_row(tokens: np.ndarray, start: int, table: np.ndarray) -> RaggedBatch:
    """A batch of one sequence's tokens from position ``start``, padded to a power of two."""
    count = len(tokens)
    padded = 1 << (count - 1).bit_length()
    positions = np.full(padded, -1, np.int32)
    positions[:count] = np.arange(start, start + count)
    return RaggedBatch(
        tokens=jnp.asarray(np.pad(tokens, (0, padded - count))),
        positions=jnp.asarray(positions),
        query_starts=jnp.array([0, count], jnp.int32),
        kv_lengths=jnp.array([start + count], jnp.int32),
        page_tables=jnp.asarray(table),
        prompts_at=jnp.zeros(1, jnp.int32),
    )


@partial(jax.jit, static_argnames=("config", "dtype", "context", "exact"), donate_argnames="cache")
def _score(
    params: Decoder, cache: KVCache, batch: RaggedBatch, *, config: ModelConfig, dtype: str, context: int, exact: bool
) -> tuple[jax.Array, KVCache]:
    if exact:
        params = jax.tree.map(_plain, params, is_leaf=lambda leaf: isinstance(leaf, Tiled))
    hidden, cache = forward(params, config, batch, cache, context=context, dtype=jnp.dtype(dtype))
    return logits(params, config, hidden), cache


def _plain(leaf: Any) -> Any:
    return untile(leaf) if isinstance(leaf, Tiled) else leaf
