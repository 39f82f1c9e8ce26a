"""The search for a mix of tensor types, from the measured importance of inputs to the judge on held-out text.

1. One pass over some text measures the mean square of every matrix's inputs; scales are fitted and errors weighted by it.
2. The error of a matrix in a type is sum(dW^2 E[x^2]). What such an error costs differs between kinds of matrices and depths, so for
   each group the divergence is measured once with this group alone in its crudest type: errors times these slopes are predicted costs.
3. They add up, so a knapsack gives the mix that should be best within the limit.
4. An optimizer searches corrections of the slopes: a member is a factor for each group, what it stands for the knapsack's mix under the
   corrected costs. So every member keeps the limit exactly, and differs from the others in what the prediction may be wrong about.
5. On held-out text the mixes found compete with every uniform type that fits.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tars_jax.errors import FlatFitness, InvalidRequest
from tars_jax.evolve.searched import OPTIMIZERS
from tars_jax.intervals import mean_interval
from tars_jax.model import Decoder
from tars_jax.optim import Box, Budget, minimize
from tars_jax.quantization.knapsack import choose
from tars_jax.quantization.loss import Divergence, chunk_losses, mean_squares
from tars_jax.quantization.versions import IDS, Versions

BANDS = ("early", "middle", "late")  # thirds of the depth
BOUND, STEP = 4.0, 0.7  # of the logarithms of the factors that are searched
SAMPLE_TOKENS, IMPORTANCE_TOKENS, HELD_OUT_TOKENS = 512, 4096, 4096  # on which candidates are compared; inputs measured; mixes judged
POPULATION = 8
Mix = tuple[int, ...]  # an option for every matrix
Progress = Callable[[str, float, float], None]  # what is being done, how much of it is done, of how much


@dataclasses.dataclass(frozen=True)
class Settings:
    """limit: bytes of the file; seconds: of the optimizer's search, without what comes before and after it."""

    limit: int
    strategy: str = "genetic"
    seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in OPTIMIZERS:
            raise InvalidRequest(f"strategy {self.strategy!r} is none of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.seconds < math.inf:
            raise InvalidRequest(f"seconds must be 0 or more, got {self.seconds:g}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mix and what is known of it. divergence: nats a token on the sample; losses: nats a token of each held-out chunk."""

    name: str
    mix: Mix
    size: int
    divergence: float = math.nan
    losses: np.ndarray | None = None

    @property
    def perplexity(self) -> float:
        return math.nan if self.losses is None else math.exp(float(self.losses.mean()))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the perplexity, 95 %, over the held-out chunks."""
        if self.losses is None:
            return math.nan, math.nan
        low, high = mean_interval(self.losses)
        return math.exp(low), math.exp(min(high, 700.0))

    def change(self, other: "Candidate") -> tuple[float, float, float]:
        """Its perplexity over another's, less 1, and the 95 % interval of that: chunk by chunk."""
        assert self.losses is not None
        assert other.losses is not None
        difference = self.losses - other.losses
        return tuple(math.expm1(min(x, 700.0)) for x in (float(difference.mean()), *mean_interval(difference)))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a search came to. candidates: best first; source: the file as it is, for comparison; slopes: nats per error by group."""

    candidates: tuple[Candidate, ...]
    source: Candidate
    slopes: dict[str, float]
    evaluations: int
    seconds: float  # of the optimizer's search
    interrupted: bool
    history: tuple[tuple[float, float], ...]  # seconds and divergence of every improvement

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


class Search:
    """A search on a model's file. ``base``: its parameters, dense float32, of which the matrices are replaced."""

    def __init__(self, versions: Versions, base: Decoder, settings: Settings, progress: Progress = lambda *_: None) -> None:
        """Raises InvalidRequest for a limit that no mix keeps."""
        self.versions, self.base, self.settings, self._show = versions, base, settings, progress
        self.room = settings.limit - versions.fixed
        least = versions.fixed + int(versions.sizes.min(axis=1).sum())
        if least > settings.limit:
            raise InvalidRequest(
                f"no mix of {', '.join(versions.types)} fits {settings.limit} bytes: the smallest file is {least} bytes, "
                f"{versions.fixed} of them the header and what is not quantised; raise the limit or allow smaller types"
            )
        self.groups = [_group(versions, i) for i in range(len(versions.matrices))]
        self.known: dict[Mix, float] = {}  # divergences
        self.history: list[tuple[float, float]] = []

    def run(self, text: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> Outcome:
        """``text``, ``held_out``: chunks of tokens, each of one length, a power of two. An interrupt (Ctrl-C) once there is a mix to keep
        ends the search, or the judging, with what there is."""
        versions = self.versions
        self._show("reading the text", 0, 1)
        versions.importance.update(mean_squares(self.base, versions.config, spread(text, IMPORTANCE_TOKENS)))
        self.divergence = Divergence.of(self._params(self._source), versions.config, spread(text, SAMPLE_TOKENS))
        costs = self._errors()
        slopes = self._slopes(costs)
        self.costs = costs * np.array([slopes[group] for group in self.groups])[:, None]
        start = self._mix()
        began, interrupted = time.monotonic(), False
        try:
            self._evaluate(start)
            self._optimise(began)
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.monotonic() - began
        best = min(self.known, key=lambda mix: self.known[mix], default=start)
        found = ([Candidate("search", best, 0)] if best != start else []) + [Candidate("knapsack", start, 0)]
        candidates, source, stopped = self._judged([*found, *self._uniform()], held_out)
        evaluations = len(self.known)
        return Outcome(candidates, source, slopes, evaluations, seconds, interrupted or stopped, tuple(self.history))

    @property
    def _source(self) -> Mix:
        return (self.versions.kept,) * len(self.versions.matrices)

    def _params(self, mix: Mix) -> Decoder:
        return self.versions.params(self.base, mix)

    def _errors(self) -> np.ndarray:
        """Errors of every matrix under every option [M, T]."""
        rows = []
        for i in range(len(self.versions.matrices)):
            self._show("trying types", i, len(self.versions.matrices))
            rows.append(self.versions.costs(i))
        return np.array(rows)

    def _slopes(self, errors: np.ndarray) -> dict[str, float]:
        """Divergence for a unit of error in each group; a group without any error in any type has the mean of the others."""
        names = list(dict.fromkeys(self.groups))
        slopes: dict[str, float] = {}
        for done, name in enumerate(names):
            self._show("measuring what errors cost", done, len(names))
            mix, total = list(self._source), 0.0
            for i, group in enumerate(self.groups):
                if group == name:
                    known = np.where(np.isfinite(errors[i]), errors[i], 0.0)
                    mix[i] = int(known.argmax())
                    total += float(known.max())
            if total > 0:
                slopes[name] = max(self.divergence(self._params(tuple(mix))), 0.0) / total
        mean = float(np.mean(list(slopes.values()))) if slopes else 1.0
        return {name: max(slopes.get(name, mean), 1e-6 * mean) for name in names}

    def _mix(self, factors: dict[str, float] | None = None) -> Mix:
        """The knapsack's mix, with the groups' costs times ``exp(factors)``."""
        logs = np.array([(factors or {}).get(group, 0.0) for group in self.groups])
        return tuple(choose(self.costs * np.exp(logs)[:, None], self.versions.sizes, self.room).tolist())

    def _evaluate(self, mix: Mix) -> float:
        if mix not in self.known:
            value = self.divergence(self._params(mix))
            self.known[mix] = value if math.isfinite(value) else math.inf
        return self.known[mix]

    def _optimise(self, began: float) -> None:
        """Search the groups' factors until the time is over."""
        names, deadline = list(dict.fromkeys(self.groups)), began + self.settings.seconds
        best = min(self.known.values())
        self.history.append((time.monotonic() - began, best))

        def fitness(vector: Any) -> float:
            nonlocal best
            if time.monotonic() >= deadline:
                raise _TimeOverError
            found = self._evaluate(self._mix(dict(zip(names, np.asarray(vector).tolist(), strict=True))))
            now = time.monotonic() - began
            if found < best:
                best = found
                self.history.append((now, best))
            self._show(f"searching: {len(self.known)} mixes, divergence {best:.5f}", min(now, self.settings.seconds), self.settings.seconds)
            return found

        if not self.settings.seconds or len(names) < 2:
            return
        optimizer = OPTIMIZERS[self.settings.strategy](pop_size=POPULATION, bounds=Box(-BOUND, BOUND), step=np.float32(STEP))
        with contextlib.suppress(_TimeOverError, FlatFitness):  # flat: the limit leaves no choice
            budget = Budget(seconds=self.settings.seconds)
            start = np.zeros(len(names), np.float32)
            minimize(fitness, start, optimizer, budget=budget, key=self.settings.seed, kind="individual", driver="host")

    def _uniform(self) -> Iterator[Candidate]:
        """Every type alone that fits; and with an 8-bit embedding or output head, as llama.cpp mixes it."""
        versions, matrices = self.versions, self.versions.matrices
        heads = {i for i, matrix in enumerate(matrices) if matrix.leaf == ("lm_head" if self.base.lm_head is not None else "embed")}
        eight = versions.types.index("Q8_0") if "Q8_0" in versions.types else None
        seen = set()
        for option, name in enumerate(versions.types):
            mixes = [(name, tuple(option for _ in matrices))]
            if eight not in (None, option):
                mixes.append((f"{name}, head Q8_0", tuple(eight if i in heads else option for i in range(len(matrices)))))  # type: ignore[misc]
            for label, mix in mixes:
                types = tuple(versions.type_of(i, o) for i, o in enumerate(mix))
                if versions.file_size(mix) <= self.settings.limit and types not in seen:  # a fallback may be another type's mix
                    seen.add(types)
                    yield Candidate(label, mix, 0)

    def _judged(self, candidates: Sequence[Candidate], held_out: Sequence[Sequence[int]]) -> tuple[tuple[Candidate, ...], Candidate, bool]:
        """Candidates with their held-out losses, best first; the source; whether an interrupt left some out."""
        chunks = spread(held_out, HELD_OUT_TOKENS)
        judged: list[Candidate] = []
        source = Candidate("source", self._source, self.versions.file_size(self._source))
        total, done = len(chunks) * (len(candidates) + 1), 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._show("judging on held-out text", done, total)

        def judge(candidate: Candidate) -> Candidate:
            params = self._params(candidate.mix)
            return dataclasses.replace(
                candidate,
                size=self.versions.file_size(candidate.mix),
                divergence=self.known.get(candidate.mix, math.nan) if candidate.name != "source" else 0.0,
                losses=chunk_losses(params, self.versions.config, chunks, advance),
            )

        try:
            for candidate in candidates:
                judged.append(judge(candidate))
            source = judge(source)
        except KeyboardInterrupt:
            if not judged:
                first = candidates[0]
                judged = [
                    dataclasses.replace(first, size=self.versions.file_size(first.mix), divergence=self.known.get(first.mix, math.nan))
                ]
            return tuple(sorted(judged, key=_rank)), source, True
        return tuple(sorted(judged, key=_rank)), source, False


def _rank(candidate: Candidate) -> float:
    return math.inf if math.isnan(candidate.perplexity) else candidate.perplexity


class _TimeOverError(Exception):
    """The search's time is over, in the middle of a generation."""


def _group(versions: Versions, i: int) -> str:
    """Matrices whose errors cost alike: of one kind, in one third of the depth."""
    matrix = versions.matrices[i]
    if matrix.layer is None:
        return matrix.role
    return f"{BANDS[min(matrix.layer * len(BANDS) // versions.config.num_layers, len(BANDS) - 1)]} {matrix.role}"


def spread(chunks: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """At most so many tokens in chunks from all over a text; a power of two of chunks where there are fewer."""
    wanted = max(tokens // len(chunks[0]), 1)
    count = wanted if len(chunks) >= wanted else 1 << (len(chunks).bit_length() - 1)
    return [chunks[i * len(chunks) // count] for i in range(count)]


def is_quantised(versions: Versions) -> list[str]:
    """Quantised types that the source itself has."""
    names = dict.fromkeys(matrix.type for matrix in versions.matrices)
    dense = {"F64", "F32", "F16", "BF16"}
    return [name for name in names if name not in dense and name in IDS]
