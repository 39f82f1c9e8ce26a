"""What came of a load test: rates, latencies, goodput, errors. Terms are those of vLLM's ``bench serve``."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tars_jax.errors import InvalidRequest
from tars_jax.load_test.client import Exchange

PERCENTILES = (50, 90, 99)
_MEASURES: Mapping[str, Callable[[Exchange], float]] = {  # of one request, in seconds
    "ttft": lambda result: result.first_token,
    "itl": lambda result: percentile(sorted(result.gaps), 99),
    "tpot": lambda result: result.per_token or 0.0,
    "e2e": lambda result: result.latency,
}
_LIMIT = re.compile(r"(\w+):(\d{1,9}(?:\.\d{1,6})?)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Latency:
    """A distribution of latencies, in milliseconds."""

    mean: float
    percentiles: Mapping[int, float]
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        ms = sorted(1e3 * value for value in seconds)
        return cls(sum(ms) / max(len(ms), 1), {p: percentile(ms, p) for p in PERCENTILES}, ms[-1] if ms else 0.0)

    def as_json(self) -> dict[str, float]:
        values = {"mean": self.mean, **{f"p{p}": value for p, value in self.percentiles.items()}, "max": self.max}
        return {name: round(value, 3) for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A load test in numbers. Requests that failed count as errors and nowhere else."""

    seconds: float  # from the first request to the last answer
    completed: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    good: int | None  # requests within every limit; None: there are no limits
    latencies: Mapping[str, Latency]  # ttft, itl, tpot, e2e
    errors: Mapping[str, int]

    def per_second(self, count: float) -> float:
        return count / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The report as ``tars bench serve --json`` prints it."""
        whole: dict[str, Any] = {
            "seconds": round(self.seconds, 3),
            "completed": self.completed,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "requests_per_second": round(self.per_second(self.completed), 4),
            "output_tokens_per_second": round(self.per_second(self.output_tokens), 2),
            "total_tokens_per_second": round(self.per_second(self.output_tokens + self.prompt_tokens), 2),
            **{f"{name}_ms": latency.as_json() for name, latency in self.latencies.items()},
            "errors": dict(self.errors),
        }
        if self.good is not None:
            whole["goodput_requests_per_second"] = round(self.per_second(self.good), 4)
        return whole


def parse_goodput(text: str) -> dict[str, float]:
    """``ttft:500,itl:100``: milliseconds that a good request keeps to. Raises InvalidRequest."""
    limits = {}
    for item in filter(None, text.split(",")):
        match = _LIMIT.fullmatch(item.strip())
        if not match or match[1] not in _MEASURES:
            raise InvalidRequest(f"--goodput takes milliseconds for {', '.join(_MEASURES)}, as in ttft:500,itl:100; got {item!r}")
        limits[match[1]] = float(match[2])
    return limits


def summarize(results: Sequence[Exchange], goodput: Mapping[str, float]) -> LoadReport:
    """The report of a test. ``goodput``: milliseconds a request must keep to, for its time to first token (ttft), the 99th percentile
    of its gaps (itl), their mean (tpot) and its whole time (e2e)."""
    done = [result for result in results if not result.error]
    seconds = max(r.ended for r in results) - min(r.sent for r in results) if results else 0.0
    latencies = {
        "ttft": Latency.of([result.first_token for result in done]),
        "itl": Latency.of([gap for result in done for gap in result.gaps]),
        "tpot": Latency.of([result.per_token for result in done if result.per_token is not None]),
        "e2e": Latency.of([result.latency for result in done]),
    }
    good = sum(all(1e3 * _MEASURES[name](result) <= limit for name, limit in goodput.items()) for result in done)
    return LoadReport(
        seconds=seconds,
        completed=len(done),
        failed=len(results) - len(done),
        prompt_tokens=sum(result.prompt_tokens for result in done),
        output_tokens=sum(result.output_tokens for result in done),
        good=good if goodput else None,
        latencies=latencies,
        errors=dict(collections.Counter(result.error for result in results if result.error).most_common()),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, linearly interpolated; 0 when there are none."""
    if not ordered:
        return 0.0
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
