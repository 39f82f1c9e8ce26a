"""ggml tensor types: one table, and one form that every quantised type decodes to without loss.

A quantised weight of any ggml type equals ``code * scale (+ min)`` with an int8 code and one scale for each group of 16 or 32
weights along the last axis. `Blocks` gives exactly these integers and floats, so reading a model and packing it again
start from the same numbers.

Source of the layouts: llama.cpp ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` (MIT licence). All of it is little endian.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

import ml_dtypes
import numpy as np

from tars_jax.errors import ModelFileError
from tars_jax.loaders import codebooks
from tars_jax.loaders.codebooks import Scales, fields, half, part, single, spread

_CHUNK_WEIGHTS = 1 << 16  # decoded at a time: temporaries stay in the L2 cache, whatever the tensor's size


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A ggml tensor type. Dense types have a ``dtype``, quantised ones an ``unpack`` with the form it gives."""

    name: str
    block_size: int  # weights
    type_size: int  # bytes of a block
    dtype: np.dtype | None = None
    unpack: Callable[[np.ndarray, np.ndarray], Scales] | None = None  # see codebooks for the contract
    group: int = 32
    bits: int = 8
    affine: bool = False  # has mins
    scale_dtype: type[np.float16] | type[np.float32] = np.float32
    codes_at: int = 0  # in a block that is one group: its scale, its minimum, then its codes as they are, see `Blocks.views`


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A quantised tensor: value[..., k] = codes[..., k] * scales[..., k // group] (+ mins[..., k // group]), decoded when asked for."""

    kind: BlockType
    data: np.ndarray  # uint8 [..., blocks, type_size], as in the file

    @property
    def group(self) -> int:
        """16 or 32 weights."""
        return self.kind.group

    @property
    def bits(self) -> int:
        """What a code needs, 4, 5, 6 or 8; below 8 codes are 0..2^bits - 1 with mins, else signed."""
        return self.kind.bits

    @property
    def codes(self) -> np.ndarray:
        """int8 [..., K]."""
        return self._decoded[0]

    @property
    def scales(self) -> np.ndarray:
        """[..., K // group]; float16 where the file holds these very numbers, else float32."""
        return self._decoded[1]

    @property
    def mins(self) -> np.ndarray | None:
        """Added; dtype and shape of scales."""
        return self._decoded[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return (*self.data.shape[:-2], self.data.shape[-2] * self.kind.block_size)

    def rows(self, index: np.ndarray) -> "Blocks":
        """The entries ``index`` (integers) of the first axis, in that order."""
        return dataclasses.replace(self, data=self.data[index])

    def dequantize(self) -> np.ndarray:
        """The weights, float32 [..., K]; rounded once where there are mins or a long product, as ggml does it."""
        with np.errstate(all="ignore"):  # infinite or NaN scales in a file give such weights, not warnings
            weights = self.codes.astype(np.float32).reshape(*self.scales.shape, self.group)
            weights *= self.scales[..., None].astype(np.float32)
            if self.mins is not None:
                weights += self.mins[..., None].astype(np.float32)
        return weights.reshape(self.shape)

    def views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """Codes, two a byte if they have 4 bits, uint8 [..., groups, bytes], and float16 scales and mins [..., groups], where they lie;
        None for a type whose blocks are no single groups of these."""
        at = self.kind.codes_at
        if not at:
            return None
        numbers = self.data[..., :at].view(np.dtype("<f2"))
        return self.data[..., at:], numbers[..., 0], numbers[..., 1] if self.kind.affine else None

    @cached_property
    def _decoded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        kind, blocks = self.kind, self.data.reshape(-1, self.kind.type_size)
        assert kind.unpack is not None
        codes = np.empty((len(blocks), kind.block_size), np.int8)
        scales = np.empty((len(blocks), kind.block_size // kind.group), kind.scale_dtype)
        mins = np.empty_like(scales) if kind.affine else None
        step = _CHUNK_WEIGHTS // kind.block_size
        with np.errstate(all="ignore"):  # infinite or NaN scales in a file are values like others
            for start in range(0, len(blocks), step):
                chunk = slice(start, start + step)
                scales[chunk], offsets = kind.unpack(blocks[chunk], codes[chunk])
                if mins is not None:
                    mins[chunk] = offsets
        groups = (*self.shape[:-1], self.shape[-1] // kind.group)
        return codes.reshape(self.shape), scales.reshape(groups), None if mins is None else mins.reshape(groups)


def _q4_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 2:], 16, 4, codes)
    codes -= 8
    return half(blocks, 0), None


def _q4_1(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 4:], 16, 4, codes)
    return half(blocks, 0), half(blocks, 2)


def _q5_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 6:], 16, 4, codes)
    codes |= fields(blocks[:, 2:6], 1, 1).view(np.int8) << 4
    codes -= 16
    return half(blocks, 0), None


def _q5_1(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 8:], 16, 4, codes)
    codes |= fields(blocks[:, 4:8], 1, 1).view(np.int8) << 4
    return half(blocks, 0), half(blocks, 2)


def _q8_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    codes[...] = blocks[:, 2:].view(np.int8)
    return half(blocks, 0), None


def _q1_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 2:], 1, 1, codes)
    codes += codes
    codes -= 1
    return half(blocks, 0), None


def _q2_k(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 16:80], 32, 2, codes)
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return single(blocks, 80) * scales, -(single(blocks, 82) * mins)


def _q3_k(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 32:96], 32, 2, codes)
    codes |= fields(blocks[:, :32], 32, 1).view(np.int8) << 2
    codes -= 4
    scales = fields(blocks[:, 96:104], 8, 4) | fields(blocks[:, 104:108], 4, 2) << 4
    return single(blocks, 108) * (scales.astype(np.float32) - 32), None


def _scales_and_mins(blocks: np.ndarray) -> Scales:
    """Q4_K's and Q5_K's head: two float16, then eight 6-bit scales and eight 6-bit mins in 12 bytes."""
    low, low_mins, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, rest & 15 | low >> 2 & 48], axis=1)
    mins = np.concatenate([low_mins & 63, rest >> 4 | low_mins >> 2 & 48], axis=1)
    return single(blocks, 0) * scales, -(single(blocks, 2) * mins)


def _q4_k(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 16:], 32, 4, codes)
    return _scales_and_mins(blocks)


def _q5_k(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 48:], 32, 4, codes)
    codes |= fields(blocks[:, 16:48], 32, 1).view(np.int8) << 4
    return _scales_and_mins(blocks)


def _q6_k(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, :128], 64, 4, codes)
    codes |= fields(blocks[:, 128:192], 32, 2).view(np.int8) << 4
    codes -= 32
    return single(blocks, 208) * part(blocks, 192, 16, "i1"), None


def _tq1_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    """Five ternary digits a byte (four in the last four bytes), stored as a fraction of 256: times 3^k, the next digit is on top."""
    for first, width, digits, start in ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)):
        packed = blocks[:, first : first + width]
        for digit in range(digits):
            at = start + digit * width
            codes[:, at : at + width] = (packed * np.uint8(3**digit)).astype(np.uint16) * 3 >> 8
    codes -= 1
    return half(blocks, 52), None


def _tq2_0(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, :64], 32, 2, codes)
    codes -= 1
    return half(blocks, 64), None


def _dense(name: str, dtype: np.dtype) -> BlockType:
    return BlockType(name, 1, dtype.itemsize, dtype=dtype)


_HALF = np.float16
TYPES: dict[int, BlockType] = {
    0: _dense("F32", np.dtype("<f4")),
    1: _dense("F16", np.dtype("<f2")),
    2: BlockType("Q4_0", 32, 18, unpack=_q4_0, bits=4, scale_dtype=_HALF, codes_at=2),
    3: BlockType("Q4_1", 32, 20, unpack=_q4_1, bits=4, affine=True, scale_dtype=_HALF, codes_at=4),
    6: BlockType("Q5_0", 32, 22, unpack=_q5_0, bits=5, scale_dtype=_HALF),
    7: BlockType("Q5_1", 32, 24, unpack=_q5_1, bits=5, affine=True, scale_dtype=_HALF),
    8: BlockType("Q8_0", 32, 34, unpack=_q8_0, scale_dtype=_HALF, codes_at=2),
    10: BlockType("Q2_K", 256, 84, unpack=_q2_k, group=16, bits=4, affine=True),
    11: BlockType("Q3_K", 256, 110, unpack=_q3_k, group=16, bits=4),
    12: BlockType("Q4_K", 256, 144, unpack=_q4_k, bits=4, affine=True),
    13: BlockType("Q5_K", 256, 176, unpack=_q5_k, bits=5, affine=True),
    14: BlockType("Q6_K", 256, 210, unpack=_q6_k, group=16, bits=6),
    16: BlockType("IQ2_XXS", 256, 66, unpack=codebooks.iq2_xxs),
    17: BlockType("IQ2_XS", 256, 74, unpack=codebooks.iq2_xs, group=16),
    18: BlockType("IQ3_XXS", 256, 98, unpack=codebooks.iq3_xxs),
    19: BlockType("IQ1_S", 256, 50, unpack=codebooks.iq1_s),
    20: BlockType("IQ4_NL", 32, 18, unpack=codebooks.iq4_nl, scale_dtype=_HALF),
    21: BlockType("IQ3_S", 256, 110, unpack=codebooks.iq3_s),
    22: BlockType("IQ2_S", 256, 82, unpack=codebooks.iq2_s, group=16),
    23: BlockType("IQ4_XS", 256, 136, unpack=codebooks.iq4_xs),
    24: _dense("I8", np.dtype("i1")),
    25: _dense("I16", np.dtype("<i2")),
    26: _dense("I32", np.dtype("<i4")),
    27: _dense("I64", np.dtype("<i8")),
    28: _dense("F64", np.dtype("<f8")),
    29: BlockType("IQ1_M", 256, 56, unpack=codebooks.iq1_m, group=16),
    30: _dense("BF16", np.dtype(ml_dtypes.bfloat16)),
    34: BlockType("TQ1_0", 256, 54, unpack=_tq1_0, bits=4, scale_dtype=_HALF),
    35: BlockType("TQ2_0", 256, 66, unpack=_tq2_0, bits=4, scale_dtype=_HALF),
    39: BlockType("MXFP4", 32, 17, unpack=codebooks.mxfp4),
    40: BlockType("NVFP4", 64, 36, unpack=codebooks.nvfp4, group=16),
    41: BlockType("Q1_0", 128, 18, unpack=_q1_0, bits=4, scale_dtype=_HALF),
}


def data_size(type_id: int, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this ggml type and row-major shape takes.

    Raises ModelFileError (without the file's name) for an unknown type or rows that are not whole blocks.
    """
    kind = TYPES.get(type_id)
    if kind is None:
        raise ModelFileError(f"unknown ggml tensor type {type_id}; use a file in another quantisation")
    row = shape[-1] if shape else 1
    if row % kind.block_size:
        raise ModelFileError(f"rows of {row} weights are not whole {kind.name} blocks of {kind.block_size}")
    return math.prod(shape) // kind.block_size * kind.type_size


def decode(type_id: int, raw: np.ndarray, shape: tuple[int, ...]) -> Blocks | np.ndarray:
    """Decodes a tensor's bytes.

    raw: uint8, the tensor's bytes; shape: row-major, any number of axes. Dense types give a view of ``raw`` (BF16 as
    ml_dtypes.bfloat16), quantised types give ``Blocks``. Raises ModelFileError where bytes, type and shape do not fit.
    """
    expected = data_size(type_id, shape)
    kind = TYPES[type_id]
    if raw.size != expected:
        raise ModelFileError(f"a {kind.name} tensor of shape {shape} takes {expected} bytes, but {raw.size} were given")
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    if kind.dtype is not None:
        return flat.view(kind.dtype).reshape(shape)
    return Blocks(kind, flat.reshape(*shape[:-1], shape[-1] // kind.block_size, kind.type_size))
