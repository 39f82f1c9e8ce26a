"""The command line, ``tars``. This package is the composition root: the only part of `tars_jax` that knows `api`.

Starting must be quick: a command imports what it costs time to import when it runs.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tars_jax.cli import bench, live, optimize, perplexity, plan, quantize, run, server, store, tune
from tars_jax.errors import TarsError

__all__ = ["main", "make_app"]

COMMANDS: tuple[tuple[str, Callable[..., Any], bool], ...] = (  # name, function, whether help leaves it out
    ("serve", server.serve, False),
    ("start", server.serve, True),
    ("run", run.run, False),
    ("pull", store.pull, False),
    ("list", store.list_models, False),
    ("ls", store.list_models, True),
    ("show", store.show, False),
    ("ps", server.running, False),
    ("stop", server.stop, False),
    ("create", store.create, False),
    ("cp", store.copy, False),
    ("rm", store.remove, False),
    ("plan", plan.plan, False),
    ("perplexity", perplexity.perplexity, False),
    ("optimize", optimize.optimize, False),
    ("quantize", quantize.quantize, False),
    ("tune", tune.tune, False),
    ("jobs", live.jobs, False),
    ("versions", live.versions, False),
    ("rollback", live.roll_back, False),
)
GROUPS: tuple[tuple[str, Callable[[], typer.Typer]], ...] = (("bench", bench.make_group),)


def make_app() -> typer.Typer:
    """The commands as one application."""
    app = typer.Typer(
        name="tars",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Run language models.",
    )
    app.callback()(_options)
    for name, function, hidden in COMMANDS:
        app.command(name, hidden=hidden)(function)
    for name, make in GROUPS:
        app.add_typer(make(), name=name)
    return app


def _print_version(on: bool) -> None:
    if on:
        from importlib.metadata import version

        print(f"tars version is {version('tars-jax')}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", "-v", is_eager=True, callback=_print_version, help="Show the version.")] = False,
) -> None:
    """TARS, an inference engine on JAX that speaks Ollama's API."""


def main() -> None:
    """Entry point: one line for every expected error; TARS_DEBUG=1 shows where it came from."""
    try:
        make_app()(arguments(sys.argv[1:]))
    except TarsError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        _close_stdout()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (TARS_DEBUG=1 shows more)", 1)


def arguments(words: list[str]) -> list[str]:
    """``--think`` alone means true: its value is optional, which the parser cannot express."""
    end = words.index("--") if "--" in words else len(words)
    return ["--think=true" if word == "--think" and i < end else word for i, word in enumerate(words)]


def _fail(text: str, code: int) -> None:
    if os.environ.get("TARS_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(code)


def _close_stdout() -> None:
    """Whoever read our output has gone; Python must not complain about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
