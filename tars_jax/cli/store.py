"""Commands on the model store: list, show, cp, rm, pull. They need no server and no JAX."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tars_jax.cli.output import human_bytes, human_time, note, table
from tars_jax.errors import InvalidRequest

if TYPE_CHECKING:
    from tars_jax.store import Store, StoredModel

_PARTS = ("license", "modelfile", "parameters", "template", "system")


def _store() -> "Store":
    from tars_jax.config import models_dir
    from tars_jax.store import Store

    return Store(models_dir())


def list_models(prefix: Annotated[str, typer.Argument(help="Only names that begin so.")] = "") -> None:
    """List models."""
    models = [model for model in _store().models() if model.name.short().lower().startswith(prefix.lower())]
    rows = [(model.name.short(), model.digest[:12], _size(model), human_time(model.modified_at)) for model in models]
    print(table(("NAME", "ID", "SIZE", "MODIFIED"), rows))


def _size(model: "StoredModel") -> str:
    return human_bytes(model.size) + (", adapter" if model.adapter_paths else "")


def show(
    model: str,
    license: Annotated[bool, typer.Option("--license", help="Show the license.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Show the Modelfile.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Show the parameters.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Show the template.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Show the system message.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all metadata and tensors.")] = False,
) -> None:
    """Show what a model is."""
    from api import catalog

    chosen = [part for part, on in zip(_PARTS, (license, modelfile, parameters, template, system), strict=True) if on]
    if len(chosen) > 1:
        raise InvalidRequest("only one of '--license', '--modelfile', '--parameters', '--system', or '--template' can be specified")
    answer = catalog.show(_store(), model, verbose=verbose)
    print(answer.get(chosen[0], "") if chosen else describe(answer, verbose=verbose))


def describe(answer: dict[str, Any], *, verbose: bool = False) -> str:
    """An answer of /api/show for people."""
    info, details = answer["model_info"], answer["details"]
    architecture = info.get("general.architecture", "")
    model = {"architecture": architecture, "parameters": details["parameter_size"]}
    model |= {label: info.get(f"{architecture}.{label.replace(' ', '_')}", "") for label in ("context length", "embedding length")}
    model["quantization"] = details["quantization_level"]
    sections = [_section("Model", [f"{label:<20}{value}" for label, value in model.items()])]
    sections.append(_section("Capabilities", answer["capabilities"]))
    if adapters := answer.get("adapters"):
        ranks = [f", rank {a['rank']}" if a["rank"] else "" for a in adapters]
        lines = [f"{a['type']}{rank}, {a['weights']} weights, {human_bytes(a['size'])}" for a, rank in zip(adapters, ranks, strict=True)]
        sections.append(_section("Adapters", lines))
    for title in ("Parameters", "System", "License"):
        if text := answer.get(title.lower()):
            sections.append(_section(title, text.strip().splitlines()[: None if title == "Parameters" else 2]))
    if verbose:
        sections.append(_section("Metadata", [f"{key:<44}{_brief(value)}" for key, value in info.items()]))
        sections.append(_section("Tensors", [f"{t['name']:<44}{t['type']:<8}{t['shape']}" for t in answer["tensors"]]))
    return "\n".join(sections)


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"  {title}", *(f"    {line}" for line in lines), ""])


def _brief(value: Any) -> str:
    return f"[{', '.join(map(str, value[:3]))}, ...+{len(value) - 3} more]" if isinstance(value, list) and len(value) > 3 else str(value)


def copy(source: str, destination: str) -> None:
    """Copy a model."""
    from api.catalog import copy_model

    copy_model(_store(), source, destination)
    note(f"copied '{source}' to '{destination}'")


def create(
    name: str,
    file: Annotated[Path, typer.Option("--file", "-f", help="The Modelfile.")] = Path("Modelfile"),
) -> None:
    """Make a model of another one, or of a GGUF file, by a Modelfile: FROM, PARAMETER, SYSTEM, TEMPLATE, ADAPTER, MESSAGE, LICENSE."""
    from api.options import read_parameters
    from api.prompts import is_go_template
    from tars_jax.hub.create import create as create_model
    from tars_jax.store.modelfile import Modelfile

    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    modelfile = Modelfile.parse(text)
    made = create_model(_store(), name, modelfile, file.parent, read_parameters(modelfile.parameters))
    if is_go_template(modelfile.template):
        note("TEMPLATE is written in Go's language: Ollama reads it, tars goes on with the template of the model's file")
    note(f"created '{made.name.short()}'")


def remove(models: Annotated[list[str], typer.Argument(metavar="MODEL...")]) -> None:
    """Remove models."""
    from api.settings import Settings
    from tars_jax.cli.backends import find_server

    server = find_server(Settings.from_environ())
    store = _store()
    for model in models:
        store.find(model)  # its error, before a server is told to unload it
        if server and server.has(model):
            server.generate({"model": model, "keep_alive": 0})
        store.delete(model)
        note(f"deleted '{model}'")
    if server:
        server.close()


def pull(
    model: str,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plain HTTP.")] = False,
) -> None:
    """Bring a model into the store."""
    from tars_jax import hub
    from tars_jax.cli.progress import show_pull

    show_pull(hub.pull(model, _store(), insecure=insecure))
