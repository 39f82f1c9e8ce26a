"""Weights as leaf types: a plain array, a `QArray` of packed codes, or a `LowRank` update on top of either.

Every quantised file format is repacked losslessly into one of two layouts, a code a byte or two 4-bit codes a byte (with a
scale, and where the format has one a minimum, per group of 16 or 32 inputs). Only `ops.matmul` and `ops.take` know
that these types exist.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import struct
from tars_jax.errors import InvalidRequest

NIBBLE_OFFSET = 8  # 4-bit codes without minima are signed, -8..7, and stored with this offset


@struct.dataclass
class QArray:
    """A matrix [O, K] quantised in groups along K: ``w[o, k] = code[o, k] * scale[o, k // group] + min[o, k // group]``.

    bits: what a code needs: 4, 5, 6 or 8. Codes of 5 and 6 bits take a byte each here, and their own size in a `kernels.Tiled`.
    codes: int8 [O, K]; or uint8 [O, K // 2] when bits is 4, where byte j of a group holds code j in its low half and code
    j + group // 2 in its high half (GGUF's Q4 order), stored with an offset of 8 when there are no minima.
    scales, mins: float16 or float32 [O, K // group].
    """

    codes: jax.Array
    scales: jax.Array
    mins: jax.Array | None
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (2 if self.bits == 4 else 1))

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + (0 if self.mins is None else self.mins.nbytes))


@struct.dataclass
class LowRank:
    """``base + scale * a.T @ b``: a LoRA adapter or an evolutionary perturbation on a weight. a: [r, O], b: [r, K].

    With a: [N, r, O] it stands for N matrices on one base, and a product takes N equal runs of rows, one for each; b is then
    [N, r, K], or [r, K] where they share it. (EGGROLL, arXiv 2511.16652: a population costs one pass over the base.)
    """

    base: Any  # an array, a QArray [O, K], or a LowRank again
    a: jax.Array
    b: jax.Array
    scale: Any  # float32 scalar; [T, r] for each token and rank of a product; None until a step fills it in

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        return int(self.base.nbytes + self.a.nbytes + self.b.nbytes)


@struct.dataclass
class Observed:
    """A dense matrix [O, K] that tells what it multiplies: for every product, ``record`` hears on the host ``index`` and the sums of the
    inputs' squares over the tokens, float32 [K]."""

    base: jax.Array
    index: jax.Array  # int32 scalar
    record: Callable[[jax.Array, jax.Array], None] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)


Weight = jax.Array | QArray | LowRank


def innermost(w: Any) -> Any:
    """The weight under any low-rank updates."""
    while isinstance(w, LowRank):
        w = w.base
    return w


def pack(codes: Any, scales: Any, mins: Any, *, bits: int, group: int) -> QArray:
    """Pack numpy arrays, int8 codes [O, K] and their scales and minima (or None) [O, K // group], into a `QArray` of such.

    Raises InvalidRequest when K is not a multiple of the group or a code does not fit the bits.
    """
    if codes.shape[-1] % group:
        raise InvalidRequest(f"cannot pack {codes.shape[-1]} columns in groups of {group}")
    low, high = (0, 1 << bits) if mins is not None and bits < 8 else (-(1 << (bits - 1)), 1 << (bits - 1))
    if bits < 8 and codes.size and not low <= codes.min() <= codes.max() < high:
        raise InvalidRequest(f"cannot pack codes outside {bits} bits")
    if bits > 4:
        return QArray(codes, scales, mins, bits=bits, group=group)
    unsigned = (codes + (NIBBLE_OFFSET if mins is None else 0)).view(np.uint8).reshape(*codes.shape[:-1], -1, 2, group // 2)
    packed: Any = unsigned[..., 0, :] | (unsigned[..., 1, :] << 4)
    return QArray(packed.reshape(*codes.shape[:-1], -1), scales, mins, bits=4, group=group)


def unpack(w: QArray) -> jax.Array:
    """Signed codes of a `QArray`, int8 [O, K]."""
    if w.bits > 4:
        return w.codes
    grouped = w.codes.reshape(*w.codes.shape[:-1], -1, w.group // 2)
    codes = jnp.concatenate([grouped & 15, grouped >> 4], axis=-1).astype(jnp.int8)
    if w.mins is None:
        codes = codes - jnp.int8(NIBBLE_OFFSET)
    return codes.reshape(w.shape)


def dequantize(w: Weight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The dense matrix [O, K] a weight stands for; [N, O, K] for a population of updates."""
    if isinstance(w, LowRank):
        return (dequantize(w.base, jnp.float32) + w.scale * (jnp.swapaxes(w.a, -1, -2) @ w.b)).astype(dtype)
    if not isinstance(w, QArray):
        return w.astype(dtype)
    codes = unpack(w).astype(jnp.float32).reshape(*w.scales.shape, w.group)
    dense = codes * w.scales.astype(jnp.float32)[..., None]
    if w.mins is not None:
        dense = dense + w.mins.astype(jnp.float32)[..., None]
    return dense.reshape(w.shape).astype(dtype)
