"""A whole run: from settings and files to a folder with the best update found, and what is to be said about it.

`search` yields its progress, so that whoever runs it can show it, stop it, or do something else in between.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.evolve.data import Example
from tars_jax.evolve.evaluation import Evaluation, refusal
from tars_jax.evolve.evolution import Evolution, HeldOut, Metrics, State
from tars_jax.evolve.seed_log import check_model, data_digest, read_seed_log, write_seed_log

SEED_LOG, REPORT = "seeds.json", "report"
HELD_BACK = 5  # without held-out data, one in so many examples is kept from the search
PATIENCE = 3  # evaluations in a row that cost other text too much, after which a search ends


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a search ends: after so many seconds or generations (None: no limit), or when the held-out score reaches the target."""

    seconds: float | None = None
    generations: int | None = None
    target: float = 1.0
    evaluate_every: int = 2  # generations

    def __post_init__(self) -> None:
        if (self.seconds or 1) <= 0 or (self.generations or 1) < 1 or self.evaluate_every < 1:
            raise InvalidRequest("seconds, generations and evaluate-every must be positive")


@dataclasses.dataclass(frozen=True)
class Point:
    """One generation of the curves. evaluation: None where none was due; drift: norm of the update over that of the weights."""

    metrics: Metrics
    elapsed: float  # seconds since the search began
    drift: float
    evaluation: Evaluation | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a search has come to so far. best: the best acceptable update, None before there is one, found after so many generations."""

    before: Evaluation
    state: State
    points: tuple[Point, ...] = ()
    best: jax.Array | None = None
    after: Evaluation | None = None
    best_generation: int = 0
    seconds: float = 0.0
    refused: str | None = None  # why the last update evaluated could not be taken


def split(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to search with and, where there are no others, held-out ones."""
    if len(examples) < 2:
        raise InvalidRequest("one example cannot be both searched with and held out: give more, or held-out data")
    held = max(len(examples) // HELD_BACK, 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in sorted(order[held:])], [examples[i] for i in sorted(order[:held])]


def search(evolution: Evolution, held_out: HeldOut, budget: Budget, state: State | None = None) -> Iterator[Outcome]:
    """Run generations within a budget, from the start or from a logged state, and yield the outcome after each."""
    began = time.monotonic()
    state = state or evolution.init()
    outcome = Outcome(evolution.evaluate(evolution.start(), held_out), state)
    if state.generation:
        outcome = _evaluated(evolution, held_out, outcome)
    yield outcome
    first, too_costly = state.generation, 0
    while not _spent(budget, began, state.generation - first) and too_costly < PATIENCE and not _reached(outcome, budget):
        state, metrics = evolution.generation(state)
        last = _spent(budget, began, state.generation - first)
        point = Point(metrics, time.monotonic() - began, evolution.drift(evolution.centre(state)))
        outcome = dataclasses.replace(outcome, state=state, points=(*outcome.points, point), seconds=time.monotonic() - began)
        if last or state.generation % budget.evaluate_every == 0:
            outcome = _evaluated(evolution, held_out, outcome)
            too_costly = too_costly + 1 if outcome.refused and "other text" in outcome.refused else 0
        yield outcome


def concluded(evolution: Evolution, held_out: HeldOut, outcome: Outcome) -> Outcome:
    """The outcome of a search that was stopped: its last generation is evaluated too."""
    return outcome if not outcome.points or outcome.points[-1].evaluation else _evaluated(evolution, held_out, outcome)


def _evaluated(evolution: Evolution, held_out: HeldOut, outcome: Outcome) -> Outcome:
    """The outcome with the state's update evaluated, and taken if it is acceptable and the best so far."""
    vector = evolution.centre(outcome.state)
    found = evolution.evaluate(vector, held_out)
    points = outcome.points
    if points:
        points = (*points[:-1], dataclasses.replace(points[-1], evaluation=found))
    refused = refusal(outcome.before, found)
    outcome = dataclasses.replace(outcome, points=points, refused=refused)
    if refused or (outcome.after is not None and not found.better_than(outcome.after)):
        return outcome
    return dataclasses.replace(outcome, best=vector, after=found, best_generation=outcome.state.generation)


def _spent(budget: Budget, began: float, generations: int) -> bool:
    if budget.generations is not None and generations >= budget.generations:
        return True
    return budget.seconds is not None and time.monotonic() - began >= budget.seconds


def _reached(outcome: Outcome, budget: Budget) -> bool:
    return outcome.after is not None and outcome.after.score >= budget.target


def save(folder: Path, evolution: Evolution, outcome: Outcome, command: str = "") -> None:
    """Write the result: the adapter, where there is one, as a GGUF file and as a PEFT folder (which steering vectors have no form
    for), the seed log, the report."""
    from tars_jax.evolve.report import as_html, as_json
    from tars_jax.loaders.gguf_adapter import write_gguf_adapter
    from tars_jax.loaders.peft import write_peft

    folder.mkdir(parents=True, exist_ok=True)
    vector = evolution.centre(outcome.state) if outcome.best is None else outcome.best
    generation = outcome.best_generation if outcome.best is not None else outcome.state.generation
    write_seed_log(folder / SEED_LOG, evolution, outcome.state, generation, vector)
    if outcome.best is not None:
        adapter = evolution.adapter(outcome.best)
        if not adapter.steering:
            write_peft(folder / "adapter", adapter, evolution.model.name)
        write_gguf_adapter(folder / "adapter.gguf", adapter, evolution.model.config)
    (folder / f"{REPORT}.json").write_text(as_json(evolution, outcome, command))
    (folder / f"{REPORT}.html").write_text(as_html(evolution, outcome, command))


def resume(folder: Path, evolution: Evolution) -> State:
    """The state that an earlier run, saved in this folder, ended with. Raises InvalidRequest if it was another run."""
    path = folder / SEED_LOG
    record = read_seed_log(path)
    check_model(record, evolution.model, path)
    if record["settings"] != evolution.settings:
        theirs, ours = (dataclasses.asdict(settings) for settings in (record["settings"], evolution.settings))
        changed = ", ".join(f"{name} {theirs[name]!r}" for name in theirs if theirs[name] != ours[name])
        raise InvalidRequest(f"{path} was made with other settings: {changed}")
    if record["data_sha256"] != data_digest(evolution.examples):
        raise InvalidRequest(f"{path} was made with other examples")
    return evolution.replay(record["log"])
