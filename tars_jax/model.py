"""The decoder family of Llama: parameters as a pytree, the forward pass as functions of it.

Parameter shapes, logical axes and names stand in one place, `spec`; loading, initialisation and sharding walk that tree.
Sources: LLaMA arXiv 2302.13971, GQA arXiv 2305.13245, SwiGLU arXiv 2002.05202, Qwen3 query/key norms arXiv 2505.09388.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tars_jax import kernels, ops, struct
from tars_jax.cache import KVCache, RaggedBatch, write_slots
from tars_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What a parameter is: its shape and the logical axis of each dimension."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


@struct.dataclass
class Layer:
    """One block. Matrices are [outputs, inputs]; leaves are arrays, `QArray`s or `LowRank`s (specs in `spec`'s tree)."""

    attention_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    mlp_norm: Any
    up: Any
    down: Any
    gate: Any = None
    q_bias: Any = None
    k_bias: Any = None
    v_bias: Any = None
    o_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None
    gate_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None


@struct.dataclass
class Decoder:
    """All parameters. ``lm_head`` is None when the embedding is tied to it."""

    embed: Any
    layers: tuple[Layer, ...]
    norm: Any
    lm_head: Any = None


def spec(config: ModelConfig) -> Decoder:
    """The parameter tree with an `ArraySpec` at every leaf."""
    embedding = ArraySpec((config.vocab_size, config.hidden_size), ("vocab", "embed"))
    return Decoder(
        embed=embedding,
        layers=tuple(_layer_spec(config) for _ in range(config.num_layers)),
        norm=ArraySpec((config.hidden_size,), ("embed",)),
        lm_head=None if config.tie_embeddings else embedding,
    )


def _layer_spec(config: ModelConfig) -> Layer:
    D, F, hd = config.hidden_size, config.intermediate_size, config.head_dim
    Q, KV = config.num_heads * hd, config.num_kv_heads * hd

    def vector(size: int, axis: str, wanted: bool = True) -> ArraySpec | None:
        return ArraySpec((size,), (axis,)) if wanted else None

    up = ArraySpec((F, D), ("mlp", "embed"))
    return Layer(
        attention_norm=vector(D, "embed"),
        q=ArraySpec((Q, D), ("heads", "embed")),
        k=ArraySpec((KV, D), ("kv_heads", "embed")),
        v=ArraySpec((KV, D), ("kv_heads", "embed")),
        o=ArraySpec((D, Q), ("embed", "heads")),
        mlp_norm=vector(D, "embed"),
        up=up,
        down=ArraySpec((D, F), ("embed", "mlp")),
        gate=up if config.gated_mlp else None,
        q_bias=vector(Q, "heads", config.qkv_bias),
        k_bias=vector(KV, "kv_heads", config.qkv_bias),
        v_bias=vector(KV, "kv_heads", config.qkv_bias),
        o_bias=vector(D, "embed", config.out_bias),
        up_bias=vector(F, "mlp", config.mlp_bias),
        down_bias=vector(D, "embed", config.mlp_bias),
        gate_bias=vector(F, "mlp", config.mlp_bias and config.gated_mlp),
        q_norm=vector(hd, "head_dim", config.qk_norm),
        k_norm=vector(hd, "head_dim", config.qk_norm),
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """Canonical dotted name of a leaf of the parameter tree, e.g. ``layers.3.q_bias``."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)


def init(
    key: jax.Array, config: ModelConfig, dtype: jnp.dtype = jnp.float32, *, finish: Callable[[jax.Array], Any] = lambda leaf: leaf
) -> Decoder:
    """Random parameters: norms one, biases zero, matrices normal with deviation 1 / sqrt(inputs).

    ``finish`` makes of each array what is kept of it, one after the other, so that a large model is never there twice.
    """

    def draw(path: tuple[Any, ...], leaf: ArraySpec) -> Any:
        name = leaf_name(path)
        if len(leaf.shape) == 1:
            return finish(jnp.full(leaf.shape, 0.0 if name.endswith("bias") else 1.0, dtype))
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return finish(jax.random.normal(leaf_key, leaf.shape, dtype) * jnp.asarray(leaf.shape[1] ** -0.5, dtype))

    return jax.tree_util.tree_map_with_path(draw, spec(config))


def forward(
    params: Decoder, config: ModelConfig, batch: RaggedBatch, cache: KVCache, *, context: int, dtype: jnp.dtype, axis: str | None = None
) -> tuple[jax.Array, KVCache]:
    """Run a batch: states after the last block [T, D] in ``dtype``, and the cache with the batch written to it.

    ``context`` is the longest sequence to be served (some rotary scalings depend on it). ``axis``: inside a `shard_map`, the mesh
    axis over which heads and feed-forward are split; ``config`` then describes one device's part.
    """
    x = ops.take(params.embed, batch.tokens, dtype)
    pages = cache.k.shape[0] // config.num_layers
    return run_blocks(params.layers, config, x, batch, cache, pages=pages, context=context, axis=axis)


def run_blocks(
    layers: Sequence[Layer],
    config: ModelConfig,
    x: jax.Array,
    batch: RaggedBatch,
    cache: KVCache,
    *,
    pages: int,
    context: int,
    first: int = 0,
    axis: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Neighbouring blocks, the model's ``first`` and those after it, on the states [T, D] that enter them. Otherwise as `forward`.

    ``pages``: of the cache, for each layer. With 0 the layers use the same pages, one after the other, and a cache of one
    layer is enough to run sequences that end with this batch.
    """
    rotation = ops.rope_table(config, batch.positions, context)
    slots = write_slots(batch, cache.page_size)
    kv = cache.k, cache.v
    for fused, run in itertools.groupby(enumerate(layers, first), lambda item: axis is None and _fuses(item[1])):
        if fused:
            x, kv = _blocks(list(run), config, x, rotation, slots, batch, kv, pages)
        else:
            for i, layer in run:
                turn = rotation if _rotates(config, i) else None
                x, kv = _block(layer, config, x, turn, slots, batch, kv, jnp.int32(i * pages), axis)
    return x, KVCache(*kv)


def _fuses(layer: Layer) -> bool:
    """Whether the kernels run this layer in one call with its neighbours."""
    weights = layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down
    return all(ops.uses_kernels(w) for w in weights if w is not None)


def _blocks(
    layers: Sequence[tuple[int, Layer]],
    config: ModelConfig,
    x: jax.Array,
    rotation: ops.Rotation,
    slots: ops.Slots,
    batch: RaggedBatch,
    kv: ops.Pages,
    pages: int,
) -> tuple[jax.Array, ops.Pages]:
    """What `_block` does to one layer, for neighbouring ones and their numbers in the model: one call of the kernels."""
    x, k, v = kernels.blocks(
        [
            kernels.Block(
                (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm),
                (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down),
                (layer.q_bias, layer.k_bias, layer.v_bias, layer.o_bias, layer.gate_bias, layer.up_bias, layer.down_bias),
            )
            for _, layer in layers
        ],
        x,
        rotation,
        slots,
        batch,
        *kv,
        first_pages=[i * pages for i, _ in layers],
        rotates=[_rotates(config, i) for i, _ in layers],
        heads=config.num_heads,
        head_dim=config.head_dim,
        activation=config.activation,
        eps=config.norm_eps,
        scale=config.head_dim**-0.5,
        window=config.sliding_window,
    )
    return x, (k, v)


# Jitted although it is only called under jit: layers of one structure are then traced and lowered once.
@partial(jax.jit, static_argnames=("config", "axis"))
def _block(
    layer: Layer,
    config: ModelConfig,
    x: jax.Array,
    rotation: ops.Rotation | None,
    slots: ops.Slots,
    batch: RaggedBatch,
    pages: ops.Pages,
    first_page: jax.Array,
    axis: str | None,
) -> tuple[jax.Array, ops.Pages]:
    slots = slots[0] + first_page, slots[1]
    batch = dataclasses.replace(batch, page_tables=batch.page_tables + first_page)
    eps, biases = config.norm_eps, (layer.q_bias, layer.k_bias, layer.v_bias)
    q, k, v = ops.norm_linear(x, layer.attention_norm, eps, (layer.q, layer.k, layer.v), biases, None, batch.prompts_at)
    heads, pages = ops.attend(
        q.reshape(-1, config.num_heads, config.head_dim),
        k.reshape(-1, config.num_kv_heads, config.head_dim),
        v.reshape(-1, config.num_kv_heads, config.head_dim),
        pages,
        batch,
        slots,
        rotation,
        (layer.q_norm, layer.k_norm) if config.qk_norm else None,
        config,
        with_kernels=ops.uses_kernels(layer.q),
    )
    weights = (layer.o, layer.gate, layer.up, layer.down)
    rest = (layer.o_bias, layer.gate_bias, layer.up_bias, layer.down_bias)
    return ops.output_mlp(heads.reshape(q.shape), x, layer.mlp_norm, weights, rest, config, axis, batch.prompts_at), pages


def logits(params: Decoder, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Last norm and output head: `forward`'s states [N, D] -> float32 logits [N, V]."""
    head = params.embed if params.lm_head is None else params.lm_head
    return ops.norm_linear(hidden, params.norm, config.norm_eps, (head,), (None,))[0].astype(jnp.float32)


def _rotates(config: ModelConfig, layer: int) -> bool:
    return not config.no_rope_interval or (layer + 1) % config.no_rope_interval != 0
