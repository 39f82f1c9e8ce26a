"""``tars run``: one answer, or a chat."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tars_jax.cli.session import Session
from tars_jax.errors import InvalidRequest

if TYPE_CHECKING:
    from tars_jax.cli.backends import Backend

_NumberOption = Annotated[float | None, typer.Option()]
_CountOption = Annotated[int | None, typer.Option()]
_Flag = Annotated[bool, typer.Option()]


def run(
    model: Annotated[str, typer.Argument(help="Name of the model; it is pulled if it is not here.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; without it a chat begins.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among tokens of this total probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest token.")] = None,
    repeat_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same answer again.")] = None,
    num_predict: Annotated[int | None, typer.Option(help="Most tokens of the answer.")] = None,
    num_ctx: Annotated[int | None, typer.Option(help="Tokens of the context window.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    format: Annotated[str, typer.Option(help='"json", or a JSON schema.')] = "",
    keep_alive: Annotated[str | None, typer.Option("--keep-alive", "--keepalive", help="How long the model stays loaded, e.g. 5m.")] = None,
    think: Annotated[str | None, typer.Option(help="true, false, or a level; alone it means true.")] = None,
    hidethinking: Annotated[bool, typer.Option("--hidethinking", help="Do not show the thinking.")] = False,
    nowordwrap: Annotated[bool, typer.Option("--nowordwrap", help="Do not wrap lines at words.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show timings.")] = False,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="LoRA, norms or a control vector: PEFT folder, GGUF file or result of `tars optimize`.")
    ] = None,
    save: Annotated[str, typer.Option(metavar="NAME", help="Keep the model and its adapters in the store, as NAME.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", hidden=True)] = False,
) -> None:
    """Run a model: the answer goes to stdout, everything else to stderr."""
    from api.settings import Settings
    from tars_jax.cli import backends

    if model.endswith(".gguf") and Path(model).is_file():
        raise InvalidRequest(f"{model} is a file; to give it a name, write 'FROM {model}' to Modelfile: tars create NAME -f Modelfile")
    text, is_chat = _prompt(prompt or [])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": repeat_penalty}
    options |= {"seed": seed, "num_predict": num_predict, "num_ctx": num_ctx}
    settings = Settings.from_environ()
    if adapter or save:  # in this process: a server has no way to be told
        backend: Backend = backends.open_local(settings, () if save else adapter or ())
    else:
        backend = backends.open_backend(settings)
    session = Session(
        backend=backend,
        model=model,
        options={name: value for name, value in options.items() if value is not None},
        system=system,
        format=read_format(format),
        think=read_think(think),
        keep_alive=keep_alive,
        verbose=verbose,
        hides_thinking=hidethinking,
        wraps=not nowordwrap,
        keeps_history=not settings.no_history,
    )
    try:
        if save:
            session.save_as(save, adapter or [], settings.models)
        session.load()
        _talk(session, text, is_chat)
    finally:
        session.backend.close()


def _talk(session: Session, text: str, is_chat: bool) -> None:
    if is_chat:
        from tars_jax.cli.repl import chat

        chat(session)
    elif text:
        session.wraps = session.wraps and sys.stdin.isatty()
        session.ask(text)


def _prompt(words: list[str]) -> tuple[str, bool]:
    """The prompt, and whether there is none and somebody sits at the keyboard. What is piped in goes in front, as in Ollama."""
    if sys.stdin is None or sys.stdin.isatty():
        return " ".join(words), not words
    piped = sys.stdin.read()
    return " ".join([piped, *words] if piped else words), False


def read_format(text: str) -> Any:
    """``json`` or a schema. Raises InvalidRequest for text that is neither."""
    if not text.lstrip().startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--format is no JSON schema: {error}") from None


def read_think(text: str | None) -> bool | str | None:
    """A boolean as Go reads it, else a level, which the API checks."""
    if text is None:
        return None
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
