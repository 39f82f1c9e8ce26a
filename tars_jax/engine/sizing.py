"""How large an engine's cache may be, on this machine and now."""

import dataclasses
from typing import Literal

import jax

from tars_jax import kernels, planning
from tars_jax.config import EngineConfig
from tars_jax.errors import InvalidRequest
from tars_jax.loaders.loaded import Model


def resolve(config: EngineConfig, model: Model, draft: Model | None = None) -> EngineConfig:
    """Fill in what the configuration leaves to the model and to the memory that is free.

    Raises InvalidRequest for what cannot be, NotEnoughMemory where one request's context does not fit.
    """
    context = planning.served_context(model.config, config)
    config = dataclasses.replace(config, max_context=context, cache_dtype=config.cache_dtype or cache_dtype_of(config))
    if 0 < config.cache_tokens < context:
        raise InvalidRequest(
            f"a cache of {config.cache_tokens} tokens cannot hold one request of {context}; raise cache_tokens or lower max_context"
        )
    on_cpu = jax.default_backend() == "cpu"
    plan = planning.make_plan(model.config, config, weights=0, draft=draft.config if draft else None)  # weights are there already
    free = planning.free_device_bytes(config.tensor_parallel)
    tokens = config.cache_tokens
    if tokens:
        planning.check(plan, tokens, free)
    else:  # the kernels' cache takes memory only as it is written; a CPU's memory belongs to others too
        is_lazy = kernels.available() and config.tensor_parallel == 1
        for_all_rows, share = not on_cpu or is_lazy, 0.5 if on_cpu else planning.USABLE
        tokens = planning.pool_tokens(plan, config, context, free, for_all_rows=for_all_rows, share=share)
    kept = config.kept_tokens or (planning.min_pool(context) if on_cpu else tokens)
    return dataclasses.replace(config, cache_tokens=tokens, kept_tokens=kept)


def cache_dtype_of(config: EngineConfig) -> Literal["bfloat16", "float16"]:
    """16 bits: what attention multiplies fastest; where it is all the same, what is more exact."""
    has_kernels = jax.default_backend() == "cpu" and config.tensor_parallel == 1 and kernels.available()
    return "bfloat16" if has_kernels and kernels.multiplies_bf16() else "float16"
