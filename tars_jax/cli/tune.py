"""``tars tune``: engine settings that make this machine faster."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from tars_jax.cli.output import note, table
from tars_jax.errors import InvalidRequest


def tune(
    model: Annotated[str, typer.Argument(help="Model, by name or path.")],
    out: Annotated[Path, typer.Option(help="File for the settings, for `tars serve --tuned` or TARS_TUNED.")] = Path("tuned.toml"),
    seconds: Annotated[float, typer.Option(help="Time for measuring; compiling comes on top, minutes on a first run.")] = 120.0,
    inter_token_ms: Annotated[float, typer.Option(help="95 % of the gaps between a stream's tokens shall be below it.")] = 200.0,
    clients: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a measurement.")] = 12,
    input: Annotated[str, typer.Option(help="Tokens of a prompt: 128, 32..128 or lognormal:32..128.")] = "32..128",
    output: Annotated[str, typer.Option(help="Tokens of an answer.")] = "16..48",
    strategy: Annotated[str, typer.Option(help="genetic, annealing, montecarlo or hybrid.")] = "genetic",
    seed: Annotated[int, typer.Option(min=0, help="Of the requests and the search.")] = 0,
) -> None:
    """Find engine settings that are faster on this machine; a default is kept unless a confidence interval excludes zero gain."""
    if not out.parent.is_dir() or out.is_dir():
        raise InvalidRequest(f"cannot write {out}: give --out the name of a file in a folder that exists")
    from tars_jax.load_test.workload import Lengths
    from tars_jax.loaders.opening import load
    from tars_jax.tuning.knobs import write_knobs
    from tars_jax.tuning.measure import Engines, Load
    from tars_jax.tuning.tuner import HEADER, Tuner, rows

    asked = Load(clients, requests, Lengths.parse(input), Lengths.parse(output))
    engines = Engines(load(model), asked)
    with engines.closing(), _display(seconds) as show:
        tuner = Tuner(
            engines.measure,
            clock=engines.clock,
            seconds=seconds,
            max_gap=inter_token_ms / 1000,
            strategy=strategy,
            seed=seed,
            progress=show,
        )
        outcome = tuner.run()
    found = table(HEADER, rows(outcome))
    write_knobs(out, model, outcome.knobs, [f"{clients} clients, prompts of {input} tokens, answers of {output}:", *found.splitlines()])
    print(found)
    kept = f"{len(outcome.knobs)} settings changed" if outcome.knobs else "the defaults stay"
    note(
        f"{out}: {kept}; {outcome.searched} settings searched, {outcome.seconds:.0f} s{' until interrupted' if outcome.interrupted else ''}"
    )


@contextlib.contextmanager
def _display(seconds: float) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; elsewhere a line a measurement."""
    if not sys.stderr.isatty():
        yield lambda what, gone: note(f"[{gone:.0f} s] {what}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task("compiling", total=seconds)
        yield lambda what, gone: bars.update(task, description=what, completed=min(gone, seconds))
