"""Kernels for the CPU: C++ behind XLA custom calls, over weights packed in tiles.

They are optional. Where `available` is False (no C++ compiler and no prebuilt library), the plain functions in ops.py and
attention.py do the same, slower.
"""

from tars_jax.kernels.calls import Block, attention, blocks, empty, gated, linear_add, norm_linear, rope_write
from tars_jax.kernels.native import available, isa, multiplies_bf16, unavailable_reason
from tars_jax.kernels.tiled import DTYPES, Arena, Groups, Tiled, can_pack, pack_tiles, split_tiles, take_rows, tiles_nbytes, untile

__all__ = [
    "DTYPES",
    "Arena",
    "Block",
    "Groups",
    "Tiled",
    "attention",
    "available",
    "blocks",
    "can_pack",
    "empty",
    "gated",
    "isa",
    "linear_add",
    "multiplies_bf16",
    "norm_linear",
    "pack_tiles",
    "rope_write",
    "split_tiles",
    "take_rows",
    "tiles_nbytes",
    "unavailable_reason",
    "untile",
]
