"""A search beside serving: slices so short that they fit between two steps of an engine, and improvements while it goes on.

`compile_ahead` compiles everything, in a thread of its own; `search` then only runs what is there, a slice at each turn, from the first
look at the examples on.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from tars_jax.adapters import Adapter
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.data import Example
from tars_jax.evolve.evaluation import Evaluation, refusal, wilson
from tars_jax.evolve.evolution import Evolution, Metrics
from tars_jax.evolve.programs import rehearsal

SLICE_TOKENS = 128  # of all members; about 50 ms for the default model on two cores
BATCH_TOKENS = 128  # that a member is scored on, unless the batch is given
MAX_EXAMPLE_TOKENS = 512  # one example is never split between slices
PATIENCE = 3  # checks in a row that cost other text too much, after which a search ends

Stopped = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a search ends: after so many seconds or generations, or when the held-out score reaches the target. check_every: generations
    between two held-out checks. general_loss: of the model as it came, which what is found must not exceed by more than 2 %; None: that
    of the weights the search starts from."""

    seconds: float = 120.0
    generations: int | None = None
    target: float = 1.0
    check_every: int = 4
    general_loss: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 86_400:
            raise InvalidRequest(f"seconds must be above 0 and at most 86400, got {self.seconds:g}")
        if self.generations is not None and self.generations < 1:
            raise InvalidRequest(f"generations must be at least 1, got {self.generations}")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a slice has completed: the evaluation of the weights as they are, a generation, or a held-out check of its update.
    improvement: an update to be served from now on; refused: why the one checked is not taken."""

    before: Evaluation | None = None
    metrics: Metrics | None = None
    check: Evaluation | None = None
    improvement: jax.Array | None = None
    refused: str | None = None


def batch_size(examples: Sequence[Example], most: int = 6) -> int:
    """Examples to score a member on, so that a slice stays short."""
    return max(1, min(most, BATCH_TOKENS // max(map(len, examples))))


def check_lengths(examples: Sequence[Example], source: str) -> None:
    """Raise InvalidRequest for an example that would make a slice too long."""
    for number, example in enumerate(examples, 1):
        if len(example) > MAX_EXAMPLE_TOKENS:
            raise InvalidRequest(
                f"{source}: item {number} has {len(example)} tokens; beside serving an example may have {MAX_EXAMPLE_TOKENS}, "
                "`tars optimize` takes longer ones"
            )


def compile_ahead(evolution: Evolution, held: Sequence[Example], stopped: Stopped) -> Adapter | None:
    """Compile all that `search` runs; an adapter like those it may find, or None if it was stopped meanwhile. ``evolution`` has been
    given `SLICE_TOKENS`."""
    pieces = evolution.rehearse(held)
    with rehearsal():
        while not stopped():
            try:
                next(pieces)
            except StopIteration as end:
                adapter: Adapter = end.value
                return adapter
    return None


def search(
    evolution: Evolution, held: Sequence[Example], limits: Limits, stopped: Stopped, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report | None]:
    """Find the directions, evaluate the weights as they are, then run generations until a limit is reached or it is ``stopped``; a slice
    at each turn, and what a slice has completed is reported. The time limit counts from the first generation on.

    An update is an improvement, while the search goes on, if its held-out score is better than that of the weights served by more than
    chance (the lower end of its 95 % interval); at the end the best one is, if it is better at all. Either way other text must not suffer.
    """
    slices = _search(evolution, held, limits, clock)
    while not stopped():
        try:
            report = next(slices)
        except StopIteration:
            return
        if not stopped():
            yield report


def _search(evolution: Evolution, held: Sequence[Example], limits: Limits, clock: Callable[[], float]) -> Iterator[Report | None]:
    yield from evolution.prepare()
    held_out = yield from evolution.holding_out(held)
    before = yield from evolution.evaluation(evolution.start(), held_out)
    yield Report(before=before)
    guard, state = _Guard(before, limits), evolution.init()
    deadline, checked = clock() + limits.seconds, 0
    while True:
        ended = clock() >= deadline or state.generation == limits.generations
        if state.generation > checked and (ended or state.generation % limits.check_every == 0):
            vector, checked = evolution.centre(state), state.generation
            yield guard.judge(vector, (yield from evolution.evaluation(vector, held_out)))
        if ended or guard.is_done:
            break
        metrics = None
        while metrics is None and clock() < deadline:
            state, metrics = evolution.step(state)
            yield Report(metrics=metrics) if metrics else None
    if improvement := guard.last():
        yield improvement


class _Guard:
    """Decides what is taken."""

    def __init__(self, before: Evaluation, limits: Limits) -> None:
        self._served, self._limits = before, limits
        self._general_loss = before.general_loss if limits.general_loss is None else limits.general_loss
        self._best: tuple[jax.Array, Evaluation] | None = None  # of those that could be taken, but are not served yet
        self._too_costly = 0

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to gain."""
        best = self._best[1] if self._best else self._served
        return best.score >= self._limits.target or self._too_costly >= PATIENCE

    def judge(self, vector: jax.Array, found: Evaluation) -> Report:
        """What to do with an update that was checked."""
        refused = refusal(dataclasses.replace(self._served, general_loss=self._general_loss), found)
        too_costly = refused is not None and found.better_than(self._served)
        self._too_costly = self._too_costly + 1 if too_costly else 0
        if refused:
            return Report(check=found, refused=refused)
        if wilson(found.score * found.examples, found.examples)[0] > self._served.score:
            self._served, self._best = found, None
            return Report(check=found, improvement=vector)
        if self._best is None or found.better_than(self._best[1]):
            self._best = vector, found
        return Report(check=found)

    def last(self) -> Report | None:
        """The best that was only a little better."""
        if self._best is None or not self._best[1].better_than(self._served):
            return None
        return Report(check=self._best[1], improvement=self._best[0])
