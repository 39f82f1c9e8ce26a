"""The operations a transformer is made of. Arrays carry tokens first: ``[T, ...]``; statistics and scores are float32.

What a kernel does in one call is one function here, with the plain operations that define it. The leaf type of the weights
decides: `kernels.Tiled` weights go to the kernels, everything else through XLA.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from tars_jax import kernels
from tars_jax.attention import ragged_attention
from tars_jax.cache import RaggedBatch, write
from tars_jax.config import Activation, ModelConfig, RopeScaling
from tars_jax.quant import LowRank, Observed, QArray, dequantize, innermost

Weight = Any  # an array [O, K], a QArray, a Tiled, or a LowRank on one of them
Rotation = tuple[jax.Array, jax.Array]  # cos and sin of `rope_table`
Slots = tuple[jax.Array, jax.Array]  # of `cache.write_slots`
Pages = tuple[jax.Array, jax.Array]  # keys and values of a `cache.KVCache`


def uses_kernels(w: Weight) -> bool:
    """Whether a weight, or what a low-rank update is based on, is laid out for the kernels."""
    return isinstance(innermost(w), kernels.Tiled)


def matmul(x: jax.Array, w: Weight, prompts_at: jax.Array | None = None) -> jax.Array:
    """``x @ w.T``: [T, K] times a weight [O, K] -> [T, O], in x's dtype with float32 accumulation."""
    if uses_kernels(w):
        return kernels.norm_linear(x, None, 0.0, [w], prompts_at=prompts_at)[0]
    if isinstance(w, LowRank):
        return matmul(x, w.base, prompts_at) + _update(x, w)
    if isinstance(w, Observed):
        io_callback(w.record, None, w.index, jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0))
        return matmul(x, w.base)
    dense = dequantize(w, x.dtype) if isinstance(w, QArray) else w.astype(x.dtype)
    return lax.dot_general(x, dense, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


def _update(x: jax.Array, w: LowRank) -> jax.Array:
    """``scale * (x @ b.T) @ a``: what a low-rank update, or each of N on its run of rows, adds to a product: [T, K] -> [T, O]."""
    a, b, scale = w.a.astype(x.dtype), w.b.astype(x.dtype), w.scale.astype(x.dtype)
    if a.ndim == 2:
        return jnp.einsum("tr,ro->to", jnp.einsum("tk,rk->tr", x, b) * scale, a)
    runs = x.reshape(a.shape[0], -1, x.shape[1])
    inner = jnp.einsum("ntk,rk->ntr" if b.ndim == 2 else "ntk,nrk->ntr", runs, b) * scale
    return jnp.einsum("ntr,nro->nto", inner, a).reshape(x.shape[0], -1)


def take(w: Weight, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a weight: [O, K] at ids [T] -> [T, K]."""
    if isinstance(w, LowRank):
        return take(w.base, ids, dtype) + ((w.a[:, ids].T * w.scale) @ w.b).astype(dtype)
    if isinstance(w, kernels.Tiled):
        return kernels.take_rows(w, ids, dtype)
    if isinstance(w, QArray):
        return dequantize(jax.tree.map(lambda leaf: leaf[ids], w), dtype)
    return w[ids].astype(dtype)


def norm_linear(
    x: jax.Array,
    norm: jax.Array | None,
    eps: float,
    weights: Sequence[Weight],
    biases: Sequence[jax.Array | None],
    activation: Activation | None = None,
    prompts_at: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``activate(rms_norm(x) @ w.T + bias)`` for each of several weights. Without ``norm`` x is used as it is.

    ``prompts_at`` is the batch's, here and below."""
    if all(uses_kernels(w) for w in weights):
        return kernels.norm_linear(x, norm, eps, weights, biases, activation=activation, prompts_at=prompts_at)
    normed = x if norm is None else rms_norm(x, norm, eps)
    results = [_biased(matmul(normed, w, prompts_at), bias) for w, bias in zip(weights, biases, strict=True)]
    return tuple(y if activation is None else activate(y, activation) for y in results)


def gated(
    x: jax.Array,
    norm: jax.Array | None,
    eps: float,
    gate: Weight,
    up: Weight,
    biases: Sequence[jax.Array | None],
    activation: Activation,
    prompts_at: jax.Array | None = None,
) -> jax.Array:
    """``activate(n @ gate.T + bias) * (n @ up.T + bias)`` of the normed input n (SwiGLU and its kin)."""
    if uses_kernels(gate) and uses_kernels(up):
        return kernels.gated(x, norm, eps, gate, up, activation, biases[0], biases[1], prompts_at)
    g, u = norm_linear(x, norm, eps, [gate, up], biases, None, prompts_at)
    return activate(g, activation) * u


def linear_add(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None,
    residual: jax.Array,
    axis: str | None = None,
    prompts_at: jax.Array | None = None,
) -> jax.Array:
    """``residual + x @ w.T + bias``; with a mesh ``axis`` the product is summed over it, each device holding part of the inputs.

    The bias is [O]; or [N, O], one for each of N equal runs of rows, as a `LowRank` has them."""
    if axis is not None:
        return residual + _biased(lax.psum(matmul(x, w, prompts_at), axis), bias)
    if uses_kernels(w):
        return kernels.linear_add(x, w, bias, residual, prompts_at)
    return residual + _biased(matmul(x, w, prompts_at), bias)


def output_mlp(
    heads: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    weights: Sequence[Weight | None],
    biases: Sequence[jax.Array | None],
    config: ModelConfig,
    axis: str | None = None,
    prompts_at: jax.Array | None = None,
) -> jax.Array:
    """What follows attention in a block: the output projection of heads [T, H * hd] onto the residual [T, D], and the feed-forward.

    weights and biases: output projection, gate (None where there is none), up, down. ``axis`` as in `linear_add`.
    """
    output, gate, up, down = weights
    x = linear_add(heads, output, biases[0], residual, axis, prompts_at)
    if gate is None:
        (inner,) = norm_linear(x, norm, config.norm_eps, (up,), (biases[2],), config.activation, prompts_at)
    else:
        inner = gated(x, norm, config.norm_eps, gate, up, biases[1:3], config.activation, prompts_at)
    return linear_add(inner, down, biases[3], x, axis, prompts_at)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    batch: RaggedBatch,
    slots: Slots,
    rotation: Rotation | None,
    norms: tuple[jax.Array, jax.Array] | None,
    config: ModelConfig,
    *,
    with_kernels: bool,
) -> tuple[jax.Array, Pages]:
    """Norm (where a model has it) and rotate the heads, write k and v to their pages, attend.

    q: [T, H, hd]; k, v: [T, KH, hd]; pages: keys and values [N, KH, page, hd]. Returns [T, H, hd] and the pages.
    """
    scale, window, eps = config.head_dim**-0.5, config.sliding_window, config.norm_eps
    if with_kernels:
        q_norm, k_norm = norms or (None, None)
        q, k_pages, v_pages = kernels.rope_write(q, k, v, rotation, slots, *pages, q_norm=q_norm, k_norm=k_norm, eps=eps)
        return kernels.attention(q, k_pages, v_pages, batch, scale=scale, window=window), (k_pages, v_pages)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    if rotation is not None:
        q, k = rope(q, *rotation), rope(k, *rotation)
    k_pages, v_pages = write(pages[0], slots, k), write(pages[1], slots, v)
    return ragged_attention(q, k_pages, v_pages, batch, scale=scale, window=window), (k_pages, v_pages)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + _over_rows(bias.astype(y.dtype), y.shape[0])


def _over_rows(vectors: jax.Array, rows: int) -> jax.Array:
    """A vector [K] for all rows, [1, K]; or N of them, [N, K], each over its run of rows, [rows, K]."""
    return vectors[None] if vectors.ndim == 1 else jnp.repeat(vectors, rows // vectors.shape[0], axis=0)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    The weight is [K]; or [N, K], one for each of N equal runs of the rows x [T, K], as a `LowRank` has them."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32)
    gains = _over_rows(weight, x.shape[0]) if weight.ndim == 2 else jnp.expand_dims(weight, range(x.ndim - 1))
    return (wide * scale * gains).astype(x.dtype)


def activate(x: jax.Array, kind: Activation) -> jax.Array:
    """The feed-forward non-linearity."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def rope_frequencies(config: ModelConfig, context: int) -> tuple[jax.Array, float]:
    """Angles per position of each rotated pair, float32 [rotary_dim // 2], and the factor on cos and sin.

    Kinds as in Hugging Face's ``rope_scaling``; ``context`` is the longest sequence to be served, in tokens (dynamic and
    longrope choose by it). Sources: RoFormer arXiv 2104.09864, YaRN arXiv 2309.00071, LongRoPE arXiv 2402.13753.
    """
    scaling, dim = config.rope_scaling, config.rotary_dim
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    original = scaling.original_context or config.context_length
    theta = config.rope_theta
    if scaling.kind == "dynamic" and context > original:
        theta *= (scaling.factor * context / original - (scaling.factor - 1)) ** (dim / (dim - 2))
    base = 1.0 / (theta**exponents)
    match scaling.kind:
        case "none" | "dynamic":
            return base, 1.0
        case "linear":
            return base / scaling.factor, 1.0
        case "llama3":
            return _llama3(base, scaling, original), 1.0
        case "yarn":
            return _yarn(base, config, original)
        case "longrope":
            factors = scaling.long_factors if context > original else scaling.short_factors or scaling.long_factors
            stretch = config.context_length / original
            default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
            return base / jnp.array(factors, jnp.float32), scaling.attention_factor or default


def _llama3(base: jax.Array, scaling: RopeScaling, original: int) -> jax.Array:
    wavelengths = 2 * math.pi / base
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor + smooth * base


def _yarn(base: jax.Array, config: ModelConfig, original: int) -> tuple[jax.Array, float]:
    scaling, dim = config.rope_scaling, config.rotary_dim

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = correction(scaling.beta_fast), correction(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = base / scaling.factor * ramp + base * (1 - ramp)
    return frequencies, scaling.attention_factor or _yarn_attention(scaling)


def _yarn_attention(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def rope_table(config: ModelConfig, positions: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation at positions [T], float32 [T, 1, rotary_dim // 2] each."""
    frequencies, factor = rope_frequencies(config, context)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads [T, H, hd]: dimension i pairs with i + rotary_dim // 2 (Hugging Face's order); the rest passes through."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
