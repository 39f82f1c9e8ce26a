"""Text to token ids, one class or function for each kind of model: byte-level BPE, SentencePiece BPE, Unigram, WordPiece.

A *segmenter* turns text without special tokens into ids. An *encoder* also finds the special tokens in the text.
"""

import functools
import heapq
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HubTokenizer

from tars_jax.errors import ModelFileError
from tars_jax.tokenizer.pretokenizers import PreTokenizer
from tars_jax.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

Segmenter = Callable[[str], list[int]]

_CACHED_WORDS = 1 << 15
_LONGEST_CACHED_WORD = 32  # characters


class Encoder(Protocol):
    """Text to ids. With ``parse_special``, the text of control tokens becomes those tokens; user-defined tokens always do."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...


class SpecialTokens:
    """Finds special tokens in text: the leftmost first, at each place the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = {text: token_id for text, token_id in ids.items() if text}
        self._lengths: dict[str, list[int]] = {}  # by first character, longest first
        for text in sorted(self._ids, key=len, reverse=True):
            lengths = self._lengths.setdefault(text[0], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        # Two characters keep thousands of tokens down to a few alternatives, and no token is missed.
        heads = sorted({text[:2] for text in self._ids}, key=len, reverse=True)
        self._heads = re.compile("|".join(map(re.escape, heads)) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """The text between special tokens (never empty) and the ids of the tokens, in order."""
        begin = scan = 0
        while match := self._heads.search(text, scan):
            scan = match.start()
            length = next((size for size in self._lengths[text[scan]] if text[scan : scan + size] in self._ids), 0)
            if length:
                if scan > begin:
                    yield text[begin:scan]
                yield self._ids[text[scan : scan + length]]
                begin = scan + length
            scan += length or 1
        if begin < len(text):
            yield text[begin:]


class PartedEncoder:
    """An encoder that cuts special tokens out of the text and gives the rest to a segmenter, as llama.cpp does."""

    def __init__(self, vocabulary: Vocabulary, segment: Segmenter, prefix: str = "") -> None:
        self._segment = segment
        self._prefix = prefix  # before the text and after each special token
        self._always = SpecialTokens(vocabulary.of_kind(USER_DEFINED))
        self._parsed = SpecialTokens(vocabulary.of_kind(USER_DEFINED, CONTROL, UNKNOWN))

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in (self._parsed if parse_special else self._always).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._segment(self._prefix + part)
        return ids


class HubEncoder:
    """The encoder a ``tokenizer.json`` describes, special tokens included."""

    def __init__(self, tokenizer: HubTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # encode_special_tokens is a setting of the object, not of the call

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class SentencePieceBpe:
    """SentencePiece's BPE: of all neighbours that form a token, the pair with the best score merges first, the leftmost on a tie.

    Written out here because ``tokenizers`` has no such model: merge ranks derived from scores break ties differently, and deriving
    them takes 2 s for Gemma's 262,144 tokens, against 0.1 s. Words are cached, so ordinary text costs one look-up a word.
    """

    def __init__(self, vocabulary: Vocabulary, scores: Sequence[float], unk_id: int | None) -> None:
        mergeable = np.isin(vocabulary.kinds, (NORMAL, USER_DEFINED, UNUSED)).tolist()
        self._costs = {token: -score for token, score, merges in zip(vocabulary.tokens, scores, mergeable, strict=True) if merges}
        self._index = vocabulary.index
        self._bytes = {int(token[3:5], 16): place for token, place in vocabulary.of_kind(BYTE).items() if re.fullmatch("<0x..>", token)}
        self._unk = unk_id
        # Where no token has a space inside, merges cannot cross from one word to the next.
        spaced = any(SPACE in token.lstrip(SPACE) for token in self._costs if SPACE in token)
        self._words = re.compile(r"(?s).+" if spaced else rf"{SPACE}*[^{SPACE}]+|{SPACE}+")
        self._cached = functools.lru_cache(_CACHED_WORDS)(self._segment)

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._words.findall(text.replace(" ", SPACE)):
            ids += self._cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._segment(word)
        if self._bytes or self._unk is None:
            return ids
        return [token for place, token in enumerate(ids) if token != self._unk or place == 0 or ids[place - 1] != self._unk]

    def _segment(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in self._merge(word):
            if piece in self._costs:
                ids.append(self._index[piece])
            elif self._bytes:
                ids += [self._bytes[byte] for byte in piece.encode() if byte in self._bytes]
            elif self._unk is not None:
                ids.append(self._unk)
        return ids

    def _merge(self, word: str) -> list[str]:
        """The word's pieces once nothing more can merge. A heap of (cost, place, merged text); entries gone stale are skipped."""
        pieces, costs = list(word), self._costs
        after, before = list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))
        heap = [(costs[pair], place, pair) for place in range(len(word) - 1) if (pair := word[place : place + 2]) in costs]
        heapq.heapify(heap)
        while heap:
            _, left, merged = heapq.heappop(heap)
            right = after[left]
            if not pieces[left] or right == len(pieces) or pieces[left] + pieces[right] != merged:
                continue
            pieces[left], pieces[right] = merged, ""
            after[left] = after[right]
            if after[left] < len(pieces):
                before[after[left]] = left
            for first in (before[left], left):
                if first >= 0 and after[first] < len(pieces) and (pair := pieces[first] + pieces[after[first]]) in costs:
                    heapq.heappush(heap, (costs[pair], first, pair))
        return [piece for piece in pieces if piece]


def byte_level_bpe(vocabulary: Vocabulary, merges: Sequence[str], pre: PreTokenizer) -> Segmenter:
    """BPE over GPT-2's byte alphabet, or over UTF-8 where ``pre`` says so. Raises ModelFileError for merges of unknown tokens."""
    tokenizer = _hub(
        models.BPE, vocab=vocabulary.index, merges=_pairs(merges), ignore_merges=pre.ignore_merges, byte_fallback=not pre.byte_level
    )
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return _segmenter(tokenizer)


def unigram(vocabulary: Vocabulary, scores: Sequence[float], unk_id: int, charsmap: bytes, *, prefix: bool, squeeze: bool) -> Segmenter:
    """SentencePiece's Unigram (T5, XLM-R). ``charsmap`` is its normalisation table; ``squeeze`` drops superfluous spaces."""
    usable = np.isin(vocabulary.kinds, (NORMAL, USER_DEFINED, UNUSED)).tolist()
    pairs = [(token, score if use else -1e9) for token, score, use in zip(vocabulary.tokens, scores, usable, strict=True)]
    tokenizer = _hub(models.Unigram, vocab=pairs, unk_id=unk_id, byte_fallback=bool(vocabulary.of_kind(BYTE)))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    return _segmenter(tokenizer)


def wordpiece(vocabulary: Vocabulary, unk_id: int, *, lowercase: bool) -> Segmenter:
    """BERT's WordPiece. GGUF marks the beginning of a word with U+2581 where BERT marks the rest of it with ``##``."""
    vocab = vocabulary.of_kind(CONTROL, UNKNOWN)
    for token, place in vocabulary.of_kind(NORMAL, USER_DEFINED, UNUSED).items():
        vocab[token[1:] if token.startswith(SPACE) else "##" + token] = place
    tokenizer = _hub(models.WordPiece, vocab=vocab, unk_token=vocabulary.tokens[unk_id])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _segmenter(tokenizer)


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Split merges at their space, the first after the first character: a token may begin with a space, none holds one inside."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for place, (left, right) in enumerate(pairs):
        if not left or not right:
            left, _, right = merges[place][1:].partition(" ")
            pairs[place] = (merges[place][:1] + left, right)
            if not right:
                raise ModelFileError(f"tokenizer.ggml.merges: {merges[place]!r} is not a pair of tokens")
    return pairs


def _hub(model: Callable[..., Any], **options: Any) -> HubTokenizer:
    try:
        return HubTokenizer(model(**options))
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelFileError(f"the model file's tokenizer is inconsistent: {error}") from error


def _segmenter(tokenizer: HubTokenizer) -> Segmenter:
    def segment(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return segment
