"""Models of a preset's shape with random weights: for benchmarks and notebooks, without a download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tars_jax.chat import CHATML, ChatTemplate
from tars_jax.kernels import pack_tiles
from tars_jax.loaders.loaded import Model
from tars_jax.loaders.params import WeightForm
from tars_jax.model import init
from tars_jax.presets import PREFIX, Preset
from tars_jax.tokenizer import Tokenizer
from tars_jax.tokenizer.vocabulary import BYTE_OF

END = "<|end_of_text|>"


def random_model(preset: Preset, *, form: WeightForm, dtype: str, seed: int = 0) -> Model:
    """A model that answers noise at its size's speed. Its tokenizer has a token for each byte and one that ends a text; further ids
    of the vocabulary stand for nothing. ``dtype``: that of activations; the matrices are of `matrix_dtype`."""
    finish: Callable[[jax.Array], Any] = _tiled if form == "tiled" else _same
    params = init(jax.random.key(seed), preset.config, jnp.dtype(matrix_dtype(form, dtype)), finish=finish)
    metadata = {
        "general.architecture": preset.config.architecture,
        "general.name": preset.title,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*sorted(BYTE_OF, key=BYTE_OF.__getitem__), END],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": len(BYTE_OF),
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    template = ChatTemplate(CHATML, bos_token="", eos_token=END)
    name = PREFIX + preset.name
    return Model(name, Path(name), preset.config, params, tokenizer, template, metadata, dtype)


def matrix_dtype(form: WeightForm, dtype: str) -> str:
    """The kernels take bfloat16 as published models have it, everything else computes on the type of activations."""
    return "bfloat16" if form == "tiled" else dtype


def _tiled(leaf: jax.Array) -> Any:
    return jax.tree.map(jax.device_put, pack_tiles(leaf)) if leaf.ndim == 2 else leaf.astype(jnp.float32)


def _same(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.ndim == 2 else leaf.astype(jnp.float32)
