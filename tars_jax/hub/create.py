"""Models made from Modelfiles, as Ollama's ``create`` makes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tars_jax.errors import TarsError
from tars_jax.hub.gguf_manifest import unwritten_model
from tars_jax.loaders.adapted import Additions, save_derived
from tars_jax.store import Store, StoredModel
from tars_jax.store.modelfile import Modelfile


def create(store: Store, name: str, modelfile: Modelfile, folder: Path, params: Mapping[str, Any]) -> StoredModel:
    """Make the model ``name``. ``folder``: where the Modelfile lies, which its paths start from; ``params``: its parameters, read.

    Raises InvalidRequest, ModelNotFound, and ModelFileError for files that cannot be read or do not fit.
    """
    additions = Additions(
        adapters=[_path(folder, path) for path in modelfile.adapters],
        params=params,
        template=modelfile.template,
        system=modelfile.system,
        messages=[{"role": role, "content": content} for role, content in modelfile.messages],
        licenses=modelfile.licenses,
    )
    path = _path(folder, modelfile.base)
    if not path.is_file():
        return save_derived(store, store.find(modelfile.base), additions, name)
    base = unwritten_model(name, path, store)
    try:
        return save_derived(store, base, additions, name, source="")
    except TarsError:
        store.remove_unused([layer.digest for layer in base.layers])
        raise


def _path(folder: Path, text: str) -> Path:
    return folder / Path(text).expanduser()
