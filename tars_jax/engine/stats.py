"""Numbers of an engine, for whoever watches it. Plain Python; `api.telemetry` gives them Prometheus' form."""

import dataclasses
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from tars_jax.engine.scheduler import Plan
from tars_jax.engine.timing import StepTimes

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
    """What is learned from steps that were read: how long they take, by their tokens and rows; compilations; and counters."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._last_read = 0.0  # seconds, time.perf_counter()
        self._known = 0  # compilations when a step was last read
        self.seconds, self.tokens, self.rows = Distribution(SECONDS), Distribution(TOKENS), Distribution(ROWS)
        self.compilations, self.compile_seconds = 0, 0.0
        self._lock = threading.Lock()  # programs are compiled in several threads

    def step(self, plan: Plan, bucket: int, sent: float, steps: int = 1) -> float:
        """Count a step that was read just now, or so many of one plan: the seconds by which they moved everything on."""
        now = time.perf_counter()
        seconds = now - max(sent, self._last_read)
        self._last_read = now
        tokens = sum(span.tokens for span in plan)
        was_disturbed, self._known = self.compilations != self._known, self.compilations
        for _ in range(steps):
            if not was_disturbed:  # by a compilation: the next one will not take so long
                self.times.observe(bucket, seconds / steps)
            self.seconds.observe(seconds / steps)
            self.tokens.observe(tokens)
            self.rows.observe(len(plan))
        prompts = sum(max(min(span.count, span.sequence.prompt_length - span.start), 0) for span in plan)
        self.count(steps=steps, step_rows=steps * len(plan), step_tokens=steps * tokens, prompt_tokens=prompts)
        return seconds

    def count(self, **more: int) -> None:
        """Add to counters."""
        for name, number in more.items():
            self._counters[name] += number

    def numbers(self) -> dict[str, Any]:
        """Its part of the engine's numbers."""
        return {
            **self._counters,
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
