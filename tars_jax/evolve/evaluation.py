"""How good an update is on examples it was not searched with, and what it does to other text."""

import dataclasses
import math
from collections.abc import Sequence
from importlib import resources

import numpy as np

from tars_jax.evolve.data import Example
from tars_jax.tokenizer import Tokenizer

CHUNK = 128  # tokens of other text read together
MAX_GENERAL_RISE = 0.02  # of the loss on other text that an update may cost
Z = 1.959964  # of the normal distribution, for 95 %


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of one update on held-out examples, and on other text.

    fitness: mean, of the run's own kind. score: what the run is for: the share of completions that greedy decoding writes, or the mean of
    a scorer. exact: that share, and its 95 % interval (Wilson 1927). loss: mean negative log-probability of a completion's tokens.
    general_loss: of other text's tokens.
    """

    fitness: float
    score: float
    exact: float
    interval: tuple[float, float]
    loss: float
    general_loss: float
    examples: int

    def better_than(self, other: "Evaluation") -> bool:
        return (self.score, self.fitness) > (other.score, other.fitness)


def refusal(before: Evaluation, after: Evaluation) -> str | None:
    """Why an update must not be taken; None if it may be."""
    if not after.better_than(before):
        return f"it is not better on the held-out examples: {after.score:.3f} after {before.score:.3f}"
    if not after.general_loss <= before.general_loss * (1 + MAX_GENERAL_RISE):
        rise = after.general_loss / before.general_loss - 1
        return f"the loss on other text rises by {rise:.1%}, more than the {MAX_GENERAL_RISE:.0%} allowed"
    return None


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    share, square = successes / count, Z * Z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def general_text() -> str:
    """The neutral text that other text stands for, where the user gives none."""
    return resources.files("tars_jax.evolve").joinpath("general.txt").read_text("utf-8")


def text_examples(text: str, tokenizer: Tokenizer) -> list[Example]:
    """A text in chunks of `CHUNK` tokens, all but the first of each to be predicted; a shorter rest is left out."""
    ids = tokenizer.encode(text)
    starts = range(0, max(len(ids) - CHUNK, 0) + 1, CHUNK)
    return [Example(tuple(ids[i : i + 1]), tuple(ids[i + 1 : i + CHUNK])) for i in starts if len(ids) > i + 1]


def summarise(
    fitness: np.ndarray, exact: np.ndarray, log_probability: np.ndarray, general: np.ndarray, sizes: Sequence[int], *, scored: bool
) -> Evaluation:
    """From numbers of each held-out example, and of each chunk of other text with its size. ``scored``: fitness comes from a scorer."""
    share = float(exact.mean())
    return Evaluation(
        fitness=float(fitness.mean()),
        score=float(fitness.mean()) if scored else share,
        exact=share,
        interval=wilson(float(exact.sum()), len(exact)),
        loss=-float(log_probability.mean()),
        general_loss=-float(np.average(general, weights=sizes)),
        examples=len(exact),
    )
