"""Adapters as GGUF files: LoRA and norms in one form, steering vectors in another."""

from pathlib import Path

from tars_jax.adapters import Adapter
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.loaders.control_vector import ARCHITECTURE, read_control_vector, write_control_vector
from tars_jax.loaders.gguf import open_gguf
from tars_jax.loaders.gguf_lora import read_gguf_lora, write_gguf_lora


def read_gguf_adapter(path: Path, config: ModelConfig) -> Adapter:
    """Read an adapter for a model of this configuration. Raises ModelFileError."""
    is_control_vector = open_gguf(path).metadata.get("general.architecture") == ARCHITECTURE
    return read_control_vector(path, config) if is_control_vector else read_gguf_lora(path, config)


def write_gguf_adapter(path: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write an adapter so that llama.cpp reads it, float32. Raises InvalidRequest for one that no single file can hold."""
    if adapter.steering and (adapter.updates or adapter.norms):
        raise InvalidRequest(f"{adapter.source} holds steering vectors and other updates; no GGUF file has both")
    (write_control_vector if adapter.steering else write_gguf_lora)(path, adapter, config)
