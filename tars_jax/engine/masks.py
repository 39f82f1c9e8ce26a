"""Which tokens a request may be given next: sets of tokens as bits, uint32 [ceil(V / 32)], bit v % 32 of word v // 32 for token v."""

from collections.abc import Collection, Sequence

import numpy as np

from tars_jax.config import SamplingParams
from tars_jax.errors import InvalidRequest
from tars_jax.grammar import Constraint
from tars_jax.tokenizer import Tokenizer


class TokenSets:
    """Makes the token sets of one model's requests."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._containing: dict[str, tuple[int, ...]] = {}

    def bits(self, tokens: Collection[int]) -> np.ndarray:
        """Raises InvalidRequest for tokens outside the vocabulary."""
        if wrong := [token for token in tokens if not 0 <= token < self._vocab_size]:
            raise InvalidRequest(f"token {wrong[0]} is outside the vocabulary of {self._vocab_size}")
        members = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        members[list(tokens)] = 1
        return np.packbits(members, bitorder="little").view(np.uint32)

    def breakers(self, params: SamplingParams) -> np.ndarray | None:
        """The tokens that end DRY's repetitions: those that contain a breaker, or if there is none its last token. None: no DRY."""
        if not params.dry_multiplier:
            return None
        return self.bits([token for text in params.dry_sequence_breakers if text for token in self._with(text)])

    def mask(self, params: SamplingParams, constraint: Constraint | None) -> "Mask | None":
        """What restricts a request's tokens; None if nothing does. Raises InvalidRequest if nothing is left."""
        words = [self._tokenizer.encode(text) for word in params.bad_words if word for text in (word, f" {word}")]
        banned = {ids[0] for ids in words if len(ids) == 1}
        phrases = [ids for ids in words if len(ids) > 1]
        ends = self.bits(ends_of(params, self._tokenizer)) if params.min_tokens else None
        base = None
        if banned or params.allowed_token_ids is not None:
            allowed = range(self._vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
            base = self.bits(allowed) & ~self.bits(banned)
            if not base.any():
                raise InvalidRequest("allowed_token_ids and bad_words leave no token to choose from")
        if base is None and ends is None and constraint is None and not phrases:
            return None
        return Mask(base, phrases, ends, params.min_tokens, constraint)

    def _with(self, text: str) -> tuple[int, ...]:
        if text not in self._containing:
            data, tokenizer = text.encode(), self._tokenizer
            found = tuple(i for i in range(min(tokenizer.vocab_size, self._vocab_size)) if data in tokenizer.token_bytes(i))
            self._containing[text] = found or tuple(tokenizer.encode(text)[-1:])
        return self._containing[text]


class Mask:
    """What restricts one request's tokens, as far as it has got."""

    def __init__(
        self,
        base: np.ndarray | None,
        phrases: list[list[int]],
        ends: np.ndarray | None,
        min_tokens: int,
        constraint: Constraint | None,
    ) -> None:
        """base: the tokens ever allowed, None for all. phrases: sequences of tokens that may not be completed. ends: tokens that would
        end the answer, banned for the first ``min_tokens`` of it."""
        self._base, self._phrases, self._ends, self._min_tokens = base, phrases, ends, min_tokens
        self.constraint = constraint

    @property
    def depends(self) -> bool:
        """Whether all tokens so far must be known to fill it."""
        return bool(self._phrases) or self.constraint is not None

    def acts(self, produced: int) -> bool:
        """Whether it restricts the token after ``produced`` ones."""
        return self._base is not None or self.depends or produced < self._min_tokens

    def fill(self, allowed: np.ndarray, tokens: Sequence[int], produced: int) -> None:
        """Write the bits for the token after ``produced`` ones; ``tokens`` are all so far, prompt and answer.

        Those of a grammar stand in ``allowed`` already: where the other rules would forbid all it allows, they give way.
        """
        if self.constraint is None:
            allowed[:] = 0xFFFFFFFF
        kept = allowed.copy() if self._base is None else allowed & self._base
        if self._ends is not None and produced < self._min_tokens:
            kept &= ~self._ends
        for *before, last in self._phrases:
            if list(tokens[-len(before) :]) == before:
                kept[last // 32] &= ~np.uint32(1 << (last % 32))
        if kept.any():
            allowed[:] = kept


def ends_of(params: SamplingParams, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a request's answer."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else tokenizer.eog_ids)
