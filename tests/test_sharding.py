"""One model over several devices computes what it computes on one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tars_jax import kernels, sharding
from tars_jax.adapters import steer
from tars_jax.cache import KVCache, RaggedBatch, init_cache
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.model import forward, init
from tars_jax.quant import pack

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    context_length=64,
    tie_embeddings=True,
    out_bias=True,
    qkv_bias=True,
)
PAGES, PAGE = 5, 16


def ragged() -> RaggedBatch:
    """Two rows: 9 tokens and 3."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 16).astype(np.int32)
    positions = np.array([*range(9), *range(3), -1, -1, -1, -1], np.int32)
    arrays = ids, positions, np.array([0, 9, 12], np.int32), np.array([9, 3], np.int32), np.array([[1, 2], [3, 4]], np.int32)
    return RaggedBatch(*map(jnp.asarray, arrays))


def weights(form: str) -> Any:
    """Random parameters whose biases are not zero."""
    params = jax.tree.map(lambda x: x if x.ndim > 1 else x + 0.1, init(jax.random.key(0), CONFIG))
    if form == "steered":
        return steer(params, {1: jnp.ones(CONFIG.hidden_size)})

    def convert(leaf: Any) -> Any:
        if leaf.ndim < 2 or form == "dense":
            return leaf
        if form == "tiled dense":
            return jax.tree.map(jnp.asarray, kernels.pack_tiles(leaf))
        codes = np.clip(np.round(np.asarray(leaf) * 40), -8, 7).astype(np.int8)
        scales = np.full((leaf.shape[0], leaf.shape[1] // 32), 1 / 40, np.float16)
        packed = pack(codes, scales, None, bits=4, group=32)
        return jax.tree.map(jnp.asarray, kernels.pack_tiles(packed) if form == "tiled" else packed)

    return jax.tree.map(convert, params)


@pytest.mark.parametrize("form", ["dense", "packed", "tiled", "tiled dense", "steered"])
def test_two_devices_compute_what_one_does(form: str) -> None:
    if form.startswith("tiled") and not kernels.available():
        pytest.skip("no CPU kernels here")
    params, batch, mesh = weights(form), ragged(), sharding.make_mesh(2)
    cache = init_cache(CONFIG, PAGES, PAGE, jnp.dtype("float32"))
    expected, _ = jax.jit(lambda p, b, c: forward(p, CONFIG, b, c, context=64, dtype=jnp.dtype("float32")))(params, batch, cache)

    @jax.jit
    def run(params: Any, batch: RaggedBatch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return sharding.sharded_forward(params, CONFIG, batch, cache, mesh, context=64, dtype=jnp.dtype("float32"))

    found, _ = run(sharding.shard(params, CONFIG, mesh), batch, jax.device_put(cache, NamedSharding(mesh, sharding.CACHE)))
    # 8-bit activations: the groups are the same, but a sum's last bit may turn a code
    np.testing.assert_allclose(found[:12], expected[:12], atol=0.02 if form == "tiled" else 2e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_cut_weight_holds_the_parts(axis: int) -> None:
    if not kernels.available():
        pytest.skip("no CPU kernels here")
    matrix = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    cut = kernels.split_tiles(kernels.pack_tiles(matrix), 2, axis)
    parts = [kernels.untile(dataclasses.replace(cut, data=data)) for data in np.split(np.asarray(cut.data), 2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis), matrix)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="num_kv_heads of 2 cannot be split over 4"):
        sharding.local_config(CONFIG, 4)
    with pytest.raises(InvalidRequest, match="there are 8"):
        sharding.make_mesh(9)
