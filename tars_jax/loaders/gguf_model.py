"""A GGUF file's metadata and tensors as a model configuration and parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tars_jax.config import ModelConfig, RopeScaling
from tars_jax.errors import ModelFileError
from tars_jax.loaders.blocks import Blocks
from tars_jax.loaders.gguf import GGUFFile
from tars_jax.loaders.names import GGUF
from tars_jax.loaders.params import ReadTensor

# Architectures of the Llama family, and whether their rotary pairs are neighbours (2i, 2i + 1) in the file.
INTERLEAVED_ROPE = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}


def read_config(file: GGUFFile) -> ModelConfig:
    """Model configuration from GGUF metadata. Raises ModelFileError for other architectures or missing keys."""
    architecture = str(file.metadata.get("general.architecture", ""))
    if architecture not in INTERLEAVED_ROPE:
        supported = ", ".join(sorted(INTERLEAVED_ROPE))
        raise ModelFileError(f"{file.path}: architecture {architecture or 'unnamed'!r} is not supported; supported are {supported}")
    keys = _Keys(file.metadata, architecture, str(file.path))
    if keys.get("expert_count", 0):
        raise ModelFileError(f"{file.path}: mixture-of-experts models are not supported")
    heads, width = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = int(keys.get("attention.key_length", width // heads))
    rotary = int(keys.get("rope.dimension_count", head_dim))
    return ModelConfig(
        architecture=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else keys.integer("vocab_size"),
        hidden_size=width,
        num_layers=keys.integer("block_count"),
        num_heads=heads,
        num_kv_heads=int(keys.get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=keys.integer("feed_forward_length"),
        context_length=keys.integer("context_length"),
        norm_eps=float(keys.get("attention.layer_norm_rms_epsilon", 1e-5)),
        rope_theta=float(keys.get("rope.freq_base", 10_000.0)),
        rope_dim=0 if rotary == head_dim else rotary,
        rope_scaling=_rope_scaling(file, keys),
        gated_mlp="blk.0.ffn_gate.weight" in file.tensors,
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=int(keys.get("attention.sliding_window", 0)),
        no_rope_interval=4 if architecture == "smollm3" else 0,
    )


def tensor_reader(file: GGUFFile, config: ModelConfig) -> tuple[Mapping[str, str], Mapping[str, int], ReadTensor]:
    """The name table, the bytes of each tensor, and a function that reads one by its file name and canonical name."""

    def read(name: str, leaf: str) -> np.ndarray | Blocks:
        value = file.read(name)
        order = rotary_order(config, leaf, value.shape[0])
        if order is None:
            return value
        return value.rows(order) if isinstance(value, Blocks) else value[order]

    return GGUF, {name: info.nbytes for name, info in file.tensors.items()}, read


def rotary_order(config: ModelConfig, leaf: str, rows: int) -> np.ndarray | None:
    """Where the file's rows of a query or key projection have rotary pairs side by side: these rows in the order in which i pairs
    with i + rotary_dim / 2. None for parameters whose rows stay as they are."""
    if not INTERLEAVED_ROPE[config.architecture] or leaf.rsplit(".", 1)[-1] not in ("q", "k", "q_bias", "k_bias"):
        return None
    heads, rotary = rows // config.head_dim, config.rotary_dim
    head = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, config.head_dim)])
    return (np.arange(heads)[:, None] * config.head_dim + head).reshape(-1)


def _rope_scaling(file: GGUFFile, keys: "_Keys") -> RopeScaling:
    original = int(keys.get("rope.scaling.original_context_length", 0))
    attention = keys.get("rope.scaling.attn_factor", None)
    factors = {name: _floats(file, name) for name in _FACTOR_TENSORS if name in file.tensors}
    if "rope_freqs.weight" in factors:  # llama.cpp's form of llama3 scaling: the divisors themselves
        return RopeScaling("longrope", long_factors=factors["rope_freqs.weight"], attention_factor=1.0)
    if factors:
        long, short = factors["rope_factors_long.weight"], factors["rope_factors_short.weight"]
        factor = None if attention is None else float(attention)
        return RopeScaling("longrope", original_context=original, attention_factor=factor, long_factors=long, short_factors=short)
    kind, factor = str(keys.get("rope.scaling.type", "none")), float(keys.get("rope.scaling.factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise ModelFileError(f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear, yarn, longrope")
    if kind == "none" or factor in (0.0, 1.0):
        return RopeScaling()
    return RopeScaling("yarn" if kind == "yarn" else "linear", factor=factor, original_context=original)


def _floats(file: GGUFFile, name: str) -> tuple[float, ...]:
    value = file.read(name)
    dense = value.dequantize() if isinstance(value, Blocks) else value
    return tuple(dense.astype(float).reshape(-1).tolist())


_FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class _Keys:
    """An architecture's own metadata keys."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        self._metadata, self._architecture, self._source = metadata, architecture, source

    def get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if isinstance(value, np.ndarray):  # per-layer values: one shape per model is what this family has
            if value.size == 0 or (value != value[0]).any():
                raise ModelFileError(f"{self._source}: {self._architecture}.{key} differs between layers, which is not supported")
            return value[0].item()
        return value

    def integer(self, key: str) -> int:
        value = self.get(key, None)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelFileError(f"{self._source}: {self._architecture}.{key} is {value!r}, expected a positive number")
        return value
