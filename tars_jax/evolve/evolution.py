"""One search, step by step: state in, state out, each step a bounded piece of work.

    evolution = Evolution(model, examples, Settings())
    state = evolution.init()
    while ...:
        state, metrics = evolution.step(state)  # one slice of the population; metrics when a generation is complete
    adapter = evolution.adapter(evolution.centre(state))

`State.log` holds what each generation was told, and is enough to make the state again (`replay`).
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.adapters import Adapter
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.answers import answers
from tars_jax.evolve.batches import ScoreBatch, Sizes, round_up, score_batch, sizes_for
from tars_jax.evolve.data import Example
from tars_jax.evolve.evaluation import Evaluation, general_text, summarise, text_examples
from tars_jax.evolve.fitness import Fitness, parse_fitness
from tars_jax.evolve.scoring import Scores, score, trunk
from tars_jax.evolve.searched import searched
from tars_jax.evolve.settings import Settings
from tars_jax.evolve.space import Space, choose_layers
from tars_jax.evolve.spaces import find
from tars_jax.evolve.strategy import Eggroll, RandomSearch, Strategy
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder

BASIS_EXAMPLES = 64  # examples whose inputs give the directions of the search
SLICE_TOKENS = 1024  # tokens of all members that one step runs through the evolved blocks
HELD_TOKENS = 512  # tokens evaluated at once

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class State:
    """Where a search stands. scored: fitness [n, R] of the slices of this generation; log: what earlier generations told, [P] each."""

    generation: int
    search: Any
    scored: tuple[np.ndarray, ...] = ()
    log: tuple[np.ndarray, ...] = ()
    seconds: float = 0.0  # of work on this generation so far


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A complete generation: fitness of its best member and of all, and the seconds of work it took."""

    generation: int
    best: float
    mean: float
    seconds: float


class Evolution:
    """Searches updates of a model on examples. Nothing changes in it once it is prepared, but what is kept to save time."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        settings: Settings,
        *,
        params: Decoder | None = None,
        strategy: Strategy | None = None,
        fitness: Fitness | None = None,
        other: str | None = None,
        slice_tokens: int | None = None,
    ) -> None:
        """``params``: instead of the model's own, e.g. with an adapter. ``strategy``, ``fitness``: instead of those the settings name.
        ``other``: text whose loss must not rise, instead of `general_text`. ``slice_tokens``: bounds every piece of work, one pair of
        members or one example at least, instead of `SLICE_TOKENS` and `HELD_TOKENS`; all batches then have the same shapes, so that
        nothing is compiled once a generation and an evaluation have been through. Raises InvalidRequest."""
        self.model, self.settings, self.examples = model, settings, list(examples)
        self.params = model.params if params is None else params
        self.strategy = strategy or make_strategy(settings)
        self.fitness = fitness or parse_fitness(settings.fitness)
        layers = choose_layers(settings.layers, model.config)
        self._first = layers[0]
        chunks = text_examples(general_text() if other is None else other, model.tokenizer)
        if len(chunks) < 2 or not self.examples:
            raise InvalidRequest("evolution needs at least one example and 256 tokens of other text")
        self.basis_examples = self.examples[:: -(-len(self.examples) // BASIS_EXAMPLES)]
        self._general = chunks[1::2]
        self._batch_size = min(settings.batch, len(self.examples))
        self._slice_tokens, self._other = slice_tokens, other
        self._space: Space | None = None
        self._finding = find(self.params, model, settings, layers, self.basis_examples, chunks[::2])
        self._trunk: tuple[int, tuple[list[Example], ScoreBatch, jax.Array]] | None = None

    # The search.

    def prepare(self) -> Iterator[None]:
        """Find the space of the search, a bounded piece of work at a time; `init` does what is left of it."""
        for found in self._finding:
            self._space = found
            yield

    @property
    def space(self) -> Space:
        """What is fixed during the search."""
        for _ in self.prepare():
            pass
        assert self._space is not None
        return self._space

    def init(self) -> State:
        """The state before the first generation."""
        return State(0, self.strategy.init(jax.random.key(self.settings.seed), self.start()))

    def start(self) -> jax.Array:
        """No update: zeros [D]."""
        return jnp.zeros(self.space.size, jnp.float32)

    def step(self, state: State) -> tuple[State, Metrics | None]:
        """Score the next slice of the generation; after the last, tell the strategy and give the generation's metrics. Where pieces of
        work are bounded, the frozen blocks are one of their own."""
        began = time.perf_counter()
        is_new = not self._has_batch(state.generation)
        examples, batch, states = self._generation_batch(state.generation)
        if is_new and self._slice_tokens:
            jax.block_until_ready(states)
            return dataclasses.replace(state, seconds=state.seconds + time.perf_counter() - began), None
        first = sum(map(len, state.scored))
        count = min(self._slice(batch), self.strategy.population - first)
        members = self.space.updated(self.params, self.strategy.members(state.search, first, count))
        fitness = self._fitness(members, examples, batch, states, count)[0]
        scored = (*state.scored, fitness)
        if first + count < self.strategy.population:
            seconds = state.seconds + time.perf_counter() - began
            return dataclasses.replace(state, scored=scored, seconds=seconds), None
        whole = np.concatenate(scored)
        values = self.strategy.reduce(whole)
        search = jax.block_until_ready(self.strategy.tell(state.search, values))
        means = whole.mean(axis=1)
        seconds = state.seconds + time.perf_counter() - began
        told = State(state.generation + 1, search, log=(*state.log, values))
        return told, Metrics(told.generation, float(means.max()), float(means.mean()), seconds)

    def generation(self, state: State) -> tuple[State, Metrics]:
        """Steps until a generation is complete."""
        while True:
            state, metrics = self.step(state)
            if metrics is not None:
                return state, metrics

    def replay(self, log: Sequence[np.ndarray]) -> State:
        """The state that told this log, without scoring anything: bit for bit, on the same kind of machine."""
        state = self.init()
        for values in log:
            search = self.strategy.tell(state.search, values)
            state = State(state.generation + 1, search, log=(*state.log, values))
        return state

    def centre(self, state: State) -> jax.Array:
        """The update [D] that the search stands for: its mean, or the best found."""
        return self.strategy.centre(state.search)

    def rehearse(self, held: Sequence[Example]) -> Generator[None, None, Adapter]:
        """Compile whatever a search with these held-out examples runs, a program or a few at a time, and run nothing; returns an
        adapter such as it might find. Each turn must be taken within `programs.rehearsal`."""
        same: dict[str, Any] = {"params": self.params, "strategy": self.strategy, "fitness": self.fitness, "other": self._other}
        twin = Evolution(self.model, self.examples, self.settings, slice_tokens=self._slice_tokens, **same)
        yield from twin.prepare()
        held_out = yield from twin.holding_out(held)
        yield from twin.evaluation(twin.start(), held_out)
        state, metrics = twin.init(), None
        while metrics is None:
            state, metrics = twin.step(state)
            yield
        return twin.adapter(twin.centre(state))

    # What came of it.

    def adapter(self, vector: jax.Array) -> Adapter:
        """An update as what files hold; nothing is rounded or cut off."""
        return self.space.adapter(vector)

    def drift(self, vector: jax.Array) -> float:
        """Norm of an update over the norm of what it changes."""
        return self.space.drift(vector)

    def evaluation(self, vector: jax.Array, held_out: "HeldOut") -> Generator[None, None, Evaluation]:
        """Evaluate an update, a bounded piece of work at each turn."""
        params = self.space.updated(self.params, vector)
        parts: list[tuple[np.ndarray, Scores]] = []
        for examples, batch, states in held_out.task:
            fitness, scores = self._fitness(params, examples, batch, states, 1)
            parts.append((fitness[0], scores))
            yield
        general = []
        for _, batch, states in held_out.general:
            general.append(np.asarray(self._score(params, batch, states, 1).log_probability[0]))
            yield
        sizes = [len(chunk.completion) for chunk in self._general]
        columns = [(fitness, scores.exact[0], scores.log_probability[0]) for fitness, scores in parts]
        fitness, exact, found = (np.concatenate([np.asarray(x) for x in column])[: held_out.count] for column in zip(*columns, strict=True))
        return summarise(fitness, exact, found, np.concatenate(general)[: len(sizes)], sizes, scored=self.fitness.scorer is not None)

    def evaluate(self, vector: jax.Array, held_out: "HeldOut") -> Evaluation:
        """`evaluation` in one go."""
        return _result(self.evaluation(vector, held_out))

    def holding_out(self, examples: Sequence[Example]) -> Generator[None, None, "HeldOut"]:
        """Examples to evaluate with; what the frozen blocks make of them is computed here, once, a bounded piece of work at each turn."""
        held_out = HeldOut([], [], len(examples))
        for kept, part in ((held_out.task, examples), (held_out.general, self._general)):
            for batch in self._batches(part):
                kept.append(jax.block_until_ready(batch))
                yield
        return held_out

    def hold_out(self, examples: Sequence[Example]) -> "HeldOut":
        """`holding_out` in one go."""
        return _result(self.holding_out(examples))

    # Pieces.

    def _batches(self, examples: Sequence[Example]) -> Iterator[tuple[list[Example], ScoreBatch, jax.Array]]:
        """Batches of one size, the last filled up with the first examples."""
        size = min(max((self._slice_tokens or HELD_TOKENS) // max(map(len, examples)), 1), len(examples))
        whole = [*examples, *(examples[i % len(examples)] for i in range(-len(examples) % size))]
        sizes = sizes_for(examples, size) if self._slice_tokens else Sizes()
        return (self._laid_out(whole[i : i + size], sizes) for i in range(0, len(whole), size))

    def _laid_out(self, examples: list[Example], sizes: Sizes) -> tuple[list[Example], ScoreBatch, jax.Array]:
        batch = score_batch(examples, sizes)
        config, dtype = self.model.config, self.model.dtype
        return examples, batch, trunk(self.params, batch.rows, config=config, dtype=dtype, first=self._first)

    def _generation_batch(self, generation: int) -> tuple[list[Example], ScoreBatch, jax.Array]:
        """The generation's examples, and what the frozen blocks make of them: kept, for all slices need it."""
        turn = self._turn(generation)
        if not self._has_batch(generation) or self._trunk is None:
            chosen = np.random.default_rng([self.settings.seed, turn]).choice(len(self.examples), self._batch_size, replace=False)
            self._trunk = turn, self._laid_out([self.examples[i] for i in chosen], self._usual_sizes())
        return self._trunk[1]

    def _turn(self, generation: int) -> int:
        return 0 if self.strategy.same_examples else generation

    def _has_batch(self, generation: int) -> bool:
        return self._trunk is not None and self._trunk[0] == self._turn(generation)

    def _usual_sizes(self) -> Sizes:
        """Sizes that nearly all batches fit in, or all: they then have one shape, and one program."""
        if self._slice_tokens:
            return sizes_for(self.examples, self._batch_size)
        lengths = np.array([len(example) - 1 for example in self.examples])
        return Sizes(tokens=round_up(int(self._batch_size * lengths.mean() + 2 * self._batch_size**0.5 * lengths.std())))

    def _slice(self, batch: ScoreBatch) -> int:
        """Members scored in one step: a divisor of the population, so that all slices are one program."""
        population = self.strategy.population
        fits = self.settings.slice or max((self._slice_tokens or SLICE_TOKENS) // batch.rows.tokens.shape[0], 2)
        return max(count for count in range(2, min(fits, population) + 1, 2) if population % count == 0)

    def _score(self, params: Decoder, batch: ScoreBatch, states: jax.Array, members: int) -> Scores:
        return score(params, states, batch, config=self.model.config, first=self._first, members=members)

    def _fitness(
        self, params: Decoder, examples: list[Example], batch: ScoreBatch, states: jax.Array, members: int
    ) -> tuple[np.ndarray, Scores]:
        """Fitness [members, R] and, for what needs a teacher-forced pass or a single member, scores."""
        scorer = self.fitness.scorer
        scores: Any = self._score(params, batch, states, members) if scorer is None or members == 1 else None
        if scorer is None:
            return np.asarray(scores.exact if self.fitness.kind == "exact" else scores.log_probability), scores
        least = batch.rows.tokens.shape[0] + 1 if self._slice_tokens else 0
        prompts, limit = [e.prompt for e in examples], self.settings.max_new_tokens
        texts = answers(params, self.model, prompts, members=members, max_tokens=limit, least=least)
        values = [[scorer(t, e.prompt_text, e.completion_text) for t, e in zip(row, examples, strict=True)] for row in texts]
        return np.asarray(values, np.float32), scores


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches to evaluate with: of the task, and of other text; ``count`` examples of the task, the rest fills up."""

    task: list[tuple[list[Example], ScoreBatch, jax.Array]]
    general: list[tuple[list[Example], ScoreBatch, jax.Array]]
    count: int


def _result(work: Generator[None, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value


def make_strategy(settings: Settings) -> Strategy:
    """The strategy that the settings name."""
    if settings.strategy == "eggroll":
        return Eggroll(settings.population, settings.sigma, settings.learning_rate, settings.decay, settings.momentum)
    if settings.strategy == "random":
        return RandomSearch(settings.population, settings.sigma)
    return searched(settings)
