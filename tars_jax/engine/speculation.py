"""Guessing a sequence's next tokens so that one step can confirm several. Plain Python.

A guess never changes an answer: the step samples every position with that position's own noise, and a guessed token stays only if
it is the one sampled (so greedy and seeded answers are the same token for token, and the distribution is the model's). That is
speculative sampling (Leviathan et al. 2023, arXiv 2211.17192) with the draft's and the target's noise coupled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

FROM_DEVICE = -1  # stands for a token that the device knows and the host does not
DRAFT_TOKENS = 4  # guesses of a draft model: each costs a run of it

LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up
TRIAL = 24  # guessed tokens after which a request is judged
REST = 64  # tokens a request goes without guesses after a bad judgement; doubles each time
WORTH = 0.35  # share of the guesses that must come true: a step over 8 rows costs about 1.5 times one over a single row


class Guesser(Protocol):
    """Where guesses come from."""

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to ``count`` tokens that may follow ``tokens``."""


class Draft:
    """Leaves the guessing to a draft model on the device (`step.run_draft`)."""

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Places for the draft's tokens."""
        return (FROM_DEVICE,) * min(count, DRAFT_TOKENS)


class PromptLookup:
    """Continues the last tokens as they were continued before in the same sequence (prompt lookup decoding, Saxena 2023).

    Each token is indexed once, so a step costs the tokens that are new since the last one.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence but the very last
        self._seen = 0

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to ``count`` tokens that may follow; nothing if the end of ``tokens`` never occurred before."""
        self._index(tokens)
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if at is not None:
                return tuple(tokens[at : at + count])
        return ()

    def _index(self, tokens: Sequence[int]) -> None:
        for end in range(max(self._seen, SHORTEST), len(tokens)):  # the last token's own n-grams have no continuation yet
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, len(tokens))


@dataclasses.dataclass
class Speculation:
    """Guesses for one request, and whether they pay: a request whose guesses fail goes without for a while."""

    guesser: Guesser
    drafted: int = 0  # tokens, in all
    accepted: int = 0
    _trial_drafted: int = 0
    _trial_accepted: int = 0
    _resting: int = 0  # tokens still to be produced without guesses
    _rest: int = REST

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Guesses for what follows ``tokens``, at most ``count``."""
        return () if self._resting else self.guesser.propose(tokens, count)

    def judge(self, drafted: int, accepted: int) -> None:
        """Learn how a step's guesses went; 0 drafted for a step without."""
        if self._resting:
            self._resting = max(self._resting - 1 - accepted, 0)
            return
        self.drafted += drafted
        self.accepted += accepted
        self._trial_drafted += drafted
        self._trial_accepted += accepted
        if self._trial_drafted < TRIAL:
            return
        if self._trial_accepted < WORTH * self._trial_drafted:
            self._resting, self._rest = self._rest, 2 * self._rest
        else:
            self._rest = REST
        self._trial_drafted = self._trial_accepted = 0
