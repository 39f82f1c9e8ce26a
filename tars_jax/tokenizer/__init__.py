"""Text to token ids and back: :class:`Tokenizer`, and :class:`TextStream` for text that arrives token by token."""

import codecs
import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tars_jax.errors import InvalidRequest
from tars_jax.tokenizer.files import SpecialOptions, read_gguf, read_hub
from tars_jax.tokenizer.segmenters import Encoder
from tars_jax.tokenizer.vocabulary import CONTROL, UNKNOWN, Vocabulary, end_of_generation


class Batch(NamedTuple):
    """Texts padded to one length. Positions where ``mask`` is False hold the padding token."""

    ids: NDArray[np.int32]  # [B, T]
    mask: NDArray[np.bool_]  # [B, T]


class Tokenizer:
    """A model's tokenizer. Built by :meth:`from_gguf` or :meth:`from_file`; immutable and safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder, options: SpecialOptions) -> None:
        self._vocabulary, self._encoder, self._options = vocabulary, encoder, options
        self.vocab_size = len(vocabulary.tokens)
        self.add_bos = options.add_bos and options.named.get("bos") is not None
        self.add_eos = options.add_eos and options.named.get("eos") is not None
        self.strips_space = options.strip_space
        self._name_tokens(options.named)
        self.control_ids = frozenset(vocabulary.of_kind(CONTROL, UNKNOWN).values())  # hidden by decode(skip_special=True)

    def _name_tokens(self, named: Mapping[str, int | None]) -> None:
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (named.get(key) for key in ("bos", "eos", "pad", "unk"))
        self.eog_ids = end_of_generation(self._vocabulary.index, named) | self._options.ends

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Read the ``tokenizer.ggml.*`` keys of a GGUF file. Raises ModelFileError if they are missing, inconsistent or of another kind."""
        return cls(*read_gguf(metadata))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read ``tokenizer.json``, or a folder that holds one, with the configuration files beside it. Raises ModelFileError."""
        return cls(*read_hub(path))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        ``add_special`` adds the BOS and EOS tokens the model asks for, never a second one. ``parse_special`` reads the text of control
        tokens as those tokens; None: as ``add_special``.
        """
        parse = add_special if parse_special is None else parse_special
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates, which JSON can carry
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._encoder.encode(text, parse)
        if add_special and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD. ``skip_special`` leaves out control tokens."""
        shown = (token for token in ids if not (skip_special and token in self.control_ids))
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; of a control token, its text."""
        return self._vocabulary.piece(token_id)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written ``text`` in the vocabulary, None if there is none."""
        return self._vocabulary.index.get(text)

    def batch(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        pad_to: int | None = None,
        side: Literal["left", "right"] = "right",
        add_special: bool = True,
    ) -> Batch:
        """Encode texts to one width: ``pad_to``, or the longest text; ``max_length`` cuts longer ones at their end.

        Pads on ``side`` with the padding token, else the end token. Raises InvalidRequest if a text does not fit ``pad_to``.
        """
        rows = [self.encode(text, add_special=add_special)[:max_length] for text in texts]
        longest = max(map(len, rows), default=0)
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise InvalidRequest(f"a text of {longest} tokens does not fit pad_to={width}; set max_length to cut it")
        filler = next((token for token in (self.pad_id, self.eos_id) if token is not None), 0)
        ids, mask = np.full((len(rows), width), filler, np.int32), np.zeros((len(rows), width), np.bool_)
        for place, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[place, span], mask[place, span] = row, True
        return Batch(ids, mask)

    def replaced(
        self, *, bos_token: str | None = None, eos_token: str | None = None, pad_token: str | None = None, unk_token: str | None = None
    ) -> Self:
        """A copy with other special tokens, given by their text. Raises InvalidRequest for a text that is not one token."""
        texts = {"bos": bos_token, "eos": eos_token, "pad": pad_token, "unk": unk_token}
        chosen = {key: self._known(key, text) for key, text in texts.items() if text is not None}
        current = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        twin = copy.copy(self)
        twin._name_tokens(self._options.named | current | chosen)
        twin.control_ids = self.control_ids | frozenset(chosen.values())
        return twin

    def _known(self, key: str, text: str) -> int:
        token_id = self.token_id(text)
        if token_id is None:
            raise InvalidRequest(f"{key}_token {text!r} is not in the model's vocabulary")
        return token_id


class TextStream:
    """Text of tokens as they come: what :meth:`push` and :meth:`flush` return adds up to ``decode(ids, skip_special=True)``.

    ``keep`` names control tokens to show all the same. ``continues``: the tokens continue a text, so that a first space is meant.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep: Iterable[str] = (), continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.control_ids.difference(tokenizer.token_id(text) for text in keep)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_space and not continues

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a code point is incomplete."""
        if token_id in self._hidden:
            return ""
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is held back at the end: U+FFFD for a code point that was never completed."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
