"""Manifests: JSON files that say which blobs make up a model, in Ollama's format (OCI image manifest, schema version 2)."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.store.blobs import Blobs
from tars_jax.store.name import ModelName

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.ollama.image."  # + model, projector, adapter, template, system, params, messages, license ...
MAX_JSON_BYTES = 16 << 20  # manifests, configs and text layers are kilobytes; a hostile one must not fill the memory


@dataclass(frozen=True)
class Layer:
    """One blob of a model."""

    media_type: str
    digest: str  # sha256:<64 hex>
    size: int  # bytes
    source: str = ""  # "from": the model or file it was taken from

    @property
    def kind(self) -> str:
        """``model``, ``template``, ... for Ollama's media types, else the whole media type."""
        return self.media_type.removeprefix(LAYER_TYPE)

    @classmethod
    def from_json(cls, value: Any) -> "Layer":
        """Raises ModelFileError for anything but an object with a media type, a sha256 digest and a size."""
        if not isinstance(value, dict) or not isinstance(value.get("mediaType"), str):
            raise ModelFileError(f"manifest: {value!r:.80} is no layer")
        digest, size = value.get("digest"), value.get("size")
        if not isinstance(digest, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ModelFileError(f"manifest: a layer needs a digest and a size, got {digest!r:.80} and {size!r:.40}")
        try:
            Blobs(Path()).path(digest)
        except InvalidRequest as error:
            raise ModelFileError(f"manifest: {digest!r:.80} is no sha256 digest") from error
        return cls(value["mediaType"], digest.lower().replace("-", ":"), size, str(value.get("from") or ""))

    def to_json(self) -> dict[str, Any]:
        value = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**value, "from": self.source} if self.source else value


@dataclass(frozen=True)
class Manifest:
    """The blobs of a model: a config and layers."""

    config: Layer | None
    layers: tuple[Layer, ...]

    @property
    def blobs(self) -> tuple[Layer, ...]:
        return (*self.layers, self.config) if self.config else self.layers

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Raises ModelFileError when ``data`` is no manifest."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ModelFileError("manifest: not JSON") from error
        if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
            raise ModelFileError("manifest: no list of layers")
        config = value.get("config")
        has_config = isinstance(config, dict) and bool(config.get("digest"))
        return cls(Layer.from_json(config) if has_config else None, tuple(map(Layer.from_json, value["layers"])))

    def to_bytes(self) -> bytes:
        value: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE}
        value["config"] = self.config.to_json() if self.config else {}
        value["layers"] = [layer.to_json() for layer in self.layers]
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class StoredModel:
    """A model in the store. The text properties read their blobs and raise ModelFileError when those are missing or malformed."""

    name: ModelName  # as spelt on disk
    digest: str  # sha256 of the manifest file, 64 hex
    size: int  # bytes of all layers and the config
    modified_at: datetime  # UTC
    config: dict[str, Any]  # model_format, model_family, model_families, model_type, file_type ...
    layers: tuple[Layer, ...]
    blobs: Blobs = field(repr=False, compare=False)

    @classmethod
    def load(cls, name: ModelName, path: Path, blobs: Blobs) -> "StoredModel":
        """Raises ModelFileError when the manifest or its config is missing or malformed."""
        try:
            data, modified = path.read_bytes(), path.stat().st_mtime
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
        manifest = Manifest.from_bytes(data)
        config = read_config(manifest, blobs)
        size = sum(layer.size for layer in manifest.blobs)
        stamp = datetime.fromtimestamp(modified, UTC)
        return cls(name, hashlib.sha256(data).hexdigest(), size, stamp, config, manifest.layers, blobs)

    def paths(self, kind: str) -> list[Path]:
        """Blob files of the layers of a kind, in manifest order."""
        return [self.blobs.path(layer.digest) for layer in self.layers if layer.kind == kind]

    @property
    def model_path(self) -> Path:
        paths = self.paths("model")
        if not paths or not paths[0].is_file():
            raise ModelFileError(f"{self.name.short()} has no model file in {self.blobs.folder}; pull it again")
        return paths[0]

    @property
    def adapter_paths(self) -> list[Path]:
        return self.paths("adapter")

    @property
    def projector_paths(self) -> list[Path]:
        return self.paths("projector")

    @cached_property
    def template(self) -> str:
        return self._text("template")

    @cached_property
    def system(self) -> str:
        return self._text("system")

    @cached_property
    def license(self) -> str:
        """All licence texts, joined by newlines."""
        return "\n".join(map(_read_text, self.paths("license")))

    @cached_property
    def params(self) -> dict[str, Any]:
        paths = self.paths("params")
        return _read_json(paths[-1], dict) if paths else {}

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        paths = self.paths("messages")
        return _read_json(paths[-1], list) if paths else []

    def _text(self, kind: str) -> str:
        paths = self.paths(kind)
        return _read_text(paths[-1]) if paths else ""  # the last one counts, as in Ollama


def read_config(manifest: Manifest, blobs: Blobs) -> dict[str, Any]:
    """The model's config, empty when the manifest names none. Raises ModelFileError when it is missing or malformed."""
    return _read_json(blobs.path(manifest.config.digest), dict) if manifest.config else {}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: too large for a text layer")
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}; pull the model again") from error


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not JSON") from error
    if not isinstance(value, kind):
        raise ModelFileError(f"{path}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value
