"""Control vectors in llama.cpp's form: a GGUF file of tensors ``direction.N``, float32 [H], added to what leaves layer N.

Layers count from 0 and layer 0 has no vector there. Source: llama.cpp common/common.cpp and src/llama-adapter.cpp (MIT licence).
"""

import re
from pathlib import Path

import numpy as np

from tars_jax.adapters import Adapter, misfits
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest, ModelFileError, refuse
from tars_jax.loaders.blocks import Blocks
from tars_jax.loaders.factors import expected_shapes
from tars_jax.loaders.gguf import open_gguf
from tars_jax.loaders.gguf_writer import write_gguf

ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.([1-9]\d{0,5})")


def read_control_vector(path: Path, config: ModelConfig) -> Adapter:
    """Read steering vectors for a model of this configuration. Raises ModelFileError."""
    file = open_gguf(path)
    vectors: dict[int, np.ndarray] = {}
    faults = []
    for name in file.tensors:
        match, value = _DIRECTION.fullmatch(name), file.read(name)
        if match is None or isinstance(value, Blocks):
            faults.append(f"{name} is no vector of a layer: direction.1 and on, of plain numbers")
        else:
            vectors[int(match[1])] = np.ascontiguousarray(value, np.float32)
    adapter = Adapter({}, str(path), steering=vectors)
    faults += misfits(adapter, expected_shapes(config))
    refuse(faults or ([] if vectors else ["it holds no vector"]), f"{path} does not fit this model", ModelFileError)
    return adapter


def write_control_vector(path: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write steering vectors so that llama.cpp reads them, float32. Raises InvalidRequest for one after layer 0."""
    if 0 in adapter.steering:
        raise InvalidRequest(f"{adapter.source} steers after layer 0, which a control vector's file cannot name")
    metadata: dict[str, str | int | float] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "adapter",
        f"{ARCHITECTURE}.model_hint": config.architecture,
        f"{ARCHITECTURE}.layer_count": config.num_layers,
    }
    write_gguf(path, metadata, {f"direction.{layer}": vector for layer, vector in adapter.steering.items()})
