"""A model's tokens: their text, their kind, the bytes they stand for, and which of them end a generation."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tars_jax.errors import ModelFileError

# Kinds of tokens, as tokenizer.ggml.token_type numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"  # SentencePiece's visible space

# Texts that end a generation whatever the file says of them: llama.cpp's list (src/llama-vocab.cpp, special_eog_ids).
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>"),
        *("</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *("<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    )
)
# Infill tokens after which nothing of the answer follows: the key that names the token, else the first of these texts in the vocabulary.
_END_OF_INFILL: dict[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens by id. ``byte_level`` says how normal tokens spell bytes: GPT-2's alphabet, or UTF-8 with U+2581 for spaces."""

    tokens: list[str]
    kinds: NDArray[np.int32]  # [V]
    byte_level: bool
    index: dict[str, int]
    _pieces: dict[int, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], byte_level: bool) -> Self:
        """Read ``tokenizer.ggml.tokens`` and ``token_type``. Raises ModelFileError if they are missing, too short or not unique."""
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelFileError("the model file has no vocabulary (tokenizer.ggml.tokens)")
        tokens = [token or f"[EMPTY_{place}]" for place, token in enumerate(tokens)]
        kinds = np.asarray(metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), NORMAL)), np.int32)
        if len(kinds) < len(tokens):
            raise ModelFileError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
        index = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(index) != len(tokens):
            twice = next(token for place, token in enumerate(tokens) if index[token] != place)
            raise ModelFileError(f"the token {twice!r} stands twice in the vocabulary (tokenizer.ggml.tokens)")
        return cls(tokens, kinds[: len(tokens)].copy(), byte_level, index)

    def piece(self, token_id: int) -> bytes:
        """The bytes a token stands for; ids beyond the vocabulary, which padded logits can name, stand for nothing."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self._spell(token_id) if 0 <= token_id < len(self.tokens) else b""
        return self._pieces[token_id]

    def _spell(self, token_id: int) -> bytes:
        text, kind = self.tokens[token_id], self.kinds[token_id]
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            return text.encode(errors="surrogateescape")
        if kind == BYTE and len(text) == 6:  # <0x0A>
            return bytes.fromhex(text[3:5])
        if self.byte_level:
            return b"".join(bytes((BYTE_OF[char],)) if char in BYTE_OF else char.encode(errors="surrogateescape") for char in text)
        return text.replace(SPACE, " ").encode(errors="surrogateescape")

    def of_kind(self, *kinds: int) -> dict[str, int]:
        """Text and id of every token of these kinds."""
        return {self.tokens[place]: place for place in np.flatnonzero(np.isin(self.kinds, kinds)).tolist()}

    def make_control(self, ids: Iterable[int]) -> None:
        """Treat tokens as control tokens, whatever the file says: some files mark what ends a turn as ordinary text."""
        for token_id in ids:
            self.kinds[token_id] = CONTROL


def end_of_generation(index: Mapping[str, int], named: Mapping[str, int | None]) -> frozenset[int]:
    """Every token that ends a generation, as llama.cpp finds them.

    ``named`` holds the ids the file gives, by key (``eos``, ``eot``, ``eom``, ``fim_pad``, ``fim_rep``, ``fim_sep``).
    """
    ends = {index[text] for text in END_TEXTS if text in index}
    ends |= {token_id for key in ("eos", "eot", "eom") if (token_id := named.get(key)) is not None}
    for key, texts in _END_OF_INFILL.items():
        token_id = named.get(key)
        if token_id is None:
            token_id = next((index[text] for text in texts if text in index), None)
        if token_id is not None:
            ends.add(token_id)
    calls = "<|call|>" in index or "<|calls|>" in index
    if calls and ("<|return|>" in index or "<|flush|>" in index):  # harmony: <|end|> only ends a message
        ends.discard(index.get("<|end|>", -1))
    if "<|tool_response>" in index:  # Gemma 4 writes </s> inside answers
        ends.discard(index.get("</s>", -1))
    return frozenset(ends)
