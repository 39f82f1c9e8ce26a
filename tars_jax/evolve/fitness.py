"""What makes a member better: how probable the wanted completion is, or what a scorer says of the text it writes."""

import dataclasses
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal, SupportsFloat

from tars_jax.errors import InvalidRequest

Scorer = Callable[[str, str, str], float]  # (answer, prompt, wanted completion) -> score, larger is better


@dataclasses.dataclass(frozen=True)
class Fitness:
    """``label``: mean log-probability of the completion's tokens. ``exact``: 1 where greedy decoding writes the completion, else 0. Both
    need one teacher-forced pass; a ``scorer`` needs an answer to be decoded."""

    kind: Literal["label", "exact", "scorer"]
    scorer: Scorer | None = None


def parse_fitness(spec: str, *, trusted: bool = False) -> Fitness:
    """``label``, ``exact``, ``json`` (1 for an answer that is valid JSON), ``regex:PATTERN`` (1 where it matches from the answer's
    beginning) or ``module:function`` (called with answer, prompt, completion).

    The last two can run code or run for ever, and are understood only from somebody who may do so anyway: ``trusted``. Raises
    InvalidRequest.
    """
    if spec in ("label", "exact"):
        return Fitness("label" if spec == "label" else "exact")
    if spec == "json":
        return Fitness("scorer", _is_json)
    if not trusted:
        raise InvalidRequest(f'fitness must be "label", "exact" or "json", got {spec!r}')
    kind, _, rest = spec.partition(":")
    if not rest:
        raise InvalidRequest(f"fitness is label, exact, json, regex:PATTERN or module:function, got {spec!r}")
    return Fitness("scorer", _pattern(rest) if kind == "regex" else _function(kind, rest))


def _is_json(answer: str, prompt: str, completion: str) -> float:
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _pattern(text: str) -> Scorer:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InvalidRequest(f"fitness: {text!r} is not a regular expression: {error}") from None
    return lambda answer, prompt, completion: float(pattern.match(answer) is not None)


def _function(module: str, name: str) -> Scorer:
    """A function of a module that is installed or lies in the working folder."""
    if (here := os.getcwd()) not in sys.path:  # a command that is installed does not look there; last, so that nothing is hidden by it
        sys.path.append(here)
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does when it is imported
        raise InvalidRequest(f"fitness: cannot import {name} from {module}: {error}") from error
    if not callable(function):
        raise InvalidRequest(f"fitness: {module}:{name} cannot be called")

    def score(answer: str, prompt: str, completion: str) -> float:
        source = f"fitness: {module}:{name}"
        try:
            value = function(answer, prompt, completion)
        except Exception as error:
            raise InvalidRequest(f"{source} raised {type(error).__name__}: {error}, for the answer {answer!r:.80}") from error
        if not isinstance(value, SupportsFloat) or not math.isfinite(number := float(value)):
            raise InvalidRequest(f"{source} must give a finite number, got {value!r:.80} for the answer {answer!r:.80}")
        return number

    return score
