"""The model store: a folder in Ollama's own layout, so that either program can use the other's.

blobs/sha256-<hex>                          every file, named by its content
manifests/<host>/<namespace>/<model>/<tag>  which blobs make up a model
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tars_jax.errors import InvalidRequest, ModelFileError, ModelNotFound
from tars_jax.store.blobs import Blobs, BlobSource, BlobWriter, sync_folder, try_lock
from tars_jax.store.manifest import CONFIG_TYPE, LAYER_TYPE, Layer, Manifest, StoredModel, read_config
from tars_jax.store.name import ModelName

__all__ = ["LAYER_TYPE", "Layer", "Manifest", "ModelName", "Store", "StoredModel"]


class Store:
    """Models under ``root``. Nothing is created before the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self._manifests = root / "manifests"

    # reading

    def names(self) -> Iterator[ModelName]:
        """Every name with a manifest, whether that is readable or not."""
        for path in sorted(self._manifests.glob("*/*/*/*")):
            host, namespace, model, tag = path.parts[-4:]
            with contextlib.suppress(InvalidRequest):  # a stray file
                name = ModelName(host=host, namespace=namespace, model=model, tag=tag)
                if path.is_file():
                    yield name

    def models(self) -> list[StoredModel]:
        """All readable models, newest first. A broken manifest must not hide the others."""
        found = []
        for name in self.names():
            with contextlib.suppress(ModelFileError):
                found.append(self._load(name))
        return sorted(found, key=lambda model: model.modified_at, reverse=True)

    def find(self, name: str | ModelName) -> StoredModel:
        """The model of that name, in whatever case.

        Raises:
            InvalidRequest: ill-formed name.
            ModelNotFound: no such model.
            ModelFileError: its manifest is broken.
        """
        return self._load(self._existing(name))

    def is_complete(self, model: StoredModel) -> bool:
        """Whether every blob is there in its full size."""
        return all(_size(self.blobs.path(layer.digest)) == layer.size for layer in model.layers)

    def blob_path(self, digest: str) -> Path:
        """Raises InvalidRequest: invalid digest format."""
        return self.blobs.path(digest)

    def has_blob(self, digest: str) -> bool:
        """Raises InvalidRequest: invalid digest format."""
        return self.blobs.has(digest)

    # writing

    def add_blob(self, source: BlobSource, expected: str | None = None, on_progress: Callable[[int], None] | None = None) -> str:
        """Store a file, stream or chunks of bytes and return the digest; ``on_progress`` gets the bytes written so far.

        Raises:
            InvalidRequest: the bytes do not have the expected digest.
        """
        return self.blobs.add(source, expected, on_progress)

    def blob_writer(self, expected: str | None = None) -> BlobWriter:
        """For bytes that arrive piece by piece; see ``BlobWriter``."""
        return self.blobs.writer(expected)

    def add_layer(self, kind: str, source: BlobSource | str, origin: str = "") -> Layer:
        """Store the content of a layer: ``kind`` is model, template, system, params, messages, license, adapter or projector."""
        digest = self.add_blob(io.BytesIO(source.encode()) if isinstance(source, str) else source)
        return Layer(LAYER_TYPE + kind, digest, self.blob_path(digest).stat().st_size, origin)

    def write_manifest(self, name: str | ModelName, config: dict[str, Any], layers: Sequence[Layer]) -> StoredModel:
        """Make ``layers`` the model ``name``, replacing a model of that name and removing blobs only that one used.

        Raises:
            InvalidRequest: ill-formed name.
            ModelFileError: a layer's blob is missing.
        """
        return self.write_raw_manifest(name, self.build_manifest(config, layers))

    def build_manifest(self, config: dict[str, Any], layers: Sequence[Layer]) -> bytes:
        """Store the config and return the manifest, which is not written yet."""
        text = json.dumps(config, separators=(",", ":"), ensure_ascii=False)
        digest = self.add_blob(io.BytesIO(text.encode()))
        config_layer = Layer(CONFIG_TYPE, digest, self.blob_path(digest).stat().st_size)
        return Manifest(config_layer, tuple(layers)).to_bytes()

    def write_raw_manifest(self, name: str | ModelName, data: bytes) -> StoredModel:
        """``write_manifest`` with the bytes of a registry's manifest, stored as they are.

        Raises:
            InvalidRequest: ill-formed name.
            ModelFileError: no manifest, or a blob is missing or its config malformed; the store is as before.
        """
        manifest = Manifest.from_bytes(data)
        with self._locked():
            for layer in manifest.blobs:
                if not self.has_blob(layer.digest):
                    raise ModelFileError(f"blob {layer.digest} is missing in {self.blobs.folder}; pull the model again")
            read_config(manifest, self.blobs)  # a broken one must not replace a good model
            spelling = self._spelling(name)
            old = self._digests(spelling)
            self._replace(self._path(spelling), data)
            self._remove_unused(old)
        return self._load(spelling)

    def copy(self, source: str | ModelName, destination: str | ModelName) -> StoredModel:
        """Give a model a second name; a model of that name is replaced.

        Raises:
            InvalidRequest: ill-formed name.
            ModelNotFound: no model ``source``.
        """
        return self.write_raw_manifest(destination, self._path(self._existing(source)).read_bytes())

    def delete(self, name: str | ModelName) -> None:
        """Remove a model and the blobs no other model uses. A model with a broken manifest can be deleted too.

        Raises:
            InvalidRequest: ill-formed name.
            ModelNotFound: no such model.
        """
        existing = self._existing(name)
        with self._locked():
            digests, path = self._digests(existing), self._path(existing)
            path.unlink(missing_ok=True)
            self._remove_unused(digests)
            for folder in list(path.parents)[:3]:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()

    def remove_unused(self, digests: Iterable[str]) -> None:
        """Remove those of ``digests`` that no model uses."""
        with self._locked():
            self._remove_unused(set(digests))

    # inside

    def _path(self, name: ModelName) -> Path:
        return self._manifests / name.path

    def _load(self, name: ModelName) -> StoredModel:
        return StoredModel.load(name, self._path(name), self.blobs)

    def _existing(self, name: str | ModelName) -> ModelName:
        wanted = self._spelling(name)
        if not os.path.isfile(self._path(wanted)):  # unlike Path.is_file, False for a name too long for the file system
            raise ModelNotFound(f"model '{name.short() if isinstance(name, ModelName) else name}' not found")
        return wanted

    def _spelling(self, name: str | ModelName) -> ModelName:
        """The name as the store spells it: an existing model's name, else each part as some existing model has it."""
        wanted = ModelName.parse(name) if isinstance(name, str) else name
        if os.path.isfile(self._path(wanted)):
            return wanted
        names = list(self.names())
        for existing in names:
            if existing.folded() == wanted.folded():
                return existing
        return ModelName(**{part: _respell(part, getattr(wanted, part), names) for part in ("host", "namespace", "model", "tag")})

    def _digests(self, name: ModelName) -> set[str]:
        """Digests a manifest names; none when it is missing or broken."""
        try:
            return {layer.digest for layer in Manifest.from_bytes(self._path(name).read_bytes()).blobs}
        except (OSError, ModelFileError):
            return set()

    def _remove_unused(self, digests: set[str]) -> None:
        if digests:
            for digest in digests.difference(*map(self._digests, self.names())):
                self.blobs.remove(digest)

    def _replace(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._manifests / f".{os.urandom(8).hex()}"  # one level up from hosts: never taken for a manifest
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes manifests, so that no blob is removed while another model is about to use it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".tars-lock").open("a+b") as file:
            try_lock(file, wait=True)
            yield


def _respell(part: str, text: str, names: list[ModelName]) -> str:
    spellings = [getattr(name, part) for name in names if getattr(name, part).lower() == text.lower()]
    return text if text in spellings or not spellings else spellings[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
