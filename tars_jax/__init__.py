"""TARS: an AI inference engine on JAX/XLA.

import tars_jax
model = tars_jax.load("smollm2:135m")
engine = tars_jax.Engine(model)
for text in engine.generate(model.chat_prompt([{"role": "user", "content": "Hi"}])):
    print(text, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tars_jax.config import EngineConfig, ModelConfig, SamplingParams
from tars_jax.errors import TarsError
from tars_jax.memory import collection_paused

if TYPE_CHECKING:
    from tars_jax.engine.engine import Engine
    from tars_jax.loaders.loaded import Model
    from tars_jax.loaders.opening import load, read_adapter

__version__ = "0.1.0"
__all__ = ["Engine", "EngineConfig", "Model", "ModelConfig", "SamplingParams", "TarsError", "__version__", "load", "read_adapter"]

# jax takes half a second to import: names that need it are fetched when first used, so that `tars list` stays fast.
_LAZY = {
    "Engine": "tars_jax.engine.engine",
    "Model": "tars_jax.loaders.loaded",
    "load": "tars_jax.loaders.opening",
    "read_adapter": "tars_jax.loaders.opening",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with collection_paused():
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
