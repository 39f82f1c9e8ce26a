"""Sampler settings that suit a task: a few numbers, searched on answers that an engine samples with them.

All settings answer the same prompts with the same seeds, so that they are compared on the same random numbers. What is found counts only
if held-out prompts, with other seeds, are answered better by more than chance: the 95 % interval (Student's t) of the difference between
the two, prompt by prompt, must lie above zero. Otherwise the settings stay as they are.
"""

import contextlib
import dataclasses
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tars_jax.config import EngineConfig, SamplingParams
from tars_jax.engine.engine import Engine
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.errors import FlatFitness, InvalidRequest, TarsError
from tars_jax.evolve.data import Example
from tars_jax.evolve.fitness import Fitness, Scorer
from tars_jax.loaders.loaded import Model
from tars_jax.optim import Budget, Optimizer, minimize

MIN_HELD_OUT = 6  # with fewer, all of them better could still be chance (a sign test)
OTHER_SEEDS = 1_000_003  # from the seeds of a search to those of its check
STEP = 0.25  # of the first members around the settings as they are, in shares of a setting's range

Progress = Callable[[int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a setting is searched, by a number u from 0 to 1: ``low + (high - low) * u ** power``."""

    low: float
    high: float
    power: float = 1.0  # above 1: finer near ``low``
    digits: int = 3  # what is tried is what a Modelfile says

    def value(self, u: float) -> float:
        return round(self.low + (self.high - self.low) * min(max(u, 0.0), 1.0) ** self.power, self.digits)

    def place(self, value: float) -> float:
        """The inverse; the nearest end for a value outside."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) ** (1 / self.power)


RANGES: Mapping[str, Range] = {
    "temperature": Range(0.0, 2.0, digits=2),
    "top_k": Range(1, 200, power=3, digits=0),
    "top_p": Range(0.05, 1.0),
    "min_p": Range(0.0, 0.5, power=2),
    "repeat_penalty": Range(1.0, 1.5, power=2),
    "presence_penalty": Range(0.0, 1.5, power=2),
    "frequency_penalty": Range(0.0, 1.5, power=2),
}


@dataclasses.dataclass(frozen=True)
class SamplerOutcome:
    """before, best: the settings; search_score: of the best, on the prompts it was searched with; scores: mean on held-out prompts, before
    and with the best; gain: their difference, with its 95 % interval."""

    before: dict[str, float]
    best: dict[str, float]
    search_score: float
    scores: tuple[float, float]
    gain: float
    interval: tuple[float, float]
    generations: int
    answers: int  # sampled, all in all
    seconds: float
    reason: str  # why the search ended
    curve: tuple[tuple[float, float], ...] = ()  # score of a generation's best and mean

    @property
    def accepted(self) -> bool:
        return self.interval[0] > 0

    @property
    def chosen(self) -> dict[str, float]:
        """The settings to use."""
        return self.best if self.accepted else self.before


class Sampled:
    """Scores settings by what an engine answers with them, every number and every prompt in one batch."""

    def __init__(self, engine: Engine, scorer: Scorer, *, samples: int, max_tokens: int) -> None:
        self.engine, self.scorer, self.samples, self.max_tokens = engine, scorer, samples, max_tokens
        self.answers = 0

    def scores(self, candidates: Sequence[Mapping[str, float]], examples: Sequence[Example], seed: int) -> np.ndarray:
        """Mean scores float64 [N, R] of N settings on R prompts over their samples. Prompt and seed alone decide the noise.

        Raises TarsError for a request that fails; whoever is interrupted leaves no request behind.
        """
        outputs: queue.SimpleQueue[tuple[int, int, Output]] = queue.SimpleQueue()
        waiting = [(n, r) for n in range(len(candidates)) for r in range(len(examples))]
        texts: dict[tuple[int, int], list[str]] = {place: [""] * self.samples for place in waiting}
        most = max(self.engine.config.max_queue // self.samples, 1)  # requests under way
        open_requests: dict[int, int] = {}  # answers that have not ended
        places: dict[int, tuple[int, int]] = {}
        try:
            while waiting or open_requests:
                while waiting and len(open_requests) < most:
                    n, r = waiting.pop(0)
                    number = self._submit(candidates[n], examples[r], seed + r * self.samples, outputs)
                    open_requests[number], places[number] = self.samples, (n, r)
                number, index, output = outputs.get()
                if output.error:
                    raise TarsError(output.error)
                texts[places[number]][index] += output.text
                if output.finish_reason:
                    open_requests[number] -= 1
                    self.answers += 1
                    if not open_requests[number]:
                        del open_requests[number]
        finally:
            for number in open_requests:
                self.engine.cancel(number)
        values = [self._mean(texts[n, r], examples[r]) for n in range(len(candidates)) for r in range(len(examples))]
        return np.asarray(values).reshape(len(candidates), -1)

    def _submit(self, settings: Mapping[str, float], example: Example, seed: int, outputs: Any) -> int:
        number = new_request_id()
        params = dataclasses.replace(as_params(settings), max_tokens=self.max_tokens, n=self.samples, seed=seed)
        self.engine.submit(Request(number, example.prompt, params, lambda output: outputs.put((number, output.index, output))))
        return number

    def _mean(self, answers: Sequence[str], example: Example) -> float:
        return math.fsum(self.scorer(answer, example.prompt_text, example.completion_text) for answer in answers) / len(answers)


@contextlib.contextmanager
def serving(model: Model, examples: Sequence[Example], max_tokens: int) -> Iterator[Engine]:
    """An engine for answers to these prompts."""
    context = min(max(len(example.prompt) for example in examples) + max_tokens, model.config.context_length)
    engine = Engine(model, EngineConfig(max_context=context, prompt_lookup=False))
    try:
        yield engine
    finally:
        engine.close()


def as_params(settings: Mapping[str, float]) -> SamplingParams:
    values: dict[str, Any] = {name: int(value) if name == "top_k" else float(value) for name, value in settings.items()}
    return SamplingParams(**values)


def defaults(stored: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The settings as they are: the model's own where it has any, else everybody's."""
    return {name: float((stored or {}).get(name, getattr(SamplingParams, name))) for name in RANGES}


def answer_scorer(fitness: Fitness) -> Scorer:
    """What scores an answer. Raises InvalidRequest for a fitness that reads none."""
    if fitness.scorer is not None:
        return fitness.scorer
    if fitness.kind == "exact":
        return lambda answer, prompt, completion: float(answer.startswith(completion))
    raise InvalidRequest("sampler settings are searched by answers: the fitness must be exact, json, regex:PATTERN or module:function")


def search_sampler(
    sampled: Sampled,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    optimizer: Optimizer[Any],
    budget: Budget,
    *,
    before: Mapping[str, float],
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = lambda generation, numbers: None,
) -> SamplerOutcome:
    """Search on some prompts and check on held-out ones; after an interruption (KeyboardInterrupt) too, if it comes after a generation.

    ``checkpoint``: as in `minimize`. Raises InvalidRequest for too few held-out prompts.
    """
    if len(held_out) < MIN_HELD_OUT:
        raise InvalidRequest(f"sampler settings need at least {MIN_HELD_OUT} held-out examples, there are {len(held_out)}")
    began = time.monotonic()
    seen = _Seen(sampled, examples, seed)
    start = {name: np.float32(limits.place(before[name])) for name, limits in RANGES.items()}
    fixed: dict[str, Any] = {"kind": "population", "driver": "host", "maximize": True, "every": 1, "checkpoint": checkpoint}
    try:
        result = minimize(seen, start, optimizer, budget=budget, key=seed, callback=progress, **fixed)
        seen.found = [(result.fun, settings_at(result.x))]  # of all generations, those before a resumption too
        generations, reason = result.generations, result.reason
    except KeyboardInterrupt:
        if not seen.found:
            raise
        generations, reason = len(seen.found), "interrupted"
    except FlatFitness:
        generations, reason = len(seen.found), "all settings score the same"
    search_score, best = max(seen.found, key=lambda pair: pair[0])
    as_was, with_best = sampled.scores([before, best], held_out, seed + OTHER_SEEDS)
    gain, interval = paired_gain(with_best - as_was)
    return SamplerOutcome(
        before=dict(before),
        best=best,
        search_score=search_score,
        scores=(float(as_was.mean()), float(with_best.mean())),
        gain=gain,
        interval=interval,
        generations=generations,
        answers=sampled.answers,
        seconds=time.monotonic() - began,
        reason=reason,
        curve=tuple(seen.curve),
    )


class _Seen:
    """The fitness of a population, and what it has seen: the best of every generation with its score, and the curve."""

    def __init__(self, sampled: Sampled, examples: Sequence[Example], seed: int) -> None:
        self.sampled, self.examples, self.seed = sampled, examples, seed
        self.found: list[tuple[float, dict[str, float]]] = []
        self.curve: list[tuple[float, float]] = []

    def __call__(self, population: Mapping[str, np.ndarray]) -> np.ndarray:
        count = len(next(iter(population.values())))
        candidates = [settings_at({name: column[i] for name, column in population.items()}) for i in range(count)]
        values = self.sampled.scores(candidates, self.examples, self.seed).mean(axis=1)
        top = int(values.argmax())
        self.found.append((float(values[top]), candidates[top]))
        self.curve.append((float(values[top]), float(values.mean())))
        return values


def settings_at(place: Mapping[str, Any]) -> dict[str, float]:
    """The settings at a place of the search, a number from 0 to 1 for each."""
    return {name: limits.value(float(place[name])) for name, limits in RANGES.items()}


def paired_gain(differences: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The mean of differences [R] and its 95 % interval by Student's t."""
    from scipy.stats import t

    mean, count = float(differences.mean()), len(differences)
    half = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return mean, (mean - half, mean + half)


def modelfile(base: str, settings: Mapping[str, float]) -> str:
    """A Modelfile of a model with these settings, as Ollama reads it."""
    lines = [f"FROM {base}", *(f"PARAMETER {name} {value:g}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"
