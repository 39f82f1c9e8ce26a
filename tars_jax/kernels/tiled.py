"""`Tiled`: a weight repacked for the CPU kernels, and the way in and out of that layout (described in cpu/format.h)."""

import ctypes
import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tars_jax import struct
from tars_jax.errors import InvalidRequest
from tars_jax.kernels import native
from tars_jax.quant import QArray

LANES, GROUP = 16, 32  # outputs of a tile, inputs of a block
CODE_OFFSET = 128  # 8-bit codes are stored unsigned
# Bits, group and whether there are minima, as ggml's types combine them; any other combination takes more code, but no file has it.
LAYOUTS = {(bits, group, affine) for bits in (4, 8) for group in (16, 32) for affine in (False, True)}
LAYOUTS |= {(5, 32, False), (5, 32, True), (6, 16, False)}

Kind = Literal["affine", "symmetric", "dense"]
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
Format = tuple[int, int, int, int, int, int]  # bits, group, affine, dtype, outputs, inputs
ALIGNMENT = 64  # bytes: of what jax takes from numpy without a copy, and of a weight in an `Arena`


@struct.dataclass
class Tiled:
    """A matrix [O, K] in tiles of 16 outputs.

    data: uint8 [tiles, bytes of a tile], the last tile padded with zeros; or [bytes], an `Arena`'s, where the tiles begin at ``offset``.
    dtype: of scales and minima, or of the elements when dense.
    """

    data: jax.Array
    shape: tuple[int, int] = struct.field(pytree_node=False)
    kind: Kind = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)  # 0 when dense
    dtype: str = struct.field(pytree_node=False)
    offset: int = struct.field(pytree_node=False, default=0)

    @property
    def nbytes(self) -> int:
        tiles, size = _layout(self.format)
        return self.data.shape[0] * size if self.data.ndim == 2 else tiles * size

    @property
    def tiles(self) -> jax.Array:
        """uint8 [tiles, bytes of a tile]."""
        if self.data.ndim == 2:
            return self.data
        tiles, size = _layout(self.format)
        return self.data[self.offset : self.offset + tiles * size].reshape(tiles, size)

    @property
    def format(self) -> Format:
        return (self.bits, self.group, int(self.kind == "affine"), DTYPES[self.dtype], *self.shape)


class Groups(NamedTuple):
    """A quantised matrix [O, K] whose groups stand apart, each at the same distance from the one before: views of a file's blocks.

    codes: uint8 [O, K // group, bytes], in a group's order and with the offset of a `QArray`'s; scales, mins: [O, K // group].
    """

    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        outputs, groups = self.scales.shape
        return outputs, groups * self.group


Packable = QArray | Groups | np.ndarray | jax.Array


def can_pack(w: Any) -> bool:
    """Whether `pack_tiles` takes this weight."""
    if isinstance(w, QArray | Groups):
        scales = str(w.scales.dtype) in ("float16", "float32") and (w.mins is None or w.mins.dtype == w.scales.dtype)
        return len(w.shape) == 2 and scales and (w.bits, w.group, w.mins is not None) in LAYOUTS
    return getattr(w, "ndim", 0) == 2 and str(getattr(w, "dtype", "")) in DTYPES


class Arena:
    """Memory for the tiles of many weights. As one array: handing an array to a program takes the host a microsecond, for each of the
    hundreds of a model, at every step."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """``sizes``: bytes of the weights by name. Nothing is taken from the system before it is written to."""
        room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
        self._sizes, self._starts = sizes, dict(zip(sizes, itertools.accumulate(room, initial=0), strict=False))
        self._memory: Any = _aligned(sum(room))

    def pack(self, name: str, w: Packable, threads: int | None = None) -> Tiled:
        """`pack_tiles` into the place of that name, or into memory of its own where the weight does not fit there."""
        tiled = _describe(w)
        tiles, size = _layout(tiled.format)
        if tiles * size != self._sizes.get(name):
            return pack_tiles(w, threads)
        start = self._starts[name]
        _pack(w, tiled, self._memory[start : start + tiles * size], threads)
        return dataclasses.replace(tiled, data=self._memory, offset=start)

    def finish(self, params: Any) -> Any:
        """A tree of what was packed here, and of other leaves, with this memory as a jax array in all of its weights."""
        whole = jax.device_put(self._memory)  # without a copy

        def finished(leaf: Any) -> Any:
            if not isinstance(leaf, Tiled):
                return leaf
            return dataclasses.replace(leaf, data=whole if leaf.data is self._memory else jax.device_put(leaf.data))

        return jax.tree.map(finished, params, is_leaf=lambda leaf: isinstance(leaf, Tiled))


def pack_tiles(w: Packable, threads: int | None = None) -> Tiled:
    """Repack a weight; the data is a numpy array aligned so that jax takes it without a copy. Raises ValueError, RuntimeError."""
    tiled = _describe(w)
    tiles, size = _layout(tiled.format)
    data: Any = _aligned(tiles * size)
    _pack(w, tiled, data, threads)
    return dataclasses.replace(tiled, data=data.reshape(tiles, size))


def _pack(w: Packable, tiled: Tiled, out: np.ndarray, threads: int | None) -> None:
    parts, steps = _parts(w)
    pointers = [None if array is None else ctypes.c_void_p(array.ctypes.data) for array in parts]
    fields, distances = (ctypes.c_int64 * 6)(*tiled.format), (ctypes.c_int64 * 2)(*steps)
    threads = threads or min(os.cpu_count() or 1, 8)
    native.get().tars_pack(fields, *pointers, distances, ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(threads))


def _parts(w: Packable) -> tuple[list[np.ndarray | None], tuple[int, int]]:
    """Codes (or elements), scales and minima as the packer reads them, and the bytes from a group's codes and scale to the next's."""
    if not isinstance(w, QArray | Groups):
        return [np.ascontiguousarray(np.asarray(w)), None, None], (0, 0)
    codes, scales = np.asarray(w.codes), np.asarray(w.scales)
    mins = None if w.mins is None else np.asarray(w.mins)
    if isinstance(w, QArray):
        codes = codes.reshape(*scales.shape, -1)
    apart = all(array is None or array.strides[0] == array.shape[1] * array.strides[1] for array in (codes, scales, mins))
    if not apart or (mins is not None and mins.strides != scales.strides) or codes.strides[2] != 1:
        codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
        mins = None if mins is None else np.ascontiguousarray(mins)
    return [codes, scales, mins], (codes.strides[1], scales.strides[1])


def untile(w: Tiled) -> jax.Array:
    """The dense matrix [O, K] in float32: the layout once more, in plain jax."""
    bits, group, _, _, outputs, inputs = w.format
    tiles = w.tiles.shape[0]
    if w.kind == "dense":
        return _untile_dense(w)[:outputs, :inputs]
    blocks = jnp.asarray(w.tiles).reshape(tiles, -1, _block_bytes(w.format))  # [tiles, blocks, bytes]
    code_bytes, halves = LANES * GROUP * bits // 8, GROUP // group
    codes = blocks[..., :code_bytes].reshape(tiles, -1, code_bytes // 64, LANES, 4)
    if bits == 8:
        quads = codes.astype(jnp.int32) - CODE_OFFSET
    else:  # low nibbles, then high ones, per weight group
        nibbles = codes[:, :, :4].reshape(tiles, -1, halves, group // 8, LANES, 4)
        quads = jnp.concatenate([nibbles & 15, nibbles >> 4], axis=3).astype(jnp.int32).reshape(tiles, -1, GROUP // 4, LANES, 4)
        if bits > 4:  # then the bits above: one or two of every quad, the first quad's lowest
            shifts = jnp.arange(0, 8, bits - 4, dtype=jnp.uint8).reshape(1, 1, 1, -1, 1, 1)
            above = (codes[:, :, 4:, None] >> shifts) & ((1 << (bits - 4)) - 1)
            quads = quads + (above.reshape(quads.shape).astype(jnp.int32) << 4)
        quads = quads - ((1 << (bits - 1)) if w.kind == "symmetric" else 0)
    values = quads.astype(jnp.float32).reshape(tiles, -1, halves, group // 4, LANES, 4)
    numbers = _floats(blocks[..., code_bytes:], w.dtype).reshape(tiles, blocks.shape[1], -1, halves, 1, LANES, 1)
    values = values * numbers[:, :, 0]
    if w.kind == "affine":
        values = values + numbers[:, :, 1]
    dense = values.reshape(tiles, -1, LANES, 4).transpose(0, 2, 1, 3).reshape(tiles * LANES, -1)
    return dense[:outputs, :inputs]


def split_tiles(w: Tiled, shards: int, axis: int) -> Tiled:
    """A weight cut into equal parts along an axis, the parts' tiles one after the other; ``shape`` is that of one part.

    Raises InvalidRequest when a part would not consist of whole tiles or blocks.
    """
    unit = LANES if axis == 0 else GROUP if w.group else 2
    if w.shape[axis] % (unit * shards):
        raise InvalidRequest(f"a weight of shape {list(w.shape)} cannot be cut into {shards} parts of whole {unit}s along axis {axis}")
    shape = (w.shape[0] // shards, w.shape[1]) if axis == 0 else (w.shape[0], w.shape[1] // shards)
    data = w.tiles
    if axis == 1:
        tiles, size = data.shape
        data = data.reshape(tiles, shards, size // shards).swapaxes(0, 1).reshape(tiles * shards, size // shards)
    return dataclasses.replace(w, data=data, shape=shape, offset=0)


def take_rows(w: Tiled, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of a weight [O, K] at ids [T], dequantised: [T, K]. Ids outside are clamped."""
    native.get()
    out = jax.ShapeDtypeStruct((*ids.shape, w.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("tars_take_rows", out, vmap_method="sequential")
    return call(w.data, ids.astype(jnp.int32), format=np.array((*w.format, w.offset, 0), np.int64)).astype(dtype)


def _describe(w: Packable) -> Tiled:
    """A `Tiled` with everything but the data."""
    if not can_pack(w):
        raise ValueError(f"cannot tile a weight of type {type(w).__name__}, shape {getattr(w, 'shape', None)}")
    outputs, inputs = w.shape
    nothing: Any = np.empty(0, np.uint8)
    if isinstance(w, QArray | Groups):
        kind: Kind = "symmetric" if w.mins is None else "affine"
        return Tiled(nothing, (int(outputs), int(inputs)), kind, w.bits, w.group, str(w.scales.dtype))
    dtype = str(w.dtype)
    return Tiled(nothing, (int(outputs), int(inputs)), "dense", 32 if dtype == "float32" else 16, 0, dtype)


def _untile_dense(w: Tiled) -> jax.Array:
    values = _floats(jnp.asarray(w.tiles), w.dtype)
    values = values.reshape(values.shape[0], -1, 2 * LANES)
    if w.dtype == "bfloat16":  # pairs of inputs per output
        values = values.reshape(*values.shape[:2], LANES, 2).swapaxes(2, 3)
    return values.reshape(values.shape[0], -1, LANES).swapaxes(1, 2).reshape(values.shape[0] * LANES, -1)


def _floats(raw: jax.Array, dtype: str) -> jax.Array:
    """The numbers in the last axis's bytes, as float32."""
    kind = jnp.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    grouped = raw.reshape(*raw.shape[:-1], -1, kind.itemsize)
    return jax.lax.bitcast_convert_type(grouped, kind).astype(jnp.float32)


def _layout(format: Format) -> tuple[int, int]:
    """Tiles of a matrix and bytes of each."""
    _, group, _, _, outputs, inputs = format
    return math.ceil(outputs / LANES), math.ceil(inputs / (GROUP if group else 2)) * _block_bytes(format)


def _block_bytes(format: Format) -> int:
    bits, group, affine, dtype, _, _ = format
    size = 4 if dtype == DTYPES["float32"] else 2
    if not group:
        return 2 * LANES * size
    return LANES * GROUP * bits // 8 + LANES * (GROUP // group) * size * (1 + affine)


def tiles_nbytes(shape: tuple[int, ...], bits: int, group: int, affine: bool, item_bytes: int) -> int:
    """Bytes of a matrix [O, K] in tiles; ``item_bytes``: of a scale, or of an element when dense (group 0)."""
    outputs, inputs = shape
    tiles, size = _layout((bits, group, int(affine), DTYPES["float32" if item_bytes == 4 else "float16"], outputs, inputs))
    return tiles * size


def _aligned(size: int) -> np.ndarray:
    raw = np.empty(size + ALIGNMENT, np.uint8)
    return raw[-raw.ctypes.data % ALIGNMENT :][:size]
