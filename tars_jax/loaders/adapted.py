"""Models of the store that are another model and what was added to it, as Ollama keeps them: the same blobs, and a layer more."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tars_jax.adapters import Adapter
from tars_jax.loaders.gguf import open_gguf
from tars_jax.loaders.gguf_adapter import write_gguf_adapter
from tars_jax.loaders.gguf_model import read_config
from tars_jax.loaders.opening import read_adapter
from tars_jax.store import Layer, Store, StoredModel


def save_adapted(store: Store, base: str, adapters: Sequence[Path | Adapter], name: str) -> StoredModel:
    """Make a model ``name`` of a stored one and adapters, files or in memory, which are kept as GGUF files.

    Raises ModelNotFound, InvalidRequest for an ill-formed name, and ModelFileError for adapters that cannot be read or do not fit.
    """
    stored = store.find(base)
    config, layers = read_config(open_gguf(stored.model_path)), _layers(stored)
    with tempfile.TemporaryDirectory() as folder:
        for adapter in adapters:
            file = Path(folder) / "adapter.gguf"
            write_gguf_adapter(file, adapter if isinstance(adapter, Adapter) else read_adapter(adapter, config), config)
            layers.append(_add(store, file))
    return store.write_manifest(name, stored.config, layers)


def save_with_params(store: Store, base: str, params: Mapping[str, float], name: str) -> StoredModel:
    """Make a model ``name`` of a stored one whose requests have these parameters unless they say otherwise.

    Raises ModelNotFound, and InvalidRequest for an ill-formed name.
    """
    stored = store.find(base)
    layer = store.add_layer("params", json.dumps({**stored.params, **params}))
    return store.write_manifest(name, stored.config, [*(kept for kept in _layers(stored) if kept.kind != "params"), layer])


def describe_adapter(path: Path) -> dict[str, Any]:
    """What an adapter layer holds: rank, number of weights that it changes, alpha, bytes."""
    file = open_gguf(path)
    ranks = [min(info.shape) for info in file.tensors.values() if info.name.endswith(".lora_a")]
    changed = [name for name in file.tensors if not name.endswith(".lora_b")]
    kind, alpha = (
        file.metadata.get("adapter.type", file.metadata.get("general.architecture", "")),
        file.metadata.get("adapter.lora.alpha", 0.0),
    )
    return {"type": kind, "rank": max(ranks, default=0), "weights": len(changed), "alpha": alpha, "size": path.stat().st_size}


def _layers(stored: StoredModel) -> list[Layer]:
    """A model's layers for another one made of it, which names it."""
    return [dataclasses.replace(layer, source=stored.name.short()) if layer.kind == "model" else layer for layer in stored.layers]


def _add(store: Store, path: Path) -> Layer:
    with path.open("rb") as file:
        return store.add_layer("adapter", file)
