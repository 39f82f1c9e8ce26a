"""What the searches of ``tars optimize`` have in common: examples, progress, and where a result is kept."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tars_jax.cli.output import note

if TYPE_CHECKING:
    from tars_jax.evolve.data import Example
    from tars_jax.loaders.loaded import Model
    from tars_jax.store import Store, StoredModel


@dataclasses.dataclass(frozen=True)
class Task:
    """What the user asked for: a model made better at the examples of a file. save: a name for the result in the store, if any."""

    model: str
    data: Path
    eval_data: Path | None
    fitness: str
    out: Path
    resume: bool
    save: str

    def examples(self, model: "Model", seed: int) -> "tuple[list[Example], list[Example]]":
        """Examples to search with and held-out ones. Raises InvalidRequest."""
        from tars_jax.evolve.data import read_examples
        from tars_jax.evolve.job import split

        examples = read_examples(self.data, model)
        return (examples, read_examples(self.eval_data, model)) if self.eval_data else split(examples, seed)

    def keep(self, make: "Callable[[Store], StoredModel]") -> None:
        """Make the model that the user wants to have in the store."""
        from tars_jax.config import models_dir
        from tars_jax.store import Store

        note(f"saved as '{make(Store(models_dir())).name.short()}'")


def command() -> str:
    """How the user called it."""
    return shlex.join(["tars", *sys.argv[1:]])


@contextlib.contextmanager
def display() -> Iterator[Callable[[str, float], None]]:
    """Shows a generation: a line about it, and the share of the budget that is spent. A bar on a terminal; elsewhere lines."""
    if not sys.stderr.isatty():
        yield lambda line, share: note(line)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("generation 0", total=1.0)

        yield lambda line, share: bars.update(task, completed=min(share, 1.0), description=line)
