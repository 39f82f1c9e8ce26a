"""What the searches of ``tars optimize`` have in common: examples, and where a result is kept."""

import dataclasses
import shlex
import sys
from collections.abc import Callable
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
