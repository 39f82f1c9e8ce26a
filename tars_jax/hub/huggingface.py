"""Hugging Face: one GGUF file of a repository, found and verified by the sha256 the hub keeps for every large file.

``HF_ENDPOINT`` names a mirror, ``HF_TOKEN`` opens gated repositories.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import build_hf_headers

from tars_jax.hub.catalog import HuggingFaceSource
from tars_jax.hub.download import client, download
from tars_jax.hub.gguf_manifest import write_gguf
from tars_jax.hub.job import Event, Job, SourceError, check_pin

DEFAULT_ENDPOINT = "https://huggingface.co"
DEFAULT_QUANT = "Q4_K_M"
_TIMEOUT_SECONDS = 5.0
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file of a repository."""

    name: str
    size: int  # bytes
    sha256: str


def fetch(source: HuggingFaceSource, job: Job) -> Iterator[Event]:
    """Bring the source's GGUF into the store and write a manifest for it.

    Raises:
        SourceError: no such repository or file, unreachable, or damaged.
    """
    endpoint = _setting(job.environ, "HF_ENDPOINT").rstrip("/") or DEFAULT_ENDPOINT
    token = _setting(job.environ, "HF_TOKEN") or None
    info = _repository(source, endpoint, token)
    file = choose(gguf_files(info), source)
    digest = f"sha256:{file.sha256}"
    check_pin(source.sha256, digest)
    url = hf_hub_url(source.repo, file.name, revision=getattr(info, "sha", None) or source.revision, endpoint=endpoint)
    with client() as http:
        yield from download(http, url, digest, file.size, job.store, build_hf_headers(token=token))
    yield from write_gguf(dataclasses.replace(job, license=job.license or _license(info)), digest)


def gguf_files(info: Any) -> list[GGUFFile]:
    """The model files in a repository's listing: no projectors, no parts of split files, none without a sha256."""
    files = []
    for item in info.siblings or []:
        name, lfs = item.rfilename, item.lfs
        is_model = name.lower().endswith(".gguf") and "mmproj" not in name.lower() and not _SPLIT.search(name)
        if is_model and lfs and re.fullmatch("[0-9a-f]{64}", lfs.sha256 or ""):
            files.append(GGUFFile(name, lfs.size, lfs.sha256))
    return sorted(files, key=lambda file: file.name)


def choose(files: list[GGUFFile], source: HuggingFaceSource) -> GGUFFile:
    """The file the source names, else the one of its quantisation, else Q4_K_M, else the first.

    Raises:
        SourceError: nothing fits; the message lists what there is.
    """
    names = ", ".join(file.name for file in files) or "no GGUF file in one piece"
    if source.file:
        fitting = [file for file in files if file.name == source.file]
    else:
        fitting = [file for file in files if _is_quant(file.name, source.quant or DEFAULT_QUANT)]
        if not source.quant:
            fitting += files
    if not fitting:
        raise SourceError(f"has no {source.file or source.quant or 'GGUF file'}; it has {names}")
    return fitting[0]


def _is_quant(name: str, quant: str) -> bool:
    return bool(re.search(rf"(?:^|[-._/]){re.escape(quant)}(?:\.gguf$|[-./])", name, re.IGNORECASE))


def _repository(source: HuggingFaceSource, endpoint: str, token: str | None) -> Any:
    api = HfApi(endpoint=endpoint, token=token)
    try:
        return api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise SourceError("is gated: accept its licence on the website and set HF_TOKEN") from error
    except Exception as error:  # the hub client lets through the errors of whichever HTTP library its version uses
        raise SourceError(_reason(error)) from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 404):
        return "no such repository, or a private one (set HF_TOKEN)"
    return f"answers {status}" if status else f"cannot be reached: {' '.join(str(error).split()) or type(error).__name__}"


def _license(info: Any) -> str:
    card = getattr(info, "card_data", None)
    text = card.get("license") if card else None
    return text if isinstance(text, str) else ""


def _setting(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()
