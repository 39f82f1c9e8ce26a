"""What is known of models without running them: tags, show, ps. Used by the handlers and by the command line; no JAX."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.durations import expiry, timestamp
from api.models import Loaded, Models
from api.prompts import template_source
from tars_jax.chat import CHATML, capabilities
from tars_jax.errors import InvalidRequest, ModelNotFound
from tars_jax.store import ModelName, Store, StoredModel

_LONG_ARRAY = 16  # longer arrays of the metadata are left out unless asked for
_HIDDEN = ("general.name", "tokenizer.chat_template")


def tags(store: Store) -> dict[str, Any]:
    """The answer of GET /api/tags."""
    return {"models": [_tag(stored) for stored in store.models()]}


def _tag(stored: StoredModel) -> dict[str, Any]:
    name = stored.name.short()
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(stored.modified_at),
        "size": stored.size,
        "digest": stored.digest,
        "details": details(stored),
    }


def running(models: Models) -> dict[str, Any]:
    """The answer of GET /api/ps."""
    return {"models": [_running(entry) for entry in models.loaded()]}


def _running(entry: Loaded) -> dict[str, Any]:
    size = entry.engine.stats().nbytes
    return {
        "name": entry.name,
        "model": entry.name,
        "size": size,
        "digest": entry.stored.digest,
        "details": details(entry.stored),
        "expires_at": expiry(entry.seconds_left()),
        "size_vram": 0 if _on_cpu() else size,
        "context_length": entry.engine.config.max_context,
    }


def _on_cpu() -> bool:
    """Whether arrays lie in main memory. Where a model is loaded JAX is imported; this module need not do it."""
    jax = sys.modules.get("jax")
    return jax is None or jax.default_backend() == "cpu"


def details(stored: StoredModel) -> dict[str, Any]:
    """The ``details`` object of tags, show and ps."""
    config = stored.config
    family = config.get("model_family", "")
    return {
        "parent_model": "",
        "format": config.get("model_format", ""),
        "family": family,
        "families": config.get("model_families") or ([family] if family else []),
        "parameter_size": config.get("model_type", ""),
        "quantization_level": config.get("file_type", ""),
    }


def show(store: Store, name: str, *, verbose: bool = False, system: str = "") -> dict[str, Any]:
    """The answer of POST /api/show.

    Raises:
        ModelNotFound: ``model 'name:tag' not found``.
    """
    stored = _find(store, name)
    metadata, tensors = _read_file(stored.model_path)
    template = template_source(stored.template, str(metadata.get("tokenizer.chat_template") or CHATML))
    answer = {
        "license": stored.license,
        "modelfile": modelfile(stored, template, system or stored.system),
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameter_lines(stored.params)),
        "template": template,
        "system": system or stored.system,
        "messages": stored.messages,
    }
    if adapters := _adapters(stored):
        answer["adapters"] = adapters
    return {key: value for key, value in answer.items() if value} | {
        "details": details(stored) | {"parent_model": next((layer.source for layer in stored.layers if layer.kind == "model"), "")},
        "model_info": model_info(metadata, sum(math.prod(tensor["shape"]) for tensor in tensors), verbose=verbose),
        "tensors": tensors,
        "capabilities": ["completion", *sorted(capabilities(template) & {"tools", "thinking"})],
        "modified_at": timestamp(stored.modified_at),
    }


def _adapters(stored: StoredModel) -> list[dict[str, Any]]:
    if not stored.adapter_paths:
        return []
    from tars_jax.loaders.adapted import describe_adapter  # here, as in `_read_file`

    return [describe_adapter(path) for path in stored.adapter_paths]


def _read_file(path: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Metadata and tensors of a GGUF file; the shapes are in the file's order, as Ollama shows them."""
    from tars_jax.loaders.blocks import TYPES  # here: the package imports JAX, which is slow and which listing does without
    from tars_jax.loaders.gguf import open_gguf

    file = open_gguf(path)
    tensors = [{"name": t.name, "type": TYPES[t.type].name, "shape": list(t.shape[::-1])} for t in file.tensors.values()]
    return file.metadata, tensors


def _find(store: Store, name: str) -> StoredModel:
    try:
        return store.find(name)
    except ModelNotFound:
        raise ModelNotFound(f"model '{ModelName.parse(name).short()}' not found") from None


def copy_model(store: Store, source: str, destination: str) -> None:
    """Copy with Ollama's texts. Raises InvalidRequest, ModelNotFound."""
    for label, name in (("source", source), ("destination", destination)):
        try:
            ModelName.parse(name)
        except InvalidRequest:
            raise InvalidRequest(f'{label} "{name}" is invalid') from None
    try:
        store.copy(source, destination)
    except ModelNotFound:
        raise ModelNotFound(f'model "{source}" not found') from None


def parameter_lines(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    """PARAMETERs as text: strings quoted, a line for every item of a list."""
    pairs = [(key, item) for key, value in params.items() for item in (value if isinstance(value, list) else [value])]
    return [(key, json.dumps(item, ensure_ascii=False)) for key, item in pairs]


def modelfile(stored: StoredModel, template: str, system: str) -> str:
    """A Modelfile that would make this model again."""
    lines = ['# Modelfile generated by "tars show"', "# To build a new Modelfile based on this, replace FROM with:"]
    lines += [f"# FROM {stored.name.short()}", "", f"FROM {stored.model_path}"]
    lines += [f"ADAPTER {path}" for path in stored.adapter_paths]
    lines += [f'{word} """{text}"""' for word, text in (("TEMPLATE", template), ("SYSTEM", system)) if text]
    lines += [f"PARAMETER {key} {value}" for key, value in parameter_lines(stored.params)]
    lines += [f'LICENSE """{stored.license}"""'] if stored.license else []
    lines += [f"MESSAGE {message.get('role', '')} {message.get('content', '')}" for message in stored.messages]
    return "\n".join(lines) + "\n"


def model_info(metadata: Mapping[str, Any], parameters: int, *, verbose: bool) -> dict[str, Any]:
    """GGUF metadata as JSON; without ``verbose`` the long arrays (vocabulary, merges) are null."""
    info: dict[str, Any] = {"general.parameter_count": parameters}
    for key, value in metadata.items():
        if key not in _HIDDEN:
            info[key] = _plain(value) if verbose or not _is_long(value) else None
    return info


def _is_long(value: Any) -> bool:
    return not isinstance(value, str | bytes) and hasattr(value, "__len__") and len(value) > _LONG_ARRAY


def _plain(value: Any) -> Any:
    """A metadata value as JSON has it: numpy scalars and arrays become numbers and lists, bytes become text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None  # JSON has neither
    return value
