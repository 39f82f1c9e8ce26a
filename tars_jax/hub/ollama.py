"""Ollama's registry: an OCI-like protocol, ``/v2/<namespace>/<model>/manifests/<tag>`` and ``/blobs/<digest>``."""

from collections.abc import Iterator

import httpx

from tars_jax.errors import ModelFileError
from tars_jax.hub.catalog import OllamaSource
from tars_jax.hub.download import client, download, reason
from tars_jax.hub.job import Event, Job, SourceError, check_pin, write_manifest
from tars_jax.store import Manifest
from tars_jax.store.manifest import MANIFEST_TYPE, MAX_JSON_BYTES
from tars_jax.store.name import DEFAULT_HOST


def fetch(source: OllamaSource, job: Job) -> Iterator[Event]:
    """Bring the model into the store, its manifest as the registry sent it.

    Raises:
        SourceError: unknown there, unreachable, or damaged.
    """
    base = f"{_base_url(source, job)}/v2/{source.name.namespace}/{source.name.model}"
    with client() as http:
        data = _get_manifest(http, f"{base}/manifests/{source.name.tag}")
        try:
            manifest = Manifest.from_bytes(data)
        except ModelFileError as error:
            raise SourceError(f"sent an unusable manifest ({error})") from error
        if source.sha256:
            check_pin(source.sha256, next((layer.digest for layer in manifest.layers if layer.kind == "model"), "no model"))
        for layer in manifest.blobs:
            yield from download(http, f"{base}/blobs/{layer.digest}", layer.digest, layer.size, job.store)
    try:
        yield from write_manifest(job, data)
    except ModelFileError as error:
        raise SourceError(f"sent an unusable config ({error})") from error


def _base_url(source: OllamaSource, job: Job) -> str:
    if source.name.host == DEFAULT_HOST:
        return job.environ.get("TARS_REGISTRY", "").strip().rstrip("/") or f"https://{DEFAULT_HOST}"
    return f"{job.scheme}://{source.name.host}"


def _get_manifest(http: httpx.Client, url: str) -> bytes:
    try:
        with http.stream("GET", url, headers={"Accept": MANIFEST_TYPE}) as response:
            if response.status_code == 404:
                raise SourceError("pull model manifest: file does not exist")
            if response.status_code != 200:
                raise SourceError(f"pull model manifest: answers {response.status_code} {response.reason_phrase}".rstrip())
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise SourceError("sent an unusable manifest (too large)")
            return data
    except httpx.HTTPError as error:
        raise SourceError(reason(error)) from error
    except (httpx.InvalidURL, ValueError) as error:
        raise SourceError(f"{url} is no usable address: {error}") from error
