"""A model small enough to compile in a moment: random weights, a byte a token. Its answers mean nothing but are always the same."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from tars_jax.config import ModelConfig
from tars_jax.loaders.loaded import Model
from tars_jax.model import init

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    context_length=256,
    tie_embeddings=True,
)


class TinyTokenizer:
    """Printable ASCII, a token each; no end of text."""

    eog_ids: frozenset[int] = frozenset()
    control_ids: frozenset[int] = frozenset()
    strips_space = False
    add_bos = False
    bos_id: int | None = None
    vocab_size = 95

    def token_id(self, text: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([32 + token_id % 95])

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        return [byte - 32 for byte in text.encode("ascii")]


def tiny_model(seed: int = 0, scale: float = 3.0, **changes: Any) -> Model:
    """``scale`` sharpens the choices, so that rounding does not make them."""
    config = dataclasses.replace(CONFIG, **changes)
    params = jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, init(jax.random.key(seed), config))
    anything: Any = SimpleNamespace()
    tokenizer: Any = TinyTokenizer()
    return Model(name="tiny", path=Path("tiny"), config=config, params=params, tokenizer=tokenizer, chat_template=anything, metadata={})
