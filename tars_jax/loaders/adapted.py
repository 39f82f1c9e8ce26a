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
from tars_jax.store import Layer, ModelName, Store, StoredModel


@dataclasses.dataclass(frozen=True)
class Additions:
    """What a model has beside its base's. adapters: files or in memory, after those of the base; params: over the base's; licenses: beside
    the base's. The others stand in the place of the base's, where they are not empty."""

    adapters: Sequence[Path | Adapter] = ()
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: str = ""
    system: str = ""
    messages: Sequence[Mapping[str, str]] = ()
    licenses: Sequence[str] = ()


def save_adapted(store: Store, base: str, adapters: Sequence[Path | Adapter], name: str) -> StoredModel:
    """`save_derived` of adapters alone."""
    return save_derived(store, store.find(base), Additions(adapters=adapters), name)


def save_with_params(store: Store, base: str, params: Mapping[str, float], name: str) -> StoredModel:
    """`save_derived` of parameters alone: requests have them unless they say otherwise."""
    return save_derived(store, store.find(base), Additions(params=params), name)


def save_derived(store: Store, base: StoredModel, additions: Additions, name: str, *, source: str | None = None) -> StoredModel:
    """Make a model ``name`` of a stored one and additions; adapters are kept as GGUF files. ``source``: what the new model says its file
    was taken from, else the base's name.

    Raises InvalidRequest for an ill-formed name, and ModelFileError for adapters that cannot be read or do not fit.
    """
    ModelName.parse(name)  # before anything is written
    texts = {"template": additions.template, "system": additions.system}
    if additions.params:
        texts["params"] = json.dumps({**base.params, **additions.params})
    if additions.messages:
        texts["messages"] = json.dumps(list(additions.messages))
    new = {kind: text for kind, text in texts.items() if text}
    source = base.name.short() if source is None else source
    kept = [layer for layer in base.layers if layer.kind not in new]
    layers = [dataclasses.replace(layer, source=source) if layer.kind == "model" else layer for layer in kept]
    layers += _adapter_layers(store, base, additions.adapters)
    layers += [store.add_layer(kind, text) for kind, text in new.items()]
    layers += [store.add_layer("license", text) for text in additions.licenses]
    return store.write_manifest(name, base.config, layers)


def _adapter_layers(store: Store, base: StoredModel, adapters: Sequence[Path | Adapter]) -> list[Layer]:
    if not adapters:
        return []
    config = read_config(open_gguf(base.model_path))
    with tempfile.TemporaryDirectory() as folder:
        layers, file = [], Path(folder) / "adapter.gguf"
        for adapter in adapters:
            write_gguf_adapter(file, adapter if isinstance(adapter, Adapter) else read_adapter(adapter, config), config)
            layers.append(_add(store, file))
    return layers


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


def _add(store: Store, path: Path) -> Layer:
    with path.open("rb") as file:
        return store.add_layer("adapter", file)
