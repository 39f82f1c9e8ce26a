"""Opening models: `load` takes a name from the store, a path or a preset, and gives a `Model`."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from tars_jax import compile_cache, kernels, memory, planning, presets
from tars_jax.adapters import Adapter, apply_adapter
from tars_jax.chat import CHATML, ChatTemplate
from tars_jax.config import EngineConfig, ModelConfig, models_dir
from tars_jax.errors import ModelFileError, ModelNotFound
from tars_jax.loaders.blocks import TYPES
from tars_jax.loaders.gguf import GGUFFile, open_gguf
from tars_jax.loaders.gguf_adapter import read_gguf_adapter
from tars_jax.loaders.gguf_model import read_config, tensor_reader
from tars_jax.loaders.loaded import Model
from tars_jax.loaders.params import Progress, WeightForm, build_params, stored
from tars_jax.loaders.peft import CONFIG_FILE, read_peft
from tars_jax.loaders.random_weights import matrix_dtype, random_model
from tars_jax.planning import Storage
from tars_jax.store import Store
from tars_jax.tokenizer import Tokenizer

__all__ = ["Model", "ModelFile", "load", "read_adapter"]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFile:
    """A file of which only the header has been read."""

    path: Path
    gguf: GGUFFile
    adapters: tuple[Path, ...] = ()  # that a model of the store has beside it

    @classmethod
    def open(cls, name_or_path: str | Path, store: Store | None = None) -> "ModelFile":
        """By its name in the store or by the path of its file. Raises ModelNotFound and ModelFileError."""
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return cls(path, open_gguf(path))
        if path.is_absolute() or path.suffix == ".gguf":  # no name of a model
            raise ModelNotFound(f"{path}: no such file")
        stored = (store or Store(models_dir())).find(str(name_or_path))
        return cls(stored.model_path, open_gguf(stored.model_path), tuple(stored.adapter_paths))

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.gguf)

    def stored(self, form: WeightForm, dtype: str) -> dict[str, Storage]:
        """How each parameter would be kept, see `build_params`."""
        table, _, _ = tensor_reader(self.gguf, self.config)
        types = {name: TYPES[info.type] for name, info in self.gguf.tensors.items()}
        return stored(self.config, table, types, source=str(self.path), form=form, dtype=dtype)


@memory.collection_paused()
def load(
    name_or_path: str | Path,
    *,
    adapters: Sequence[str | Path | Adapter] = (),
    store: Store | None = None,
    weights: WeightForm | Literal["auto"] = "auto",
    engine: EngineConfig | None = None,
    progress: Progress | None = None,
) -> Model:
    """Open a model by its name in the store or by the path of its file; ``preset:NAME`` is a preset with random weights.

    adapters: LoRA, norms or steering vectors, in memory or paths as in `read_adapter`; LoRA stays apart from the weights, and several
    add up. A model of the store has those it was stored with too.
    weights: "tiled" lays matrices out for the CPU kernels, "packed" keeps quantised ones as they are, "dense" expands them to
    the compute type. "auto" is "tiled" on a CPU with kernels; else it expands what takes at most a quarter of the free memory,
    because XLA alone would expand packed weights again on every step.
    engine: what is to serve the model; its cache and steps are planned too.
    Turns on the persistent compilation cache (see `compile_cache`). Raises ModelNotFound, ModelFileError, and NotEnoughMemory
    before anything is read that would not fit.
    """
    compile_cache.enable()
    dtype = compute_dtype()
    if preset := presets.named(str(name_or_path)):
        form = choose_form(preset.config, dtype) if weights == "auto" else weights
        check_memory(preset.config, Storage(8 * jnp.dtype(matrix_dtype(form, dtype)).itemsize, tiled=form == "tiled"), engine)
        return _with_adapters(random_model(preset, form=form, dtype=dtype), adapters)
    file = ModelFile.open(name_or_path, store)
    config, source = file.config, str(file.path)
    form = choose_form(config, dtype) if weights == "auto" else weights
    storage = file.stored(form, dtype)
    check_memory(config, storage, engine)
    table, sizes, read = tensor_reader(file.gguf, config)
    with ThreadPoolExecutor(1) as pool:  # packing the weights leaves Python free most of the time
        text = pool.submit(_tokenizer_and_template, file.gguf, config, source)
        params = build_params(config, table, sizes, read, source=source, form=form, dtype=dtype, storage=storage, progress=progress)
        tokenizer, template = text.result()
    memory.trim()
    model = Model(str(name_or_path), file.path, config, params, tokenizer, template, file.gguf.metadata, dtype)
    return _with_adapters(model, [*file.adapters, *adapters])


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Read an adapter for a model of this configuration: a PEFT folder (or a file in it), a GGUF file, or a folder that `tars optimize`
    wrote; LoRA, norms or steering.

    Raises ModelFileError that says what is missing, malformed, or does not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        result = path / "adapter.gguf"
        if (path / CONFIG_FILE).is_file() or not result.is_file():
            return read_peft(path, config)
        path = result
    if not path.is_file():
        raise ModelFileError(f"{path}: no such adapter; pass a PEFT folder or a GGUF file")
    if path.name == CONFIG_FILE or path.suffix == ".safetensors":
        return read_peft(path.parent, config)
    return read_gguf_adapter(path, config)


def _with_adapters(model: Model, adapters: Sequence[str | Path | Adapter]) -> Model:
    params = model.params
    for adapter in adapters:
        params = apply_adapter(params, adapter if isinstance(adapter, Adapter) else read_adapter(adapter, model.config))
    return dataclasses.replace(model, params=params)


def compute_dtype() -> str:
    """The type activations are computed in here."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def choose_form(config: ModelConfig, dtype: str) -> WeightForm:
    """The form of weights that is fastest here, see `load`."""
    if jax.default_backend() == "cpu" and kernels.available():
        return "tiled"
    expanded = planning.weights_nbytes(config, Storage(8 * jnp.dtype(dtype).itemsize))
    return "dense" if expanded <= planning.free_device_bytes() // 4 else "packed"


def check_memory(config: ModelConfig, stored: planning.Stored, engine: EngineConfig | None) -> None:
    """Raise NotEnoughMemory when a model does not fit, with one request's context and a step if it is to be served."""
    shards = engine.tensor_parallel if engine else 1
    on_cpu = jax.default_backend() == "cpu"
    weights, free = planning.weights_nbytes(config, stored, shards), planning.free_device_bytes(shards)
    expanded = planning.expanded_nbytes(config, stored) // shards if on_cpu else 0
    if engine is None:
        planning.check(planning.MemoryPlan(weights, 0, expanded), 0, free)
        return
    plan = planning.make_plan(config, engine, weights, runtime=planning.RUNTIME if on_cpu else 0)
    plan = dataclasses.replace(plan, activations=plan.activations + expanded)
    planning.check(plan, engine.cache_tokens or planning.served_context(config, engine), free)


def _tokenizer_and_template(file: GGUFFile, config: ModelConfig, source: str) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer.from_gguf(file.metadata)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(f"{source}: {tokenizer.vocab_size} tokens but only {config.vocab_size} embeddings")
    return tokenizer, _chat_template(file, tokenizer)


def _chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
    def text(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    source = file.metadata.get("tokenizer.chat_template") or CHATML
    return ChatTemplate(source, bos_token=text(tokenizer.bos_id), eos_token=text(tokenizer.eos_id))
