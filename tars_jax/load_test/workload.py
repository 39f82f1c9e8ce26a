"""What a load test sends: how many requests, when, how long, and what they have in common.

Prompts are common words drawn by a seeded generator: the same seed asks the same questions. A probe tells how many tokens a word is,
so that lengths can be given in tokens without the model's tokenizer.
"""

import dataclasses
import math
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from tars_jax.errors import InvalidRequest

_TEXT = (  # frequent nouns, a token each in most vocabularies
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father power hour game line end member law car "
    "city community name president team minute idea body information back parent face others level office door health person art war "
    "history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_TEXT.split())

_LENGTHS = re.compile(r"(?:(lognormal):)?(\d{1,7})(?:\.\.(\d{1,7}))?", re.ASCII)
_Z95 = 1.6448536269514722  # 95 % of a normal distribution lie below so many standard deviations


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, at least 1 each."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int  # uniform: inclusive; lognormal: 90 % lie from low to high

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """``128``, ``32..512`` (uniform) or ``lognormal:32..512``. Raises InvalidRequest."""
        match = _LENGTHS.fullmatch(text)
        low, high = (int(match[2]), int(match[3] or match[2])) if match else (0, 0)
        if not match or not 1 <= low <= high or (match[1] and not match[3]):
            raise InvalidRequest(f"lengths are given as 128, 32..512 or lognormal:32..512 (at least 1), got {text!r}")
        return cls("lognormal" if match[1] else "uniform" if match[3] else "fixed", low, high)

    def sample(self, generator: random.Random) -> int:
        if self.kind == "lognormal":
            center = (math.log(self.low) + math.log(self.high)) / 2
            return max(1, round(generator.lognormvariate(center, (math.log(self.high) - center) / _Z95)))
        return generator.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sent to a model. At least one of ``requests`` and ``seconds`` must end it."""

    model: str
    input: Lengths = Lengths("uniform", 32, 512)
    output: Lengths = Lengths("uniform", 32, 256)
    requests: int | None = None
    seconds: float | None = None  # no request begins later
    rate: float = math.inf  # arrivals a second, exponentially spaced (a Poisson process); infinite: at once
    clients: int | None = None  # requests under way at once; None: no limit
    shared_prefix: int = 0  # tokens before the input that requests have in common
    prefixes: int = 1  # different ones of these
    api_keys: int = 0  # requests are spread over so many; 0: none is sent
    temperature: float = 0.8
    ignore_eos: bool = True  # answers have the length that was drawn
    seed: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} must be {rule}, got {getattr(self, field)}")

        check(self.requests is None or self.requests > 0, "requests", "at least 1")
        check(self.seconds is None or 0 < self.seconds < math.inf, "seconds", "above 0")
        check(self.rate > 0, "rate", "above 0")
        check(self.clients is None or self.clients > 0, "clients", "at least 1")
        check(self.shared_prefix >= 0, "shared_prefix", "at least 0")
        check(self.prefixes > 0, "prefixes", "at least 1")
        check(self.api_keys >= 0, "api_keys", "at least 0")
        check(0 <= self.temperature < math.inf, "temperature", "at least 0")
        if self.requests is None and self.seconds is None:
            raise InvalidRequest("a load test needs an end: a number of requests or of seconds")

    def arrivals(self) -> Iterator[float]:
        """Seconds from the start at which requests arrive."""
        generator = random.Random(f"{self.seed} arrivals")
        at, count = 0.0, 0
        while (self.requests is None or count < self.requests) and (self.seconds is None or at < self.seconds):
            yield at
            at, count = at + (generator.expovariate(self.rate) if self.rate < math.inf else 0.0), count + 1

    def body(self, number: int | str, tokens_per_word: float) -> dict[str, Any]:
        """The request of this number, for POST /api/generate."""
        generator = random.Random(f"{self.seed} {number}")
        words = _words(generator, self.input.sample(generator) / tokens_per_word)
        if self.shared_prefix:
            prefix = random.Random(f"{self.seed} prefix {generator.randrange(self.prefixes)}")
            words = _words(prefix, self.shared_prefix / tokens_per_word) + words
        options = {"num_predict": self.output.sample(generator), "temperature": self.temperature}
        if self.ignore_eos:
            options["ignore_eos"] = True
        return {"model": self.model, "prompt": " ".join(words), "raw": True, "options": options}

    def headers(self, number: int) -> dict[str, str]:
        return {"Authorization": f"Bearer load-test-{number % self.api_keys}"} if self.api_keys else {}


def _words(generator: random.Random, count: float) -> list[str]:
    return generator.choices(WORDS, k=max(1, round(count)))
