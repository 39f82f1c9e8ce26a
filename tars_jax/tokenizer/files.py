"""Tokenizers as files hold them: the ``tokenizer.ggml.*`` keys of a GGUF file, and Hugging Face's ``tokenizer.json``."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as HubTokenizer

from tars_jax.errors import ModelFileError
from tars_jax.tokenizer.pretokenizers import pretokenizer
from tars_jax.tokenizer.segmenters import (
    Encoder,
    HubEncoder,
    PartedEncoder,
    SentencePieceBpe,
    byte_level_bpe,
    unigram,
    wordpiece,
)
from tars_jax.tokenizer.vocabulary import BYTE, CONTROL, END_TEXTS, NORMAL, SPACE, USER_DEFINED, Vocabulary, end_of_generation


@dataclasses.dataclass(frozen=True)
class SpecialOptions:
    """What a file says about special tokens."""

    named: dict[str, int | None]  # by key: bos, eos, eot, eom, unk, pad, sep, fim_pad, fim_rep, fim_sep
    add_bos: bool
    add_eos: bool
    strip_space: bool  # the first space of decoded text is the tokenizer's own
    ends: frozenset[int] = frozenset()  # further ends of a generation


class TokenizerParts(NamedTuple):
    """All that makes a tokenizer."""

    vocabulary: Vocabulary
    encoder: Encoder
    options: SpecialOptions


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer of a GGUF file. Raises ModelFileError if its keys are missing, inconsistent or name an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _READERS:
        raise ModelFileError(f"unsupported tokenizer {kind!r} (tokenizer.ggml.model); supported: {', '.join(_READERS)}")
    return _READERS[kind](metadata)


def _read_bpe(metadata: Mapping[str, Any]) -> TokenizerParts:
    gemma4 = metadata["tokenizer.ggml.model"] == "gemma4"
    pre = pretokenizer("gemma4" if gemma4 else metadata.get("tokenizer.ggml.pre", "default"))
    if "tokenizer.ggml.merges" not in metadata:
        raise ModelFileError("the model file has no merges (tokenizer.ggml.merges)")
    vocabulary = Vocabulary.from_gguf(metadata, byte_level=pre.byte_level)
    options = _gguf_options(metadata, vocabulary, {}, add_bos=pre.add_bos)
    segment = byte_level_bpe(vocabulary, metadata["tokenizer.ggml.merges"], pre)
    return TokenizerParts(vocabulary, PartedEncoder(vocabulary, segment), options)


def _read_spm(metadata: Mapping[str, Any]) -> TokenizerParts:
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    vocabulary = Vocabulary.from_gguf(metadata, byte_level=False)
    options = _gguf_options(metadata, vocabulary, {"bos": 1, "eos": 2, "unk": 0}, add_bos=True, strip_space=prefix)
    segment = SentencePieceBpe(vocabulary, _scores(metadata, vocabulary), options.named["unk"])
    return TokenizerParts(vocabulary, PartedEncoder(vocabulary, segment, " " if prefix else ""), options)


def _read_unigram(metadata: Mapping[str, Any]) -> TokenizerParts:
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    vocabulary = Vocabulary.from_gguf(metadata, byte_level=False)
    options = _gguf_options(metadata, vocabulary, {"eos": 1, "unk": 2, "pad": 0}, add_eos=True, strip_space=prefix)
    charsmap = np.asarray(metadata.get("tokenizer.ggml.precompiled_charsmap", ())).astype(np.uint8).tobytes()
    squeeze = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    scores, unk_id = _scores(metadata, vocabulary), options.named["unk"] or 0
    segment = unigram(vocabulary, scores, unk_id, charsmap, prefix=prefix, squeeze=squeeze)
    return TokenizerParts(vocabulary, PartedEncoder(vocabulary, segment), options)


def _read_wordpiece(metadata: Mapping[str, Any]) -> TokenizerParts:
    vocabulary = Vocabulary.from_gguf(metadata, byte_level=False)
    defaults = {"bos": 101, "unk": 100, "sep": 102, "pad": 0}
    options = _gguf_options(metadata, vocabulary, defaults, add_bos=True, add_eos=True, strip_space=True)
    if (unk_id := options.named["unk"]) is None:
        raise ModelFileError("a WordPiece vocabulary needs an unknown token (tokenizer.ggml.unknown_token_id)")
    options.named["eos"] = options.named["sep"]  # BERT closes a text with its separator
    segment = wordpiece(vocabulary, unk_id, lowercase=bool(metadata.get("tokenizer.ggml.normalizer.lowercase", True)))
    return TokenizerParts(vocabulary, PartedEncoder(vocabulary, segment), options)


_READERS = {"gpt2": _read_bpe, "llama": _read_spm, "gemma4": _read_bpe, "t5": _read_unigram, "bert": _read_wordpiece}
_GGUF_KEYS = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # "seperator" is the format's own spelling


def _gguf_options(
    metadata: Mapping[str, Any],
    vocabulary: Vocabulary,
    defaults: Mapping[str, int],
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    strip_space: bool = False,
) -> SpecialOptions:
    named: dict[str, int | None] = {}
    for key in ("bos", "eos", "eot", "eom", "unk", "pad", "sep", "fim_pad", "fim_rep", "fim_sep"):
        token_id = metadata.get(f"tokenizer.ggml.{_GGUF_KEYS.get(key, key)}_token_id", defaults.get(key, -1))
        named[key] = int(token_id) if 0 <= token_id < len(vocabulary.tokens) else None
    # Some files mark what ends a turn as ordinary text; as such it would never be read from a prompt, and it would show.
    ends = end_of_generation(vocabulary.index, named)
    vocabulary.make_control(token_id for token_id in ends if vocabulary.tokens[token_id] in END_TEXTS)
    return SpecialOptions(
        named,
        bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        bool(metadata.get("tokenizer.ggml.add_eos_token", add_eos)),
        strip_space,
    )


def _scores(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[float]:
    scores = np.asarray(metadata.get("tokenizer.ggml.scores", ()), np.float32)
    if len(scores) < len(vocabulary.tokens):
        raise ModelFileError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    values: list[float] = scores[: len(vocabulary.tokens)].tolist()
    return values


def read_hub(path: Path) -> TokenizerParts:
    """The tokenizer of a Hugging Face folder, or of a ``tokenizer.json`` itself. Raises ModelFileError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelFileError(f"{file}: no such file; a Hugging Face tokenizer needs its tokenizer.json")
    try:
        hub = HubTokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelFileError(f"{file}: not a tokenizer: {error}") from error
    hub.no_truncation()
    hub.no_padding()
    decoder = json.loads(hub.decoder.__getstate__()) if hub.decoder is not None else {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    vocabulary = _hub_vocabulary(hub, steps)
    return TokenizerParts(vocabulary, HubEncoder(hub), _hub_options(file.parent, hub, vocabulary, _strips_space(steps)))


def _hub_vocabulary(hub: HubTokenizer, steps: Mapping[str, Any]) -> Vocabulary:
    index: dict[str, int] = hub.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(index.values(), default=-1) + 1)
    for token, place in index.items():
        tokens[place] = token
    kinds = np.full(len(tokens), NORMAL, np.int32)
    if "ByteFallback" in steps:
        kinds[[place for token, place in index.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)]] = BYTE
    if "WordPiece" in steps:
        mark = steps["WordPiece"]["prefix"]
        tokens = [token.removeprefix(mark) if token.startswith(mark) else SPACE + token for token in tokens]
    for place, added in hub.get_added_tokens_decoder().items():
        tokens[place], kinds[place] = added.content, CONTROL if added.special else USER_DEFINED
    return Vocabulary(tokens, kinds, "ByteLevel" in steps, index)


def _strips_space(steps: Mapping[str, Any]) -> bool:
    metaspace = steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    return metaspace or "WordPiece" in steps or steps.get("Strip", {}).get("start", 0) > 0


def _hub_options(folder: Path, hub: HubTokenizer, vocabulary: Vocabulary, strip_space: bool) -> SpecialOptions:
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")

    def token_id(*keys: str) -> int | None:
        texts = (entry.get("content") if isinstance(entry := config.get(key), dict) else entry for key in keys)
        return next((vocabulary.index[text] for text in texts if isinstance(text, str) and text in vocabulary.index), None)

    named = {"bos": token_id("bos_token", "cls_token"), "eos": token_id("eos_token", "sep_token"), "pad": token_id("pad_token")}
    unknown = getattr(hub.model, "unk_token", None)
    named["unk"] = token_id("unk_token") if unknown is None else vocabulary.index.get(unknown)
    frame = hub.encode("").ids  # what the post-processor puts around a text
    if named["bos"] is None and frame and frame[0] != named["eos"]:
        named["bos"] = frame[0]
    add_bos = config.get("add_bos_token", bool(frame) and frame[0] == named["bos"])
    add_eos = config.get("add_eos_token", bool(frame) and frame[-1] == named["eos"])
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    more = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
    return SpecialOptions(named, bool(add_bos), bool(add_eos), strip_space, frozenset(more))


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{file}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
