"""LoRA adapters in llama.cpp's form: a GGUF file of ``NAME.lora_a`` and ``NAME.lora_b`` tensors. Ollama's adapter layers are such.

A norm that takes the place of the model's stands there under its own name, as llama.cpp's converter writes it; llama.cpp itself passes
it over so far. Source: llama.cpp src/llama-adapter.cpp and convert_lora_to_gguf.py (MIT licence).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tars_jax.adapters import Adapter
from tars_jax.config import ModelConfig
from tars_jax.errors import ModelFileError
from tars_jax.loaders.blocks import Blocks
from tars_jax.loaders.factors import Factor, assemble, common_alpha, norm_factor
from tars_jax.loaders.gguf import GGUFFile, open_gguf
from tars_jax.loaders.gguf_model import rotary_order
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.names import GGUF, name_in_file, translate


def read_gguf_lora(path: Path, config: ModelConfig) -> Adapter:
    """Read a LoRA adapter for a model of this configuration. Raises ModelFileError."""
    file = open_gguf(path)
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": config.architecture}
    for key, value in wanted.items():
        if (found := file.metadata.get(key)) != value:
            raise ModelFileError(f"{path}: no LoRA adapter for this model: {key} is {found!r}, expected {value!r}")
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise ModelFileError(f"{path}: activated LoRA (aLoRA) is not supported")
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float | int):
        raise ModelFileError(f"{path}: adapter.lora.alpha is {alpha!r:.40}, expected a number")

    def scale(leaf: str, rank: int) -> float:
        return alpha / rank if alpha else 1.0  # as in llama.cpp

    return assemble(_factors(file, config), config, scale, str(path))


def write_gguf_lora(path: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write an adapter so that llama.cpp and Ollama read it, float32."""
    alpha, scaled = common_alpha(adapter)
    tensors: dict[str, np.ndarray] = {}
    for leaf, update in adapter.updates.items():
        a, b, name = scaled[leaf], update.b, name_in_file(leaf, GGUF)
        if (order := rotary_order(config, leaf, len(a))) is not None:
            a = a[np.argsort(order)]
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = (a, b.T) if leaf == "embed" else (b, a)
    tensors |= {name_in_file(leaf, GGUF): norm for leaf, norm in adapter.norms.items()}
    metadata: dict[str, str | int | float] = {
        "general.architecture": config.architecture,
        "general.type": "adapter",
        "general.name": "LoRA",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_gguf(path, metadata, tensors)


def _factors(file: GGUFFile, config: ModelConfig) -> Iterator[Factor]:
    """lora_a [r, K] is our b, lora_b [O, r] our a; an embedding's are [V, r] and [D, r], because its rows are taken, not multiplied."""
    for name in file.tensors:
        base, _, half = name.rpartition(".lora_")
        read = file.read(name)
        value = read.dequantize() if isinstance(read, Blocks) else read
        if half not in ("a", "b"):
            yield norm_factor(name, translate(name, GGUF), value)
            continue
        leaf = translate(base, GGUF)
        if leaf == "embed":
            yield Factor(name, leaf, "a", value) if half == "a" else Factor(name, leaf, "b", value.T)
            continue
        if leaf and half == "b" and not len(value) % config.head_dim and (order := rotary_order(config, leaf, len(value))) is not None:
            value = value[order]
        yield Factor(name, leaf, "b" if half == "a" else "a", value)
