"""``tars perplexity``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tars_jax.cli.output import note
from tars_jax.errors import InvalidRequest


def perplexity(
    model: str,
    file: Annotated[Path, typer.Argument(help="A text file; - is stdin.")],
    ctx: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 512,
    exact: Annotated[bool, typer.Option(help="Unrounded activations; --no-exact computes as the engine does.")] = True,
) -> None:
    """Measure how well a model predicts a text (lower is better)."""
    text = read_text(file)
    from tars_jax.loaders.opening import load
    from tars_jax.perplexity import perplexity as measure

    is_terminal = sys.stderr.isatty()

    def progress(done: int, total: int, value: float) -> None:
        note(f"[{done}/{total}] {value:.4f}", end="\r" if is_terminal and done < total else "\n")

    print(f"perplexity: {measure(load(model), text, context=ctx, exact=exact, progress=progress):.4f}")


def read_text(file: Path) -> str:
    """A text file's text; ``-`` is stdin. Raises InvalidRequest."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
