"""``tars quantize``: a model's file below a size, with the tensor types that hurt least."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from tars_jax.cli.output import human_bytes, note, table
from tars_jax.cli.perplexity import read_text
from tars_jax.errors import InvalidRequest

_TYPES = "Q4_0,Q4_1,Q5_0,Q5_1,Q4_K,Q5_K,Q6_K,Q8_0"


def quantize(
    model: Annotated[str, typer.Argument(help="Model, by name or path.")],
    limit: Annotated[str, typer.Option(help="Size the file may have at most, e.g. 90MB.")],
    out: Annotated[Path, typer.Option(help="GGUF file to write; a report is put beside it.")],
    text: Annotated[Path | None, typer.Option(help="Text to search with, like what the model is for; some thousand words.")] = None,
    eval_text: Annotated[Path | None, typer.Option("--eval", help="Text to judge with; else a fifth of the other.")] = None,
    types: Annotated[str, typer.Option(help="Tensor types to choose among; IQ4_NL, F16 and BF16 may be named too.")] = _TYPES,
    strategy: Annotated[str, typer.Option(help="genetic, annealing, montecarlo or hybrid.")] = "genetic",
    seconds: Annotated[float, typer.Option(help="Time for the search; preparing and judging come on top.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
) -> None:
    """Choose a tensor type for every matrix so that the file stays below a limit and the model changes least."""
    from api.settings import parse_size

    try:
        allowed = parse_size(limit)
    except ValueError as error:
        raise InvalidRequest(f"--limit: {error}") from None
    if not out.parent.is_dir() or out.is_dir():
        raise InvalidRequest(f"cannot write {out}: give --out the name of a file in a folder that exists")
    from tars_jax.quantization import job
    from tars_jax.quantization.search import Settings, is_quantised

    settings = Settings(allowed, strategy, seconds, seed)
    searched, judged = job.texts(read_text(text) if text else None, read_text(eval_text) if eval_text else None)
    loaded, versions = job.open_source(model, [name.strip().upper() for name in types.split(",") if name.strip()])
    if out.exists() and out.samefile(versions.file.path):
        raise InvalidRequest(f"{out} is the model itself: give --out another name")
    if found := is_quantised(versions):
        note(f"{model} is itself quantised ({', '.join(found)}): what that lost is not won back; better begin with full precision")
    if text is None:
        note("Without --text the built-in text of 700 words is used: enough for a rough choice only")
    with _display() as show:
        outcome = job.search(loaded, versions, settings, searched, judged, show)
    report = job.save(out, versions, outcome, settings, shlex.join(["tars", *sys.argv[1:]]))
    print(table(job.HEADER, list(job.rows(versions, outcome))))
    note(f"{out}: {human_bytes(out.stat().st_size)} of {human_bytes(allowed)} allowed, mix of {outcome.best.name!r}; report in {report}")


@contextlib.contextmanager
def _display() -> Iterator[Callable[[str, float, float], None]]:
    """A bar on a terminal; elsewhere a line a phase."""
    if not sys.stderr.isatty():
        last = ""

        def show(what: str, done: float, total: float) -> None:
            nonlocal last
            if what.partition(":")[0] != last:
                last = what.partition(":")[0]
                note(last)

        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task("opening", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)
