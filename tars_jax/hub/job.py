"""What the sources share: the job they are given, the events they yield, the error that sends the job to the next source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tars_jax.errors import ModelFileError, ModelNotFound, PullError
from tars_jax.store import Manifest, Store
from tars_jax.store.name import ModelName

Event = dict[str, Any]


class SourceError(PullError):
    """One source cannot deliver; the message is the reason alone."""


@dataclass(frozen=True)
class Job:
    """A model to bring into a store."""

    name: ModelName
    store: Store
    environ: Mapping[str, str]
    license: str = ""
    scheme: str = "https"  # of a registry the name itself gives


def progress(digest: str, total: int, completed: int) -> Event:
    """Bytes ``completed`` of ``total`` of a blob are here."""
    return {"status": f"pulling {digest.removeprefix('sha256:')[:12]}", "digest": digest, "total": total, "completed": completed}


def check_pin(sha256: str, digest: str) -> None:
    """Raises SourceError when the catalogue pins other bytes than the source offers."""
    if sha256 and digest != f"sha256:{sha256}":
        raise SourceError(f"it has other bytes ({digest[:19]}) than the catalogue pins (sha256:{sha256[:12]})")


def write_manifest(job: Job, data: bytes) -> Iterator[Event]:
    """The last steps of every pull, once all blobs are in the store: the manifest makes them a model."""
    yield {"status": "verifying sha256 digest"}  # was done while the bytes came in
    yield {"status": "writing manifest"}
    if _leaves_unused(job, data):
        yield {"status": "removing unused layers"}
    job.store.write_raw_manifest(job.name, data)


def _leaves_unused(job: Job, data: bytes) -> bool:
    try:
        old = job.store.find(job.name).layers
    except (ModelNotFound, ModelFileError):
        return False
    new = {layer.digest for layer in Manifest.from_bytes(data).layers}
    return any(layer.digest not in new for layer in old)
