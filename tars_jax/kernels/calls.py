"""The kernels as jax functions. Each is one custom call; what it computes stands beside it in plain operations."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.config import Activation
from tars_jax.kernels import native
from tars_jax.kernels.tiled import Format, Tiled
from tars_jax.quant import LowRank, innermost

Weight = Tiled | LowRank  # of a `Tiled`, or of another `LowRank` that is

ABSENT: Format = (0, 0, 0, 0, 0, 0)
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


class Batch(Protocol):
    """What `attention` reads of a `cache.RaggedBatch`, which stands above this package."""

    @property
    def query_starts(self) -> jax.Array: ...
    @property
    def kv_lengths(self) -> jax.Array: ...
    @property
    def page_tables(self) -> jax.Array: ...
    @property
    def prompts_at(self) -> jax.Array | None: ...


class Block(NamedTuple):
    """A decoder block's arrays; those that a model lacks are None."""

    norms: Sequence[jax.Array | None]  # of the attention, of queries, of keys, of the feed-forward
    weights: Sequence[Weight | None]  # q, k, v, o, gate, up, down
    biases: Sequence[jax.Array | None]  # theirs


@partial(jax.jit, static_argnames=("shape", "dtype"))
def empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array with whatever its memory holds; a large one takes up memory only as it is written."""
    native.get()
    out: jax.Array = jax.ffi.ffi_call("tars_empty", jax.ShapeDtypeStruct(shape, dtype))()
    return out


def norm_linear(
    x: jax.Array,
    norm: jax.Array | None,
    eps: float,
    weights: Sequence[Weight],
    biases: Sequence[jax.Array | None] | None = None,
    *,
    activation: Activation | None = None,
    out_dtype: Any = None,
    prompts_at: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``activate(rms_norm(x, norm, eps) @ w.T + bias)`` for several weights [O_i, K]: [T, K] -> [T, O_i] each.

    Without ``norm`` x is used as it is. ``out_dtype``: x's if not given. A norm [N, K] or bias [N, O] has one for each of N equal runs
    of rows, as a `LowRank` does. What low-rank updates add is computed in float32 from the rows as they are before they are quantised.
    ``prompts_at`` is a `cache.RaggedBatch`'s, here and below.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), out_dtype or x.dtype) for w in weights]
    biases = biases or [None] * len(weights)
    return tuple(_product(results, x, norm, eps, weights, biases, None, prompts_at, activation=activation))


def linear_add(x: jax.Array, w: Weight, bias: jax.Array | None, residual: jax.Array, prompts_at: jax.Array | None = None) -> jax.Array:
    """``residual + x @ w.T + bias``: [T, K], [T, O] -> [T, O] in the residual's dtype."""
    result = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    out: jax.Array = _product([result], x, None, 0.0, [w], [bias], residual, prompts_at)[0]
    return out


def gated(
    x: jax.Array,
    norm: jax.Array | None,
    eps: float,
    gate: Weight,
    up: Weight,
    activation: Activation,
    gate_bias: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    prompts_at: jax.Array | None = None,
) -> jax.Array:
    """``activate(n @ gate.T + gate_bias) * (n @ up.T + up_bias)`` where n is x, RMS-normalised if ``norm`` is given: [T, F]."""
    result = jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), x.dtype)
    biases = [gate_bias, up_bias]
    out: jax.Array = _product([result], x, norm, eps, [gate, up], biases, None, prompts_at, activation=activation, gated=True)[0]
    return out


def blocks(
    layers: Sequence[Block],
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    slots: tuple[jax.Array, jax.Array],
    batch: Batch,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    first_pages: Sequence[int],
    rotates: Sequence[bool],
    heads: int,
    head_dim: int,
    activation: Activation,
    eps: float,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Neighbouring decoder blocks in one call: for each the norm and projections of `norm_linear`, `rope_write`, `attention`, `linear_add`,
    `gated` (or the activated ``up`` alone) and `linear_add`, on states [T, D]. Returns the states, k_pages and v_pages.

    Padding tokens become zeros.

    first_pages: where each layer's pages begin in the cache; slots and page tables count from there. rotates: whether a layer rotates its
    heads. The rest as in `rope_write` and `attention`.
    """
    native.get()
    operands = Operands()
    for layer in layers:
        operands.add(*map(_optional, layer.norms))
        for w, bias in zip(layer.weights, layer.biases, strict=True):
            operands.add_weight(w, bias)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, k_pages, v_pages)]
    call = jax.ffi.ffi_call("tars_blocks", results, input_output_aliases={9: 1, 10: 2}, vmap_method="sequential")
    cos, sin = rotation or (None, None)
    rows = batch.query_starts, batch.kv_lengths, batch.page_tables, _prompts_at(batch.prompts_at)
    out = call(
        *(x, _optional(cos), _optional(sin), *slots, *rows, k_pages, v_pages, *operands.arrays),
        **operands.attributes,
        first_pages=np.array(first_pages, np.int64),
        rotates=np.array(rotates, np.int64),
        heads=np.int64(heads),
        head_dim=np.int64(head_dim),
        activation=np.int64(ACTIVATIONS[activation]),
        window=np.int64(window),
        scale=np.float32(scale),
        softcap=np.float32(softcap),
        eps=np.float32(eps),
    )
    return out[0], out[1], out[2]


def rope_write(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    slots: tuple[jax.Array, jax.Array],
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm (if given) and rotate heads of q [T, H, hd] and k [T, KH, hd], and put k and v into pages [N, KH, page, hd], in place.

    rotation: cos and sin of `ops.rope_table`, None for none. slots: of `cache.write_slots`; tokens of page 0 are dropped.
    Returns q, k_pages, v_pages.
    """
    native.get()
    cos, sin = rotation or (None, None)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k_pages, v_pages)]
    call = jax.ffi.ffi_call("tars_rope_write", results, input_output_aliases={9: 1, 10: 2}, vmap_method="sequential")
    norms = _optional(q_norm), _optional(k_norm)
    out = call(q, k, v, _optional(cos), _optional(sin), *norms, *slots, k_pages, v_pages, eps=np.float32(eps))
    return out[0], out[1], out[2]


def attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, batch: Batch, *, scale: float, window: int = 0, softcap: float = 0.0
) -> jax.Array:
    """`attention.ragged_attention`; with ``softcap`` scores become ``softcap * tanh(score / softcap)`` (Gemma 2)."""
    native.get()
    call = jax.ffi.ffi_call("tars_attention", jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    attributes = {"scale": np.float32(scale), "softcap": np.float32(softcap), "window": np.int64(window)}
    out: jax.Array = call(q, k_pages, v_pages, batch.query_starts, batch.kv_lengths, batch.page_tables, **attributes)
    return out


def _product(
    results: list[jax.ShapeDtypeStruct],
    x: jax.Array,
    norm: jax.Array | None,
    eps: float,
    weights: Sequence[Weight],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None,
    prompts_at: jax.Array | None,
    *,
    activation: Activation | None = None,
    gated: bool = False,
) -> Sequence[jax.Array]:
    native.get()
    operands = Operands()
    for w, bias in zip(weights, biases, strict=True):
        operands.add_weight(w, bias)
    attributes = {
        **operands.attributes,
        "eps": np.float32(eps),
        "activation": np.int64(ACTIVATIONS[activation]),
        "gated": np.int64(gated),
    }
    extra = jnp.zeros(0, x.dtype) if residual is None else residual
    call = jax.ffi.ffi_call("tars_product", results, vmap_method="sequential")
    out: Sequence[jax.Array] = call(x, _optional(norm), extra, _prompts_at(prompts_at), *operands.arrays, **attributes)
    return out


class Operands:
    """What the kernels read of weights: first the arrays that hold tiles, each once; then the others in their order, for a weight its
    bias, and a, b and scale of every update."""

    def __init__(self) -> None:
        self._sources: dict[int, jax.Array] = {}
        self._others: list[jax.Array] = []
        self._formats: list[tuple[int, ...]] = []  # with where the tiles begin, and in which array
        self._updates: list[int] = []

    def add(self, *arrays: jax.Array) -> None:
        self._others += arrays

    def add_weight(self, w: Weight | None, bias: jax.Array | None) -> None:
        base, updates = innermost(w), list[jax.Array]()
        while isinstance(w, LowRank):
            updates += map(_optional, (w.a, w.b, w.scale))
            w = w.base
        self.add(_optional(bias), *updates)
        self._updates.append(len(updates) // 3)
        if base is None:
            self._formats.append((*ABSENT, 0, 0))
        else:
            self._sources.setdefault(id(base.data), base.data)
            self._formats.append((*base.format, base.offset, list(self._sources).index(id(base.data))))

    @property
    def arrays(self) -> list[jax.Array]:
        return [*self._sources.values(), *self._others]

    @property
    def attributes(self) -> dict[str, Any]:
        numbers = {"formats": self._formats, "updates": self._updates, "sources": [len(self._sources)]}
        return {name: np.array(values, np.int64).reshape(-1) for name, values in numbers.items()}


def _prompts_at(given: jax.Array | None) -> jax.Array:
    return jnp.full(1, np.iinfo(np.int32).max, jnp.int32) if given is None else given


def _optional(x: jax.Array | None) -> jax.Array:
    """An absent array is passed as an empty one; norms, biases and rotations are float32 in the kernels."""
    return jnp.zeros(0, jnp.float32) if x is None else x.astype(jnp.float32)
