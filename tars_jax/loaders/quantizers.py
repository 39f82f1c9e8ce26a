"""Encoding matrices as ggml blocks: the inverse of `blocks.decode`, scales fitted by least squares.

A block's scale (and minimum) is that of several trials whose error, weighted by how much each input matters, is least: the error of a
product is sum((W - Q(W))^2 E[x^2]), so an input's mean square is its weight. The rounding to codes is nearest, the fit of the scale to
the codes is linear regression, and what is compared is the error after the scale's own rounding.

Method: llama.cpp ``ggml-quants.c`` (make_qx_quants, make_qkx2_quants; MIT licence), layouts as in `blocks`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.loaders.blocks import TYPES
from tars_jax.loaders.codebooks import IQ4_VALUES

_CHUNK_WEIGHTS = 1 << 20  # fitted at a time
_FLOOR = 1e-3  # of the mean weight that every input has at least: the text it was measured on is finite
_TRIALS = np.round(np.arange(-10, 10) * 0.1, 1).astype(np.float32)  # added to the largest code


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How a type is fitted and laid out. group: weights with one scale; low, high: its codes; table: their values, if not themselves."""

    group: int
    low: int
    high: int
    affine: bool
    pack: Callable[..., np.ndarray]  # (codes uint8 from 0 up, scales, mins) -> bytes [n, type_size]
    two_level: bool = False  # scales are themselves 6- or 8-bit codes
    table: tuple[int, ...] = ()


def encode(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """A matrix [..., K] as bytes of a ggml type, uint8 [nbytes], the least squares way.

    importance: [K], the weight of each input's error, e.g. its mean square; None: all alike. Raises InvalidRequest for a type
    that cannot be written or rows that are not whole blocks of it.
    """
    if name in DENSE:
        kind = next(kind for kind in TYPES.values() if kind.name == name)
        assert kind.dtype is not None
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(weights).astype(kind.dtype).reshape(-1).view(np.uint8)
    if name not in QUANTIZERS:
        raise InvalidRequest(f"{name} cannot be written; types that can are {', '.join((*QUANTIZERS, *DENSE))}")
    width, block = weights.shape[-1], _BLOCK_SIZES[name]
    if width % block:
        raise InvalidRequest(f"rows of {width} weights are not whole {name} blocks of {block}")
    matter = np.ones(width, np.float32) if importance is None else importance.astype(np.float32)
    mean = float(matter.mean())
    matter = matter + np.float32(_FLOOR * mean) if mean > 0 else np.ones(width, np.float32)
    flat = np.ascontiguousarray(weights, np.float32).reshape(-1, width)
    rows = max(_CHUNK_WEIGHTS // width, 1)
    parts = []
    for start in range(0, len(flat), rows):
        chunk = flat[start : start + rows]
        padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0))) if len(flat) > rows else chunk
        fitted = jax.tree.map(np.asarray, _fit(padded, matter, name=name))
        blocks = QUANTIZERS[name].pack(*(None if part is None else part[: chunk.size // block] for part in fitted))
        parts.append(blocks.reshape(-1))
    return np.concatenate(parts)


def fallback(name: str, width: int) -> str:
    """The type that rows of ``width`` weights get where they are not whole blocks of the type: llama.cpp's choice."""
    for candidate in (name, _FALLBACKS.get(name, "F16"), "F16"):
        if candidate in DENSE or width % _BLOCK_SIZES[candidate] == 0:
            return candidate
    raise AssertionError("F16 takes any width")


@partial(jax.jit, static_argnames="name")
def _fit(weights: jax.Array, matter: jax.Array, *, name: str) -> tuple[jax.Array | None, ...]:
    """Codes uint8 [n, block] from 0 up, scales and minima [n, groups] (two levels: their codes and then the float16 of the block)."""
    quantizer, block = QUANTIZERS[name], _BLOCK_SIZES[name]
    x = weights.reshape(-1, quantizer.group)
    w = jnp.broadcast_to(matter.reshape(1, -1, quantizer.group), (weights.shape[0], matter.shape[0] // quantizer.group, quantizer.group))
    w = w.reshape(x.shape)
    if quantizer.affine:
        scale, low = _fit_affine(x, w, quantizer)
    else:
        scale, low = _fit_symmetric(x, w, quantizer), None
    extra: tuple[jax.Array | None, ...]
    if quantizer.two_level:
        groups = block // quantizer.group
        scale, scale_codes, top = _second_level(scale.reshape(-1, groups), 63 if quantizer.affine else 128)
        low_codes = least = None
        if low is not None:
            low, low_codes, least = _second_level(low.reshape(-1, groups), 63)
            low = low.reshape(-1, 1)
        scale, extra = scale.reshape(-1, 1), (scale_codes, top, low_codes, least)
    else:
        shape = (-1, block // quantizer.group)
        extra = scale.astype(jnp.float16).reshape(shape), None if low is None else low.astype(jnp.float16).reshape(shape)
    codes = _codes(x, scale, low, quantizer) - quantizer.low
    return (codes.astype(jnp.uint8).reshape(-1, block), *extra)


def _second_level(values: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values [n, groups] of one sign (most 63) or any (most 128, of which the extreme gets -128), as int8 codes times a float16 of each
    row: what they then are, codes, and that number [n, 1]."""
    peak = jnp.take_along_axis(values, jnp.argmax(jnp.abs(values), axis=1, keepdims=True), axis=1)
    unit = _rounded(peak / (-most if most == 128 else most))
    codes = jnp.clip(jnp.round(values * _inverse(unit)), -most if most == 128 else 0, most - (most == 128)).astype(jnp.int32)
    return codes.astype(jnp.float32) * unit, codes.astype(jnp.int8), unit.astype(jnp.float16)


def _rounded(scale: jax.Array) -> jax.Array:
    """As a float16 holds it, in float32."""
    return jnp.clip(scale, -65504.0, 65504.0).astype(jnp.float16).astype(jnp.float32)


def _inverse(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _codes(x: jax.Array, scale: jax.Array, low: jax.Array | None, quantizer: Quantizer) -> jax.Array:
    """The nearest code to each of x [n, group], float32; of a table, its index."""
    scaled = (x if low is None else x - low) * _inverse(scale)
    if not quantizer.table:
        return jnp.clip(jnp.round(scaled), quantizer.low, quantizer.high)
    values = np.array(quantizer.table, np.float32)
    middles = (values[1:] + values[:-1]) / 2
    return jnp.sum(scaled[..., None] > middles.reshape(1, 1, -1), axis=-1).astype(jnp.float32)


def _values(codes: jax.Array, quantizer: Quantizer) -> jax.Array:
    return jnp.asarray(quantizer.table, jnp.float32)[codes.astype(jnp.int32)] if quantizer.table else codes


def _total(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=1, keepdims=True)


def _fit_symmetric(x: jax.Array, w: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The scale of each row of x [n, group] with error weights w: [n, 1]."""
    peak = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=1, keepdims=True), axis=1)
    most = float(quantizer.table[0] if quantizer.table else quantizer.low)
    step = -most / 8 if quantizer.table else 1.0  # a table's values are far apart

    def better(best: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = scale if quantizer.two_level else _rounded(scale)
        error = _total(w * (x - scale * _values(_codes(x, scale, None, quantizer), quantizer)) ** 2)
        return jnp.where(error < best[0], error, best[0]), jnp.where(error < best[0], scale, best[1])

    def attempt(best: tuple[jax.Array, jax.Array], shift: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        codes = _values(_codes(x, peak / (most - shift * step), None, quantizer), quantizer)
        power = _total(w * codes * codes)
        return better(best, jnp.where(power > 0, _total(w * x * codes) / jnp.where(power > 0, power, 1.0), 0.0)), None

    start = better((jnp.full_like(peak, jnp.inf), peak), peak / most)
    return jax.lax.scan(attempt, start, jnp.asarray(_TRIALS))[0][1]


def _fit_affine(x: jax.Array, w: jax.Array, quantizer: Quantizer) -> tuple[jax.Array, jax.Array]:
    """Scale and minimum of each row of x [n, group] with error weights w: [n, 1] each. Two levels hold no minimum above 0."""
    low, high = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)
    if quantizer.two_level:
        low = jnp.minimum(low, 0.0)
    State = tuple[jax.Array, jax.Array, jax.Array]

    def better(best: State, scale: jax.Array, least: jax.Array) -> State:
        if quantizer.two_level:
            scale, least = jnp.maximum(scale, 0.0), jnp.minimum(least, 0.0)
        else:
            scale, least = _rounded(scale), _rounded(least)
        error = _total(w * (x - scale * _codes(x, scale, least, quantizer) - least) ** 2)
        now = error < best[0]
        return jnp.where(now, error, best[0]), jnp.where(now, scale, best[1]), jnp.where(now, least, best[2])

    def attempt(best: State, shift: jax.Array) -> tuple[State, None]:
        q = _codes(x, (high - low) / (quantizer.high + shift), low, quantizer)
        ones, linear, square, target, product = _total(w), _total(w * q), _total(w * q * q), _total(w * x), _total(w * q * x)
        spread = ones * square - linear * linear
        known = spread > 1e-9 * ones * square
        divisor = jnp.where(known, spread, 1.0)
        scale = jnp.where(known, (ones * product - linear * target) / divisor, (high - low) / quantizer.high)
        least = jnp.where(known, (square * target - linear * product) / divisor, low)
        if quantizer.two_level:  # where the best minimum is above 0 it is 0, and the scale the best one for that
            alone = jnp.where(square > 0, product / jnp.where(square > 0, square, 1.0), scale)
            scale, least = jnp.where(least > 0, alone, scale), jnp.minimum(least, 0.0)
        return better(best, scale, least), None

    start = better((jnp.full_like(low, jnp.inf), low, low), (high - low) / quantizer.high, low)
    _, scale, least = jax.lax.scan(attempt, start, jnp.asarray(_TRIALS))[0]
    return scale, least


# Codes, scales and minima to bytes, in the order of the layouts in `blocks`.


def _raw(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8)


def _join(codes: np.ndarray, width: int, bits: int) -> np.ndarray:
    """The inverse of `codebooks.spread`: in every run of ``width`` bytes, lowest bits first."""
    lanes = 8 // bits
    runs = codes.reshape(len(codes), -1, lanes, width)
    shifts = (bits * np.arange(lanes, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce((runs & np.uint8((1 << bits) - 1)) << shifts, axis=2).reshape(len(codes), -1)


def _pack_4(codes: np.ndarray, scale: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Q4_0, Q4_1, IQ4_NL."""
    head = [_raw(scale, "<f2")] + ([] if low is None else [_raw(low, "<f2")])
    return np.concatenate([*head, _join(codes, 16, 4)], axis=1)


def _pack_5(codes: np.ndarray, scale: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Q5_0, Q5_1."""
    head = [_raw(scale, "<f2")] + ([] if low is None else [_raw(low, "<f2")])
    return np.concatenate([*head, np.packbits(codes >> 4, axis=1, bitorder="little"), _join(codes, 16, 4)], axis=1)


def _pack_8(codes: np.ndarray, scale: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    return np.concatenate([_raw(scale, "<f2"), codes - np.uint8(127)], axis=1)


def _scales_and_mins(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and eight 6-bit minima [n, 8] in 12 bytes."""
    scales, mins = scales.view(np.uint8), mins.view(np.uint8)
    low = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    low_mins = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    return np.concatenate([low, low_mins, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=1)


def _pack_4k(codes: np.ndarray, scales: np.ndarray, top: np.ndarray, mins: np.ndarray, least: np.ndarray) -> np.ndarray:
    head = [_raw(top, "<f2"), _raw(-least, "<f2"), _scales_and_mins(scales, mins)]
    return np.concatenate([*head, _join(codes, 32, 4)], axis=1)


def _pack_5k(codes: np.ndarray, scales: np.ndarray, top: np.ndarray, mins: np.ndarray, least: np.ndarray) -> np.ndarray:
    head = [_raw(top, "<f2"), _raw(-least, "<f2"), _scales_and_mins(scales, mins)]
    return np.concatenate([*head, _join(codes >> 4, 32, 1), _join(codes, 32, 4)], axis=1)


def _pack_6k(codes: np.ndarray, scales: np.ndarray, top: np.ndarray, mins: None, least: None) -> np.ndarray:
    return np.concatenate([_join(codes, 64, 4), _join(codes >> 4, 32, 2), scales.view(np.uint8), _raw(top, "<f2")], axis=1)


QUANTIZERS: dict[str, Quantizer] = {
    "Q4_0": Quantizer(32, -8, 7, False, _pack_4),
    "Q4_1": Quantizer(32, 0, 15, True, _pack_4),
    "Q5_0": Quantizer(32, -16, 15, False, _pack_5),
    "Q5_1": Quantizer(32, 0, 31, True, _pack_5),
    "Q8_0": Quantizer(32, -127, 127, False, _pack_8),
    "IQ4_NL": Quantizer(32, 0, 15, False, _pack_4, table=tuple(IQ4_VALUES.tolist())),
    "Q4_K": Quantizer(32, 0, 15, True, _pack_4k, two_level=True),
    "Q5_K": Quantizer(32, 0, 31, True, _pack_5k, two_level=True),
    "Q6_K": Quantizer(16, -32, 31, False, _pack_6k, two_level=True),
}
DENSE = ("F16", "BF16", "F32")
_BLOCK_SIZES = {kind.name: kind.block_size for kind in TYPES.values()}
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
