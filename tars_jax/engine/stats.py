"""Numbers of an engine, for whoever watches it. Plain Python; `api.telemetry` gives them Prometheus' form."""

import dataclasses
import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

COUNTERS = ("steps", "step_rows", "step_tokens", "prompt_tokens", "output_tokens", "drafted_tokens", "accepted_tokens", "failures")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's, of a step
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values were at most each bound but more than the one before; last those above all bounds."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0  # sum of the values


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Numbers of an engine: gauges of now, counters since its start."""

    running: int
    waiting: int
    num_pages: int
    free_pages: int
    nbytes: int  # weights and cache
    weights_version: int  # 1 at first, one more with every `Engine.swap`
    compiled_steps: tuple[int, ...]  # step sizes that are ready
    kept_pages: int = 0  # free ones that still hold a known prefix
    evicted_pages: int = 0  # those of them that were given to others
    steps: int = 0
    step_rows: int = 0  # rows of all steps: over `steps` it is the mean batch size
    step_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0  # guessed ones that went into a step
    accepted_tokens: int = 0  # those of them that came true
    reused_tokens: int = 0  # prompt tokens found in kept pages
    missed_tokens: int = 0  # prompt tokens that had to be computed
    failures: int = 0  # steps that failed
    preemptions: int = 0
    compilations: int = 0  # or loads from the compilation cache
    compile_seconds: float = 0.0
    step_seconds: Histogram = Histogram()
    step_token_counts: Histogram = Histogram()
    step_row_counts: Histogram = Histogram()


class Distribution:
    """A histogram that grows. One thread observes; any may take a snapshot."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._total = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


class Meter:
    """Steps by their time, tokens and rows; compilations."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.rows = Distribution(SECONDS), Distribution(TOKENS), Distribution(ROWS)
        self.compilations, self.compile_seconds = 0, 0.0
        self._lock = threading.Lock()  # programs are compiled in several threads

    def step(self, seconds: float, tokens: int, rows: int) -> None:
        """Count a step: the seconds by which it moved everything on."""
        self.seconds.observe(seconds)
        self.tokens.observe(tokens)
        self.rows.observe(rows)

    def numbers(self) -> dict[str, Any]:
        """Its part of the engine's numbers."""
        return {
            "compilations": self.compilations,
            "compile_seconds": self.compile_seconds,
            "step_seconds": self.seconds.snapshot(),
            "step_token_counts": self.tokens.snapshot(),
            "step_row_counts": self.rows.snapshot(),
        }

    def compiled(self, seconds: float) -> None:
        """Count a compilation, or a load from the compilation cache."""
        with self._lock:
            self.compilations += 1
            self.compile_seconds += seconds
