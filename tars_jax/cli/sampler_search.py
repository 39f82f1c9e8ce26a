"""``tars optimize --space sampler``: search the sampler settings that suit a task."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tars_jax.cli.output import note
from tars_jax.cli.progress import share_bar
from tars_jax.cli.searching import Task, command
from tars_jax.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from tars_jax.evolve.data import Example
    from tars_jax.evolve.sampler_search import SamplerOutcome
    from tars_jax.loaders.loaded import Model

MODELFILE, REPORT, CHECKPOINT = "Modelfile", "report.json", "search.npz"


@dataclasses.dataclass(frozen=True)
class SamplerRun:
    """A search and what it depends on."""

    strategy: str
    population: int
    batch: int
    samples: int
    max_new_tokens: int
    seed: int

    def execute(self, task: Task, seconds: float, generations: int | None) -> None:
        """Search, check, and write Modelfile and report. Raises InvalidRequest."""
        from tars_jax.evolve.fitness import parse_fitness
        from tars_jax.evolve.sampler_search import answer_scorer
        from tars_jax.loaders.opening import load

        scorer = answer_scorer(parse_fitness(task.fitness, trusted=True))
        before = _settings_of(task.model)
        done = self._generations_done(task, before) if task.resume else 0
        model = load(task.model)
        examples, held = task.examples(model, self.seed)
        examples = examples[: self.batch]
        note(f"{len(examples)} examples of {self.samples} answers, {len(held)} held out")
        task.out.mkdir(parents=True, exist_ok=True)
        if not task.resume:  # a search that ended without a report
            (task.out / CHECKPOINT).unlink(missing_ok=True)
        outcome = self._search(task, model, scorer, examples, held, before, seconds, generations, done)
        self._write(task, outcome)
        note(_verdict(outcome))
        print(task.out)

    def _search(
        self,
        task: Task,
        model: "Model",
        scorer: Any,
        examples: "list[Example]",
        held: "list[Example]",
        before: dict[str, float],
        seconds: float,
        generations: int | None,
        done: int,
    ) -> "SamplerOutcome":
        from tars_jax.evolve.sampler_search import Sampled, search_sampler, serving
        from tars_jax.optim import Budget

        budget = Budget(seconds=seconds, generations=None if generations is None else done + generations)
        with serving(model, [*examples, *held], self.max_new_tokens) as engine, share_bar("generation 0") as show:
            sampled = Sampled(engine, scorer, samples=self.samples, max_tokens=self.max_new_tokens)

            def progress(generation: int, numbers: Mapping[str, float]) -> None:
                share = (generation - done) / generations if generations else 0.0
                show(share, f"generation {generation}  best {numbers['best']:.3f}  mean {numbers['average']:.3f}")

            return search_sampler(
                sampled,
                examples,
                held,
                self._optimizer(),
                budget,
                before=before,
                seed=self.seed,
                checkpoint=task.out / CHECKPOINT,
                progress=progress,
            )

    def _optimizer(self) -> Any:
        from tars_jax.evolve.sampler_search import STEP
        from tars_jax.evolve.searched import OPTIMIZERS
        from tars_jax.optim import Box

        if self.strategy not in OPTIMIZERS:
            raise InvalidRequest(f"strategy of a search of sampler settings must be one of {', '.join(OPTIMIZERS)}, got {self.strategy!r}")
        return OPTIMIZERS[self.strategy](pop_size=self.population, bounds=Box(0.0, 1.0), step=STEP)

    def _depends_on(self, task: Task, before: Mapping[str, float]) -> dict[str, Any]:
        """What must be the same for a search to go on."""
        return {**dataclasses.asdict(self), "fitness": task.fitness, "before": dict(before)}

    def _generations_done(self, task: Task, before: Mapping[str, float]) -> int:
        path = task.out / REPORT
        try:
            record = json.loads(path.read_text("utf-8"))
            theirs, generations = record["settings"], int(record["generations"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{path} is no report of a search to go on with: {getattr(error, 'strerror', None) or error}") from None
        ours = self._depends_on(task, before)
        if changed := [f"{name} {theirs.get(name)!r}" for name in ours if theirs.get(name) != ours[name]]:
            raise InvalidRequest(f"{path} was made with other settings: {', '.join(changed)}")
        return generations

    def _write(self, task: Task, outcome: "SamplerOutcome") -> None:
        from tars_jax.evolve.sampler_search import modelfile

        (task.out / MODELFILE).write_text(modelfile(task.model, outcome.chosen))
        record = {"model": task.model, "command": command(), "accepted": outcome.accepted, "chosen": outcome.chosen}
        record |= dataclasses.asdict(outcome) | {"settings": self._depends_on(task, outcome.before)}
        (task.out / REPORT).write_text(json.dumps(record, indent=1))
        if task.save and outcome.accepted:
            from tars_jax.loaders.adapted import save_with_params

            task.keep(lambda store: save_with_params(store, task.model, outcome.chosen, task.save))


def _settings_of(model: str) -> dict[str, float]:
    """The settings that requests to this model have unless they say otherwise."""
    from tars_jax.config import models_dir
    from tars_jax.evolve.sampler_search import defaults
    from tars_jax.store import Store

    if Path(model).expanduser().is_file():
        return defaults()
    try:
        return defaults(Store(models_dir()).find(model).params)
    except ModelNotFound:  # a preset; or an error, which loading it tells
        return defaults()


def _verdict(outcome: "SamplerOutcome") -> str:
    """What came of it, in a sentence."""
    low, high = outcome.interval
    spent = f"{outcome.generations} generations, {outcome.answers} answers, {outcome.seconds:.0f} s"
    found = f"held-out score {outcome.scores[0]:.3f} to {outcome.scores[1]:.3f}, gain {outcome.gain:+.3f} ({low:+.3f} to {high:+.3f})"
    if outcome.accepted:
        return f"Better settings found in {spent}: {found}."
    return f"The settings stay as they are after {spent}: {found}."
