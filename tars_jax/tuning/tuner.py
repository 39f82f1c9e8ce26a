"""The search for settings, and the proof that each is worth having.

An optimizer looks for settings that are faster than the defaults, each measured beside the defaults on the same requests. What it finds
is a suspicion: every knob that it turned is then measured alone against the defaults, in pairs whose order alternates, and stays at its
default unless the 95 % interval of the mean log ratio (Student's t) lies above zero. Several that pass are measured together
again. A setting whose gaps between tokens are longer than allowed, and longer than the defaults', is no gain.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tars_jax.errors import FlatFitness, InvalidRequest
from tars_jax.evolve.searched import OPTIMIZERS
from tars_jax.intervals import mean_interval
from tars_jax.optim import Box, Budget, minimize
from tars_jax.tuning.knobs import BY_NAME, KNOBS, Knobs, Value, differing
from tars_jax.tuning.measure import Measurement

POPULATION = 4
MIN_PAIRS, MAX_PAIRS = 5, 20  # measurements of a candidate beside the default: fewer prove nothing, more are not worth the time
SEARCH_SHARE = 0.5  # of the time; the rest is for the proof
Measure = Callable[[Mapping[str, Value], int], Measurement]  # (settings, seed of the requests)
Progress = Callable[[str, float], None]  # what is being done, seconds gone


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings beside the defaults. ratio: of rates, the geometric mean; interval: of it, 95 %; gap: seconds, the median of p95s."""

    knobs: Knobs
    ratio: float
    interval: tuple[float, float]
    gap: float
    default_gap: float
    pairs: int
    refused: str = ""  # why the defaults stay; "" if these settings are worth having


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to. knobs: those that are worth changing; trials: each that was tried alone, then what passed together."""

    knobs: Knobs
    trials: tuple[Trial, ...]
    searched: int  # settings that the search measured
    seconds: float
    interrupted: bool = False


class Tuner:
    """A run on one machine. ``measure`` times the load of a seed under some settings; ``clock`` in seconds."""

    def __init__(
        self,
        measure: Measure,
        *,
        seconds: float = 120.0,
        max_gap: float = 0.2,
        strategy: str = "genetic",
        seed: int = 0,
        progress: Progress = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_gap``: seconds between two tokens of a stream that 95 % shall be below."""
        if strategy not in OPTIMIZERS:
            raise InvalidRequest(f"strategy {strategy!r} is none of {', '.join(OPTIMIZERS)}")
        if not 0 < seconds < math.inf or max_gap <= 0:
            raise InvalidRequest(f"seconds and the longest gap must be above 0, got {seconds:g} and {max_gap:g}")
        self._measure, self._seconds, self._max_gap, self._clock = measure, seconds, max_gap, clock
        self._strategy, self._seed, self._progress = strategy, seed, progress
        self._asked = 0  # loads so far: no two pairs ask the same
        self._scores: dict[tuple[tuple[str, Value], ...], float] = {}

    def run(self) -> Outcome:
        """Search and prove. An interrupt (Ctrl-C) ends it with what is proven."""
        began = self._clock()
        trials: list[Trial] = []
        interrupted = False
        try:
            self._search(began)
            self._prove(self._suspects(), began, trials)
        except KeyboardInterrupt:
            interrupted = True
        return Outcome(_worthwhile(trials), tuple(trials), len(self._scores), self._clock() - began, interrupted)

    def _pair(self, knobs: Knobs) -> tuple[Measurement, Measurement]:
        """Settings and defaults on the same requests; who is first alternates."""
        self._asked += 1
        seed = self._seed * 10_000 + self._asked
        if self._asked % 2:
            default = self._measure({}, seed)
            return self._measure(knobs, seed), default
        return self._measure(knobs, seed), self._measure({}, seed)

    def _search(self, began: float) -> None:
        deadline = began + SEARCH_SHARE * self._seconds
        self._measure({}, self._seed * 10_000)  # compiles; the search's time has begun

        def fitness(vector: Any) -> float:
            knobs = differing(_decoded(np.asarray(vector)))
            key = tuple(sorted(knobs.items()))
            if not knobs:
                return 0.0
            if key not in self._scores:
                if self._clock() >= deadline:
                    raise _TimeOverError
                self._progress(f"searching: {_shown(knobs)}", self._clock() - began)
                candidate, default = self._pair(knobs)
                slow = candidate.gap > max(self._max_gap, default.gap)
                self._scores[key] = math.inf if slow else -math.log(candidate.rate / default.rate)
            return self._scores[key]

        start = np.array([(knob.values.index(knob.default) + 0.5) / len(knob.values) for knob in KNOBS], np.float32)
        optimizer = OPTIMIZERS[self._strategy](pop_size=POPULATION, bounds=Box(0.0, 1.0))
        try:
            # Generations bound a search whose settings are all known: then it takes no time at all.
            budget = Budget(generations=100)
            minimize(fitness, start, optimizer, budget=budget, key=self._seed, kind="individual", driver="host")
        except (_TimeOverError, FlatFitness):
            pass

    def _suspects(self) -> list[Knobs]:
        """The knobs that the best settings turned, one by one; none where nothing was faster."""
        best = min(self._scores, key=lambda key: self._scores[key], default=())
        if not best or self._scores[best] >= 0:
            return []
        return [{name: value} for name, value in best]

    def _prove(self, suspects: Sequence[Knobs], began: float, trials: list[Trial]) -> None:
        """Trials of each alone, and of all that passed together; into ``trials`` as they come."""
        for i, knobs in enumerate(suspects):
            left = self._seconds - (self._clock() - began)
            rounds = len(suspects) - i + (len(suspects) > 1)
            trials.append(self._trial(knobs, began, self._clock() + left / rounds))
        passed = [trial.knobs for trial in trials if not trial.refused]
        if len(passed) > 1:
            together = {name: value for knobs in passed for name, value in knobs.items()}
            trials.append(self._trial(together, began, began + self._seconds))

    def _trial(self, knobs: Knobs, began: float, deadline: float) -> Trial:
        """Pairs until ``deadline``; as many as prove anything may take all the time that is left."""
        pairs: list[tuple[Measurement, Measurement]] = []
        end = began + self._seconds
        while len(pairs) < MAX_PAIRS and (not pairs or self._clock() < (end if len(pairs) < MIN_PAIRS else deadline)):
            self._progress(f"proving {_shown(knobs)}: pair {len(pairs) + 1}", self._clock() - began)
            pairs.append(self._pair(knobs))
            if len(pairs) >= MIN_PAIRS and mean_interval(_logs(pairs))[1] < 0:
                break  # it is slower; that it is faster is never decided before the pairs are all there
        logs, (low, high) = _logs(pairs), mean_interval(_logs(pairs))
        gap, default_gap = (float(np.median([pair[side].gap for pair in pairs])) for side in (0, 1))
        refused = ""
        if len(pairs) < MIN_PAIRS:
            refused = f"time for {len(pairs)} pairs of the {MIN_PAIRS} needed"
        elif low <= 0:
            refused = "slower" if high < 0 else "no difference proven"
        elif gap > max(self._max_gap, default_gap):
            refused = f"gaps of {1000 * gap:.0f} ms"
        interval = math.exp(low), math.exp(min(high, 700.0))
        return Trial(knobs, float(np.exp(logs.mean())), interval, gap, default_gap, len(pairs), refused)


def _worthwhile(trials: Sequence[Trial]) -> Knobs:
    """All that passed together; where that did not, or was not tried, the best of those that passed alone."""
    passed = [trial for trial in trials if not trial.refused]
    if not passed:
        return {}
    return max(passed, key=lambda trial: (len(trial.knobs), trial.interval[0])).knobs


def _decoded(vector: np.ndarray) -> Knobs:
    """A point of the unit cube as a value of every knob."""
    return {
        knob.name: knob.values[min(int(x * len(knob.values)), len(knob.values) - 1)] for knob, x in zip(KNOBS, vector.tolist(), strict=True)
    }


def _logs(pairs: Sequence[tuple[Measurement, Measurement]]) -> np.ndarray:
    return np.array([math.log(candidate.rate / default.rate) for candidate, default in pairs])


def _shown(knobs: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in knobs.items())


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """A table of the trials: what `HEADER` says, and for every knob that was not tried its default."""
    found: list[tuple[str, ...]] = []
    for trial in outcome.trials:
        values = " ".join(str(value).lower() for value in trial.knobs.values())
        defaults = " ".join(str(BY_NAME[name].default).lower() for name in trial.knobs)
        low, high = trial.interval
        interval = f"{low:.3f}-{high:.3f}" if trial.pairs > 1 else ""
        gaps = f"{1000 * trial.gap:.0f} ({1000 * trial.default_gap:.0f})"
        verdict = f"kept at default: {trial.refused}" if trial.refused else "faster"
        found.append((" ".join(trial.knobs), defaults, values, f"{trial.ratio:.3f}", interval, str(trial.pairs), gaps, verdict))
    tried = {name for trial in outcome.trials for name in trial.knobs}
    for knob in KNOBS:
        if knob.name not in tried:
            found.append((knob.name, str(knob.default).lower(), "", "", "", "0", "", "kept at default: the search found nothing faster"))
    return found


HEADER = ("SETTING", "DEFAULT", "TRIED", "RATIO", "95 %", "PAIRS", "GAP P95, MS (DEFAULT)", "RESULT")


class _TimeOverError(Exception):
    """The search's time is over."""
