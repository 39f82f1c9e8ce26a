"""Tensor parallelism: each device of a mesh holds some heads and some of the feed-forward, and sums are taken across it.

The parameters' logical axes (`model.spec`) decide what is split; the forward pass itself runs unchanged in a `shard_map`, so that
kernels see ordinary local arrays (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053: column-parallel into a block, row-parallel out).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tars_jax.cache import KVCache, RaggedBatch
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.kernels import Tiled, split_tiles
from tars_jax.model import ArraySpec, Decoder, forward, leaf_name, spec
from tars_jax.quant import LowRank, QArray

AXIS = "model"
RULES: Mapping[str, str] = {"heads": AXIS, "kv_heads": AXIS, "mlp": AXIS}  # logical axes that are split; all others are whole everywhere
CACHE = PartitionSpec(None, AXIS)  # of [pages, KV heads, page, head_dim]


def make_mesh(devices: int) -> Mesh:
    """A line of this many devices. Raises InvalidRequest when there are fewer."""
    if devices > len(jax.devices()):
        raise InvalidRequest(f"tensor parallelism over {devices} devices was asked for, but there are {len(jax.devices())}")
    return jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])


def local_config(config: ModelConfig, shards: int) -> ModelConfig:
    """The model as one device sees it. Raises InvalidRequest when heads or feed-forward do not divide."""
    for field in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, field) % shards:
            raise InvalidRequest(f"the model's {field} of {getattr(config, field)} cannot be split over {shards} devices")
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // shards,
        num_kv_heads=config.num_kv_heads // shards,
        intermediate_size=config.intermediate_size // shards,
    )


def partition(leaf: ArraySpec) -> PartitionSpec:
    """How an array of these logical axes is split."""
    return PartitionSpec(*(RULES.get(axis) for axis in leaf.axes))


def partitions(params: Decoder, config: ModelConfig) -> Decoder:
    """How each array of these parameters is split: the same tree with a `PartitionSpec` in the place of every array."""
    wanted = {leaf_name(path): partition(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(spec(config))[0]}

    def arrays(path: tuple[Any, ...], leaf: Any) -> Any:
        split = wanted.get(leaf_name(path), PartitionSpec())  # a bias that steers is the model's own in no configuration
        if isinstance(leaf, Tiled):  # the device's own tiles stand together, whichever axis of the matrix was cut
            split = PartitionSpec(AXIS) if AXIS in split else PartitionSpec()
        return jax.tree.map(lambda _: split, leaf)

    return jax.tree_util.tree_map_with_path(arrays, params, is_leaf=_is_weight)


def shard(params: Decoder, config: ModelConfig, mesh: Mesh) -> Decoder:
    """The parameters on the mesh's devices. A `Tiled` weight keeps its layout: its ``shape`` becomes that of one device's part.

    Raises InvalidRequest for what does not divide, and for adapters.
    """
    local_config(config, mesh.size)
    wanted = {leaf_name(path): partition(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(spec(config))[0]}

    def cut(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            raise InvalidRequest("a model with adapters cannot be split over devices")
        split = wanted.get(leaf_name(path), PartitionSpec())
        if not isinstance(leaf, Tiled):
            return leaf
        if AXIS not in split:
            return dataclasses.replace(leaf, data=leaf.tiles, offset=0)
        return split_tiles(leaf, mesh.size, axis=split.index(AXIS))

    params = jax.tree_util.tree_map_with_path(cut, params, is_leaf=_is_weight)
    return jax.tree.map(lambda array, split: jax.device_put(array, NamedSharding(mesh, split)), params, partitions(params, config))


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Tiled | QArray | LowRank)


def sharded_forward(
    params: Decoder, config: ModelConfig, batch: RaggedBatch, cache: KVCache, mesh: Mesh, *, context: int, dtype: jnp.dtype
) -> tuple[jax.Array, KVCache]:
    """`model.forward` on parameters of `shard` and a cache split by KV heads; the states come back whole on every device."""
    local = local_config(config, mesh.size)

    def run(params: Decoder, batch: RaggedBatch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return forward(params, local, batch, cache, context=context, dtype=dtype, axis=AXIS)

    specs, whole = partitions(params, config), PartitionSpec()
    return jax.shard_map(run, mesh=mesh, in_specs=(specs, whole, CACHE), out_specs=(whole, CACHE), check_vma=False)(params, batch, cache)
