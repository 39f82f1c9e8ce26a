"""From tensors in a file to the parameter tree: names matched, shapes checked, weights packed or made dense."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.config import ModelConfig
from tars_jax.kernels import DTYPES, Arena, Groups, can_pack
from tars_jax.loaders.blocks import Blocks, BlockType
from tars_jax.loaders.names import canonical, refuse
from tars_jax.model import Decoder, leaf_name, spec
from tars_jax.planning import Storage
from tars_jax.quant import QArray, pack

ReadTensor = Callable[[str, str], np.ndarray | Blocks]  # (name in the file, canonical name) -> value
WeightForm = Literal["tiled", "packed", "dense"]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def build_params(
    config: ModelConfig,
    table: Mapping[str, str],
    sizes: Mapping[str, int],
    read: ReadTensor,
    *,
    source: str,
    form: WeightForm,
    dtype: str,
    storage: Mapping[str, Storage] | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Parameters of a model. ``sizes``: bytes of every tensor in the file; ``source`` names it in errors; ``storage``: what `stored` says
    of them, for the form "tiled".

    form "tiled" lays matrices out for the CPU kernels, "packed" keeps quantised ones as `QArray`, "dense" makes every matrix
    an array of ``dtype``. Vectors are float32. Raises ModelFileError that reports all faults together.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(spec(config))
    expected = {leaf_name(path): leaf.shape for path, leaf in paths}
    names = canonical(sizes, table, expected, source)
    faults: list[str] = []
    kept = {leaf: storage[leaf].nbytes(shape) for leaf, shape in expected.items() if len(shape) == 2} if storage else {}
    arena = Arena(kept)

    def load(leaf: str) -> Any:
        value = read(names[leaf], leaf)
        if value.shape != expected[leaf]:
            faults.append(f"{names[leaf]} has shape {list(value.shape)}, expected {list(expected[leaf])}")
            return None
        return _to_weight(value, form, dtype, lambda w: arena.pack(leaf, w))

    leaves, done, total = [], 0, sum(sizes[name] for name in names.values())
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # numpy and the packer release the interpreter's lock
        for leaf, weight in zip(expected, pool.map(load, expected), strict=True):
            leaves.append(weight)
            done += sizes[names[leaf]]
            if progress:
                progress(done, total)
    refuse(faults, source)
    params: Decoder = arena.finish(jax.tree.unflatten(tree, leaves))
    return params


def stored(
    config: ModelConfig, table: Mapping[str, str], types: Mapping[str, BlockType], *, source: str, form: WeightForm, dtype: str
) -> dict[str, Storage]:
    """How `build_params` will keep each parameter, by canonical name. ``types``: of every tensor in the file."""
    expected = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(spec(config))[0]}
    return {leaf: stored_as(types[name], form, dtype) for leaf, name in canonical(types, table, expected, source).items()}


def stored_as(kind: BlockType, form: WeightForm, dtype: str) -> Storage:
    """How `build_params` keeps a matrix of this type."""
    if kind.dtype is None and form != "dense":
        scale_bits = 8 * np.dtype(kind.scale_dtype).itemsize
        bits = kind.bits if form == "tiled" or kind.bits == 4 else 8  # a `QArray` holds 5 and 6 bits in a byte
        return Storage(bits, kind.group, kind.affine, scale_bits, tiled=form == "tiled")
    if form == "tiled" and kind.dtype is not None and kind.dtype.name in DTYPES:
        return Storage(8 * kind.dtype.itemsize, tiled=True)
    return Storage(8 * jnp.dtype(dtype).itemsize)


def _to_weight(value: np.ndarray | Blocks, form: WeightForm, dtype: str, tile: Callable[[Any], Any]) -> Any:
    if len(value.shape) == 2:
        if form == "tiled" and can_pack(weight := _packable(value)):
            return tile(weight)
        if form == "packed" and isinstance(value, Blocks):
            return jax.tree.map(jax.device_put, _quantised(value))
    dense = value.dequantize() if isinstance(value, Blocks) else value
    # A copy: jax would otherwise keep the file's map, and with it the whole file, in memory for a norm's sake. By numpy: jax would compile.
    return jax.device_put(np.array(dense, np.float32 if dense.ndim < 2 else jnp.dtype(dtype)))


def _packable(value: np.ndarray | Blocks) -> np.ndarray | Groups | QArray:
    """What the packer of tiles reads: the file itself where it can."""
    if not isinstance(value, Blocks):
        return value
    views = value.views()
    return Groups(*views, value.bits, value.group) if views else _quantised(value)


def _quantised(value: Blocks) -> QArray:
    return pack(value.codes, value.scales, value.mins, bits=value.bits, group=value.group)
