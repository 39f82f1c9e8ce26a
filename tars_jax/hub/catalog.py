"""The catalogue: which sources have a model, read from ``configs/models.toml`` or the file ``TARS_CATALOG`` names."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tars_jax.errors import InvalidRequest
from tars_jax.store.name import ModelName

HUGGING_FACE_HOSTS = ("hf.co", "huggingface.co")


@dataclass(frozen=True)
class OllamaSource:
    """A model of an Ollama registry."""

    name: ModelName
    sha256: str = ""  # of the GGUF, 64 hex; "": the registry's manifest alone verifies it

    @property
    def label(self) -> str:
        return f"Ollama registry ({self.name.host})"


@dataclass(frozen=True)
class HuggingFaceSource:
    """A GGUF in a Hugging Face repository."""

    repo: str  # owner/name
    quant: str = ""  # "": Q4_K_M if there is one, else the first file
    file: str = ""  # "": chosen by quant
    revision: str = "main"
    sha256: str = ""

    @property
    def label(self) -> str:
        return f"Hugging Face ({self.repo})"


@dataclass(frozen=True)
class PyPISource:
    """A GGUF inside a wheel on PyPI."""

    package: str
    file: str  # path in the wheel
    sha256: str  # a wheel can be replaced by a newer release: the bytes are always pinned

    @property
    def label(self) -> str:
        return f"PyPI ({self.package})"


Source = OllamaSource | HuggingFaceSource | PyPISource


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue."""

    name: ModelName
    sources: tuple[Source, ...]  # in the order to try
    license: str = ""

    @property
    def pinned(self) -> frozenset[str]:
        """Digests of the GGUFs whose bytes the catalogue knows."""
        return frozenset(f"sha256:{source.sha256}" for source in self.sources if source.sha256)


class Catalog:
    """Entries by name, in any case."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = {ModelName.parse(name).folded(): entry for name, entry in entries.items()}

    def find(self, name: ModelName) -> Entry:
        """The entry of ``name``. Names the catalogue lacks have one source: Hugging Face for its hosts, else a registry."""
        known = self.entries.get(name.folded())
        if known:
            return known
        if name.host.lower() in HUGGING_FACE_HOSTS:
            quant = "" if name.tag == "latest" else name.tag
            return Entry(name, (HuggingFaceSource(f"{name.namespace}/{name.model}", quant),))
        return Entry(name, (OllamaSource(name),))


def load_catalog(environ: Mapping[str, str] = os.environ) -> Catalog:
    """The built-in catalogue, or the one ``TARS_CATALOG`` names.

    Raises:
        InvalidRequest: the file is missing or malformed.
    """
    own = environ.get("TARS_CATALOG", "").strip()
    try:
        text = Path(own).expanduser().read_text("utf-8") if own else files("configs").joinpath("models.toml").read_text("utf-8")
        return parse_catalog(text)
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise InvalidRequest(f"catalogue {own or 'configs/models.toml'}: {error}") from error


def parse_catalog(text: str) -> Catalog:
    """Raises InvalidRequest, ValueError, KeyError or TypeError when ``text`` is no catalogue."""
    entries: dict[str, Entry] = {}
    for name, table in tomllib.loads(text).get("models", {}).items():
        sources = tuple(map(_source, table["sources"]))
        entry = Entry(ModelName.parse(name), sources, table.get("license", ""))
        entries.update(dict.fromkeys([name, *table.get("aliases", [])], entry))
    return Catalog(entries)


def _source(table: dict[str, Any]) -> Source:
    sha256 = table.get("sha256", "")
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InvalidRequest(f"sha256 must be 64 hex digits in lower case, got {sha256!r}")
    if "ollama" in table:
        return OllamaSource(ModelName.parse(table["ollama"]), sha256)
    if "huggingface" in table:
        repo, _, quant = table["huggingface"].partition(":")
        return HuggingFaceSource(repo, quant, table.get("file", ""), table.get("revision", "main"), sha256)
    if "pypi" in table:
        return PyPISource(table["pypi"], table["file"], table["sha256"])
    raise InvalidRequest(f"a source is ollama, huggingface or pypi, got {table!r}")
