"""A GGUF file as a model of the store: the config and manifest that Ollama's ``create`` would write."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tars_jax.errors import ModelFileError, ModelNotFound
from tars_jax.hub.job import Event, Job, SourceError, write_manifest
from tars_jax.store import LAYER_TYPE, Layer, ModelName, Store, StoredModel

# general.file_type, LLAMA_FTYPE of llama.cpp's include/llama.h (numbers missing here were removed there)
FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L"},
    **{14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS"},
    **{23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M"},
    **{32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE"},
}


def parameter_size(count: int) -> str:
    """A number of parameters as Ollama shows it: 134.52M, 7B, 7.2B."""
    for unit, suffix, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{suffix}"
    return str(count)


def describe(path: Path) -> dict[str, Any]:
    """The config of a GGUF file: family, parameter size and file type from its header.

    Raises:
        ModelFileError: it is no readable GGUF file.
    """
    from tars_jax.loaders.gguf import open_gguf  # here: numpy is not needed to list models

    gguf = open_gguf(path)
    family = str(gguf.metadata.get("general.architecture", "unknown"))
    file_type = gguf.metadata.get("general.file_type")
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": parameter_size(sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())),
        "file_type": FILE_TYPES.get(int(file_type), "unknown") if file_type is not None else "unknown",
        "architecture": "amd64",
        "os": "linux",
    }


def gguf_manifest(store: Store, digest: str, license: str = "") -> bytes:
    """The manifest of a GGUF whose blob is in the store; its config and licence are stored too.

    Raises:
        ModelFileError: the blob is no GGUF file.
    """
    path = store.blob_path(digest)
    layers = [Layer(LAYER_TYPE + "model", digest, path.stat().st_size)]
    config = describe(path)
    if license:
        layers.append(store.add_layer("license", license))
    config["rootfs"] = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    return store.build_manifest(config, layers)


def unwritten_model(name: str, path: Path, store: Store) -> StoredModel:
    """A GGUF file, whose blob is in the store from now on, as the model ``name`` that has no manifest yet.

    Raises:
        InvalidRequest: ill-formed name.
        ModelFileError: it is no readable GGUF file.
    """
    model_name = ModelName.parse(name)
    config = describe(path)  # before gigabytes are copied
    layer = Layer(LAYER_TYPE + "model", store.add_blob(path), path.stat().st_size)
    config["rootfs"] = {"type": "layers", "diff_ids": [layer.digest]}
    return StoredModel(model_name, "", layer.size, datetime.now(UTC), config, (layer,), store.blobs)


def write_gguf(job: Job, digest: str) -> Iterator[Event]:
    """The last steps of pulling a GGUF from a source without manifests.

    Raises:
        SourceError: the blob is no GGUF file; it is removed.
    """
    try:
        manifest = gguf_manifest(job.store, digest, job.license)
    except ModelFileError as error:
        job.store.remove_unused([digest])
        raise SourceError(f"sent no usable GGUF file ({error})") from error
    yield from write_manifest(job, manifest)


def import_file(name: str | ModelName, path: Path, store: Store, license: str = "") -> StoredModel:
    """Copy a GGUF file into the store as the model ``name``.

    Raises:
        InvalidRequest: ill-formed name.
        ModelNotFound: no such file.
        ModelFileError: it is no readable GGUF file.
    """
    name = ModelName.parse(name) if isinstance(name, str) else name
    if not path.is_file():
        raise ModelNotFound(f"{path}: no such file")
    describe(path)  # before gigabytes are copied
    return store.write_raw_manifest(name, gguf_manifest(store, store.add_blob(path), license))
