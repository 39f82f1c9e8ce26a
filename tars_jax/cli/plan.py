"""``tars plan``: what a model takes of memory, and what fits, before anything is loaded."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tars_jax.cli.output import human_bytes, table
from tars_jax.config import EngineConfig
from tars_jax.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from tars_jax.config import ModelConfig
    from tars_jax.planning import Stored

GPUS = (24, 40, 80, 141)  # GB a device has
DEVICES = (1, 2, 4, 8)
_LISTED = ("BF16", "Q8_0", "Q4_0")  # weights of the list of presets


def plan(
    model: Annotated[str, typer.Argument(help="Model by name or path, or a preset; without one, all presets are listed.")] = "",
    devices: Annotated[int | None, typer.Option(min=1, help="GPUs that share the model; default 1, 2, 4 and 8.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of one request; default 4096, or the model's limit.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Requests at once.")] = EngineConfig.max_rows,
    weights: Annotated[str, typer.Option("--type", help="Type of a preset's weights: BF16, F32, Q8_0, Q4_0, ...")] = "BF16",
    cache_dtype: Annotated[str, typer.Option("--cache", help="Type of the KV cache.")] = "float16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan the memory of a model: weights, KV cache, activations, what fits on how many GPUs."""
    from tars_jax.planning import CACHE_DTYPES

    if cache_dtype not in CACHE_DTYPES:
        raise InvalidRequest(f"--cache takes {', '.join(CACHE_DTYPES)}, got {cache_dtype!r}")
    engine = EngineConfig(max_context=context, max_rows=rows, cache_dtype=cache_dtype)  # type: ignore[arg-type]  # checked above
    if not model:
        listed = _presets(engine)
        print(json.dumps(listed) if as_json else _list(listed))
        return
    report = _report(_Subject(model, weights), engine, (devices,) if devices else DEVICES)
    print(json.dumps(report) if as_json else _text(report))


class _Subject:
    """What is planned: a file, else a model of the store, else a preset."""

    def __init__(self, name: str, weights: str) -> None:
        from tars_jax.loaders.opening import ModelFile
        from tars_jax.presets import PREFIX, find_preset, load_presets

        self._type = weights
        self._file: ModelFile | None = None
        if not name.startswith(PREFIX):
            try:
                self._file = ModelFile.open(name)
            except ModelNotFound as error:
                if name.lower() not in load_presets():
                    raise ModelNotFound(f"{error}; nor is there a preset of that name (`tars plan` lists them)") from None
        self.config: ModelConfig = self._file.config if self._file else find_preset(name).config
        self.title = str(self._file.path) if self._file else find_preset(name).title

    @property
    def type_name(self) -> str:
        return "as in the file" if self._file else self._type.upper()

    def stored(self, form: Any, dtype: str) -> "Stored":
        return self._file.stored(form, dtype) if self._file else _stored(self._type, form, dtype)


def _stored(type_name: str, form: Any, dtype: str) -> "Stored":
    from tars_jax.loaders.blocks import TYPES
    from tars_jax.loaders.params import stored_as

    kind = next((kind for kind in TYPES.values() if kind.name == type_name.upper()), None)
    if kind is None:
        raise InvalidRequest(f"--type takes a GGUF tensor type ({', '.join(kind.name for kind in TYPES.values())}), got {type_name!r}")
    return stored_as(kind, form, dtype)


def _report(subject: _Subject, engine: EngineConfig, devices: tuple[int, ...]) -> dict[str, Any]:
    from tars_jax import planning

    config, context = subject.config, planning.served_context(subject.config, engine)
    gpu = subject.stored("packed", "bfloat16")
    whole = planning.make_plan(config, engine, planning.weights_nbytes(config, gpu))
    return {
        "model": subject.title,
        "parameters": planning.num_parameters(config),
        "weights": subject.type_name,
        "weights_bytes": whole.weights,
        "cache_dtype": engine.cache_dtype,
        "cache_bytes_per_token": whole.cache_per_token,
        "activations_bytes": whole.activations,
        "step_tokens": engine.max_step_tokens,
        "context": context,
        "rows": engine.max_rows,
        "devices": {str(count): _on_gpus(config, gpu, engine, count) for count in devices},
        "machine": _on_this_machine(subject, engine),
    }


def _on_gpus(config: "ModelConfig", stored: "Stored", engine: EngineConfig, count: int) -> dict[str, Any]:
    """What each of several devices needs, and how many requests of a whole context fit at once, by GB of a device."""
    import dataclasses

    from tars_jax import planning

    context, engine = planning.served_context(config, engine), dataclasses.replace(engine, tensor_parallel=count)
    try:
        plan = planning.make_plan(config, engine, planning.weights_nbytes(config, stored, count))
    except InvalidRequest as error:
        return {"error": str(error)}
    sizes = {str(size): max(plan.room(int(size * 1e9 * planning.USABLE)) // context, 0) for size in GPUS}
    return {"weights_bytes": plan.weights, "needed_bytes": plan.total(engine.max_rows * context), "requests": sizes}


def _on_this_machine(subject: _Subject, engine: EngineConfig) -> dict[str, Any]:
    import jax

    from tars_jax import planning
    from tars_jax.loaders.opening import choose_form, compute_dtype

    config, dtype = subject.config, compute_dtype()
    weights = planning.weights_nbytes(config, subject.stored(choose_form(config, dtype), dtype))
    plan = planning.make_plan(config, engine, weights, runtime=planning.RUNTIME if jax.default_backend() == "cpu" else 0)
    free, context = planning.free_device_bytes(), planning.served_context(config, engine)
    return {
        "device": jax.devices()[0].device_kind,
        "free_bytes": free,
        "weights_bytes": plan.weights,
        "needed_bytes": plan.total(engine.max_rows * context),
        "requests": max(plan.room(free) // context, 0),
    }


def _text(report: dict[str, Any]) -> str:
    context, rows, token, machine = report["context"], report["rows"], report["cache_bytes_per_token"], report["machine"]
    facts = {
        "parameters": f"{report['parameters']:,}",
        "weights": f"{human_bytes(report['weights_bytes'])} ({report['weights']})",
        "KV cache": f"{human_bytes(token)} a token ({report['cache_dtype']}), {human_bytes(token * context)} for {context} tokens",
        "activations": f"{human_bytes(report['activations_bytes'])} for a step of {report['step_tokens']} tokens",
    }
    counts = report["devices"]
    needed = (f"needed on each for {rows}", *(_needed(cell) for cell in counts.values()))
    fitting = [(f"fit at once on {size} GB", *(_fitting(cell, str(size)) for cell in counts.values())) for size in GPUS]
    lines = [report["model"], *(f"  {label:<14}{value}" for label, value in facts.items()), ""]
    lines += [f"Requests of {context} tokens", table(("GPUS", *counts), [needed, *fitting]), ""]
    sizes = {key: human_bytes(machine[f"{key}_bytes"]) for key in ("free", "weights", "needed")}
    lines.append(
        f"This machine ({machine['device']}, {sizes['free']} free): weights take {sizes['weights']}, "
        f"{rows} requests {sizes['needed']} in all; {machine['requests'] or 'none'} would fit at once"
    )
    return "\n".join(lines)


def _needed(cell: dict[str, Any]) -> str:
    return "cannot be split" if "error" in cell else human_bytes(cell["needed_bytes"])


def _fitting(cell: dict[str, Any], size: str) -> str:
    return "-" if "error" in cell or not cell["requests"][size] else str(cell["requests"][size])


def _presets(engine: EngineConfig) -> list[dict[str, Any]]:
    from tars_jax import planning
    from tars_jax.presets import load_presets

    return [
        {
            "name": name,
            "model": preset.title,
            "parameters": planning.num_parameters(preset.config),
            "layers": preset.config.num_layers,
            "width": preset.config.hidden_size,
            "context": preset.config.context_length,
            "weights_bytes": {kind: planning.weights_nbytes(preset.config, _stored(kind, "packed", "bfloat16")) for kind in _LISTED},
            "cache_bytes_per_token": planning.cache_nbytes_per_token(preset.config, engine.cache_dtype),
        }
        for name, preset in load_presets().items()
    ]


def _list(presets: list[dict[str, Any]]) -> str:
    rows = []
    for preset in presets:
        shape = [str(preset[key]) for key in ("layers", "width", "context")]
        sizes = [human_bytes(size) for size in (*preset["weights_bytes"].values(), preset["cache_bytes_per_token"])]
        rows.append((preset["name"], f"{preset['parameters']:,}", *shape, *sizes))
    return table(("NAME", "PARAMETERS", "LAYERS", "WIDTH", "CONTEXT", *_LISTED, "KV CACHE/TOKEN"), rows)
