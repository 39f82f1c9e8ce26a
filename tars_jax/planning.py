"""What a model takes of a device's memory, known before anything is loaded: weights, KV cache and activations, and what fits.

Weights are counted on the tree of `model.spec`, split as `sharding` splits it and stored as the loaders store it, to the byte. A cache
takes keys and values of every layer for each token. Activations are an estimate from above of what a step needs beside them.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from tars_jax import memory, sharding
from tars_jax.cache import SCALE_BYTES
from tars_jax.config import EngineConfig, ModelConfig
from tars_jax.errors import NotEnoughMemory
from tars_jax.kernels import tiles_nbytes
from tars_jax.model import ArraySpec, leaf_name, spec

DEFAULT_CONTEXT = 4096  # tokens of one request, where nobody asks for more
USABLE = 0.9  # of a GPU: the rest is the driver's, the collectives' and lost between blocks (vLLM's default)
# Python, JAX and compiled steps: 260 MB of anonymous memory were measured beside weights and cache with four steps compiled.
RUNTIME = 256 << 20
CACHE_DTYPES: Mapping[str, tuple[int, int]] = {  # bytes of a number, and of a head's vector beside them
    "float16": (2, 0),
    "bfloat16": (2, 0),
    "float32": (4, 0),
    "int8": (1, SCALE_BYTES),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a matrix lies in memory: as it is, in groups with scales (`quant.QArray`), or in the kernels' tiles (`kernels.Tiled`)."""

    bits: int  # of a weight
    group: int = 0  # weights that share a scale; 0: none do
    affine: bool = False  # groups have a minimum too
    scale_bits: int = 16
    tiled: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix [O, K]."""
        if self.tiled:
            wide = self.scale_bits == 32 if self.group else self.bits == 32
            return tiles_nbytes(shape, self.bits, self.group, self.affine, 4 if wide else 2)
        weights = math.prod(shape)
        scales = weights // self.group * self.scale_bits * (1 + self.affine) if self.group else 0
        return (weights * self.bits + scales) // 8


Stored = Storage | Mapping[str, Storage]  # one for all matrices, or by canonical name


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device."""

    weights: int
    cache_per_token: int
    activations: int
    runtime: int = 0

    def total(self, tokens: int) -> int:
        """With a cache of that many tokens."""
        return self.weights + self.cache_per_token * tokens + self.activations + self.runtime

    def room(self, free: int) -> int:
        """Tokens of cache that ``free`` bytes leave room for; negative when not even the rest fits."""
        return (free - self.total(0)) // self.cache_per_token


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a model; a tied embedding counts once."""
    return sum(math.prod(leaf.shape) for _, leaf in _leaves(config))


def weights_nbytes(config: ModelConfig, stored: Stored, shards: int = 1) -> int:
    """Bytes of the weights on each of ``shards`` devices. Raises InvalidRequest when the model cannot be split so."""
    sharding.local_config(config, shards)
    total = 0
    for name, leaf in _leaves(config):
        shape = tuple(size // shards if axis in sharding.RULES else size for size, axis in zip(leaf.shape, leaf.axes, strict=True))
        storage = stored if isinstance(stored, Storage) else stored[name]
        total += storage.nbytes(shape) if len(shape) == 2 else 4 * math.prod(shape)  # vectors are float32
    return total


def expanded_nbytes(config: ModelConfig, stored: Stored) -> int:
    """Bytes of float32 that XLA on a CPU needs beside matrices in groups which are not in tiles: it expands all of them before it
    multiplies by the first (as its memory analysis shows)."""
    names = {name: leaf for name, leaf in _leaves(config) if len(leaf.shape) == 2}
    kept = {name: stored if isinstance(stored, Storage) else stored[name] for name in names}
    return sum(4 * math.prod(leaf.shape) for name, leaf in names.items() if kept[name].group and not kept[name].tiled)


def cache_nbytes_per_token(config: ModelConfig, dtype: str, shards: int = 1) -> int:
    """Bytes of one token's keys and values in all layers, on each device."""
    number, vector = CACHE_DTYPES[dtype]
    return 2 * config.num_layers * (config.num_kv_heads // shards) * (config.head_dim * number + vector)


def activations_nbytes(config: ModelConfig, engine: EngineConfig, shards: int = 1) -> int:
    """Bytes that the largest step needs for a while, and the rows' token histories. Everything counts as float32: products of
    smaller types are accumulated so. Blocks and sampling follow each other, so the larger one counts; sampling holds ten arrays of
    logits at a time (as XLA reports it)."""
    local = sharding.local_config(config, shards)
    queries, keys = local.num_heads * config.head_dim, local.num_kv_heads * config.head_dim
    block = engine.max_step_tokens * (
        4 * config.hidden_size + 2 * config.head_dim + max(2 * local.intermediate_size, 3 * queries + 2 * keys)
    )
    sampling = 10 * min(engine.max_rows, engine.max_step_tokens) * config.vocab_size
    return 4 * (max(block, sampling) + engine.max_rows * served_context(config, engine))


def make_plan(config: ModelConfig, engine: EngineConfig, weights: int, *, runtime: int = 0, draft: ModelConfig | None = None) -> MemoryPlan:
    """The plan of a model whose weights take that many bytes on each device. A ``draft`` model has its keys and values in the same
    pages."""
    shards = engine.tensor_parallel  # the type that an engine chooses itself has 16 bits
    caches = [cache_nbytes_per_token(model, engine.cache_dtype or "float16", shards) for model in (config, draft) if model]
    return MemoryPlan(
        weights=weights,
        cache_per_token=sum(caches),
        activations=activations_nbytes(config, engine, shards),
        runtime=runtime,
    )


def served_context(config: ModelConfig, engine: EngineConfig) -> int:
    """Tokens of one request, prompt and answer: what is asked for, or `DEFAULT_CONTEXT`, as far as the model goes."""
    return min(engine.max_context or DEFAULT_CONTEXT, config.context_length)


def min_pool(context: int) -> int:
    """Tokens a cache should hold whatever the number of rows, so that chats come back to their prefix."""
    return max(2 * context, 8192)


def pool_tokens(plan: MemoryPlan, engine: EngineConfig, context: int, free: int, *, for_all_rows: bool, share: float) -> int:
    """Tokens of the KV cache: enough for every row to fill its context if ``for_all_rows``, else `min_pool`, as far as a ``share`` of
    the memory that is left beside weights and activations goes.

    Raises NotEnoughMemory when one context does not fit.
    """
    check(plan, context, free)
    wanted = max(engine.max_rows * context if for_all_rows else 0, min_pool(context))
    there = int(plan.room(free) * share)
    step = 1 << max(there.bit_length() - 4, 0)  # coarse, so that programs compiled for this size are found again the next time
    return max(min(wanted, there // step * step), context)


def check(plan: MemoryPlan, tokens: int, free: int) -> None:
    """Raise NotEnoughMemory when a plan with a cache of so many tokens takes more than ``free`` bytes."""
    needed = plan.total(tokens)
    if needed <= free:
        return
    parts = [("weights", plan.weights), (f"a KV cache of {tokens} tokens", plan.cache_per_token * tokens)]
    parts += [("activations", plan.activations), ("the process itself", plan.runtime)]
    listed = ", ".join(f"{label} {memory.show(size)}" for label, size in parts if size)
    raise NotEnoughMemory(
        f"model requires more system memory ({memory.show(needed)}) than is available ({memory.show(free)}): {listed}; "
        "take a smaller model or quantisation, lower num_ctx, or free memory"
    )


def free_device_bytes(devices: int = 1) -> int:
    """Bytes that can still be allocated on each device: what is left to JAX on a GPU, a share of the machine's memory on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return memory.free_bytes() // devices


def _leaves(config: ModelConfig) -> list[tuple[str, ArraySpec]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(spec(config))[0]]
