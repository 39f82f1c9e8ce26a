"""Opening models: `load` takes a name from the store or a path, and gives a `Model`."""

import math
from pathlib import Path
from typing import Literal

import jax

from tars_jax import compile_cache, kernels, memory
from tars_jax.chat import CHATML, ChatTemplate
from tars_jax.config import models_dir
from tars_jax.errors import ModelFileError
from tars_jax.loaders.gguf import GGUFFile, open_gguf
from tars_jax.loaders.gguf_model import read_config, tensor_reader
from tars_jax.loaders.loaded import Model
from tars_jax.loaders.params import Progress, WeightForm, build_params
from tars_jax.store import Store
from tars_jax.tokenizer import Tokenizer

__all__ = ["Model", "load"]


def load(
    name_or_path: str | Path,
    *,
    store: Store | None = None,
    weights: WeightForm | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> Model:
    """Open a model by its name in the store or by the path of its file.

    weights: "tiled" lays matrices out for the CPU kernels, "packed" keeps quantised ones as they are, "dense" expands them to
    the compute type. "auto" is "tiled" on a CPU with kernels; else it expands what takes at most a quarter of the free memory,
    because XLA alone would expand packed weights again on every step.
    Turns on the persistent compilation cache (see `compile_cache`). Raises ModelNotFound and ModelFileError.
    """
    compile_cache.enable()
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = (store or Store(models_dir())).find(str(name_or_path)).model_path
    file = open_gguf(path)
    config = read_config(file)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    form = _choose_form(file, dtype) if weights == "auto" else weights
    table, sizes, read = tensor_reader(file, config)
    params = build_params(config, table, sizes, read, source=str(path), form=form, dtype=dtype, progress=progress)
    memory.trim()
    tokenizer = Tokenizer.from_gguf(file.metadata)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(f"{path}: {tokenizer.vocab_size} tokens but only {config.vocab_size} embeddings")
    template = _chat_template(file, tokenizer)
    return Model(str(name_or_path), path, config, params, tokenizer, template, file.metadata, dtype)


def _chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
    def text(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    source = file.metadata.get("tokenizer.chat_template") or CHATML
    return ChatTemplate(source, bos_token=text(tokenizer.bos_id), eos_token=text(tokenizer.eos_id))


def _choose_form(file: GGUFFile, dtype: str) -> WeightForm:
    if jax.default_backend() == "cpu" and kernels.available():
        return "tiled"
    elements = sum(math.prod(info.shape) for info in file.tensors.values())
    expanded = elements * (4 if dtype == "float32" else 2)
    return "dense" if expanded <= memory.free_bytes() // 4 else "packed"
