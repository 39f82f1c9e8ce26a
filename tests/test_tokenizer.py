import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HubTokenizer

from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.tokenizer import TextStream, Tokenizer
from tars_jax.tokenizer.pretokenizers import _BY_NAME

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2-q4_1.json").read_text())["tokenize"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again, and the dogs do not mind the foxes.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Größe, naïve façade, Œuvre; 日本語のテキストです。中文文本。한국어 문장. Привет, как дела?",
    "In 2024, 1234567890 people's answers weren't heard; they've said: I'm here, you'll see!  It costs $3.50 a day.",
    "aaaa aaaaaaa aa abababab ababab bababa banana bananas   spaces    more spaces",
] * 8
texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="ab n\té▁<s>0123日🚀", max_size=40),
    st.lists(st.sampled_from(" ".join(CORPUS).split()), max_size=12).map(" ".join),
)
few = settings(max_examples=60, deadline=None)


def gguf(kind: str, tokens: Sequence[str], types: Sequence[int], **more: Any) -> dict[str, Any]:
    fields = {"model": kind, "tokens": list(tokens), "token_type": np.array(types, np.int32), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def byte_level(pre: str = "gpt-2", special: Sequence[tuple[str, int]] = (), **more: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE trained on the corpus, with further (text, type) tokens behind."""
    trained = json.loads(TRAINED.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    types = [1] * len(tokens) + [kind for _, kind in special]
    merges = [" ".join(pair) for pair in trained["merges"]]
    return gguf("gpt2", tokens + [text for text, _ in special], types, pre=pre, merges=merges, **more)


def _train_byte_level() -> HubTokenizer:
    hub = HubTokenizer(models.BPE())
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hub.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hub.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return hub


def train_sentencepiece(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    identity: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **identity | options
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gguf_of(kind: str, pieces: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Any]:
    def token_type(place: int) -> int:
        tests = ((2, pieces.is_unknown), (3, pieces.is_control), (6, pieces.is_byte), (5, pieces.is_unused))
        return next((number for number, test in tests if test(place)), 1)

    places = range(pieces.get_piece_size())
    scores = np.array([pieces.get_score(place) for place in places], np.float32)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return gguf(kind, [pieces.id_to_piece(place) for place in places], [token_type(place) for place in places], scores=scores, **ids | more)


TRAINED = _train_byte_level()
SENTENCEPIECE = train_sentencepiece(model_type="bpe", vocab_size=500, byte_fallback=True)
UNIGRAM = train_sentencepiece(model_type="unigram", vocab_size=250)
BYTE_LEVEL = Tokenizer.from_gguf(byte_level())
SPM = Tokenizer.from_gguf(gguf_of("llama", SENTENCEPIECE))
SPACED_PIECES = train_sentencepiece(model_type="bpe", vocab_size=300, split_by_whitespace=False)
SPACED = Tokenizer.from_gguf(gguf_of("llama", SPACED_PIECES))
UNIGRAM_TOKENIZER = Tokenizer.from_gguf(gguf_of("t5", UNIGRAM))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    from tars_jax.loaders.gguf import open_gguf

    return Tokenizer.from_gguf(open_gguf(smollm2_path).metadata)


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_smollm2_tokens_are_those_of_llama_cpp(smollm2_tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert smollm2_tokenizer.encode(case["text"]) == case["ids"]
    assert smollm2_tokenizer.encode(case["text"], add_special=True) == case["ids_with_special"]
    assert smollm2_tokenizer.decode(case["ids"]) == case["detokenized"]


def test_smollm2_stops_at_the_ends_of_turns_and_texts(smollm2_tokenizer: Tokenizer) -> None:
    ends = {smollm2_tokenizer.token_bytes(token) for token in smollm2_tokenizer.eog_ids}
    assert ends >= {b"<|im_end|>", b"<|endoftext|>"}
    ids = smollm2_tokenizer
    assert (ids.vocab_size, ids.bos_id, ids.eos_id, ids.pad_id, ids.unk_id) == (49152, 1, 2, 2, 0)


@few
@given(texts)
def test_byte_level_bpe_equals_the_tokenizers_library(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert ids == TRAINED.encode(text).ids
    assert BYTE_LEVEL.decode(ids) == text


@few
@given(texts)
def test_digits_stand_alone_for_starcoder_and_smollm(text: str) -> None:
    reference = HubTokenizer.from_str(TRAINED.to_str())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    reference.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert Tokenizer.from_gguf(byte_level("smollm")).encode(text) == reference.encode(text).ids


@few
@given(texts)
def test_sentencepiece_bpe_equals_sentencepiece(text: str) -> None:
    ids = SPM.encode(text)
    assert ids == SENTENCEPIECE.encode(text)
    assert SPM.decode(ids) == SENTENCEPIECE.decode(ids)


@few
@given(texts)
def test_sentencepiece_with_spaces_inside_tokens_equals_sentencepiece(text: str) -> None:
    assert SPACED.encode(text) == SPACED_PIECES.encode(text)


@few
@given(st.text(alphabet="ab no日quick", max_size=30))
def test_unigram_equals_sentencepiece(text: str) -> None:
    assert UNIGRAM_TOKENIZER.encode(text) == UNIGRAM.encode(text)


@pytest.mark.parametrize("name", sorted(_BY_NAME))
def test_every_pretokenizer_compiles_and_loses_nothing(name: str) -> None:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _BY_NAME[name].patterns]
    text = " ".join(CORPUS[:5])
    assert "".join(part for part, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-bpe", ["getUserName", "'S", " ", "123", "45", " 漢字ab", " !!\n"]),
        ("qwen2", ["getUserName", "'S", " ", "1", "2", "3", "4", "5", " 漢字ab", " !!\n"]),
        ("gpt-4o", ["get", "User", "Name'S", " ", "123", "45", " 漢字ab", " !!\n"]),
        ("tekken", ["get", "User", "Name", "'S", " ", "1", "2", "3", "4", "5", " 漢字ab", " !!\n"]),
        ("deepseek-v3", ["getUserName", "'S", " ", "123", "45", " ", "漢字", "ab", " !!\n"]),
        ("kimi-k2", ["get", "User", "Name'S", " ", "123", "45", " ", "漢字", "ab", " !!\n"]),
        ("superbpe", ["getUserName'S ", "12", "345", " 漢字ab !!\n"]),
        ("bloom", ["getUserName'S", " 12345", " 漢字ab", " !!\n"]),
    ],
)
def test_families_of_models_split_words_their_way(name: str, words: list[str]) -> None:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _BY_NAME[name].patterns]
    assert [part for part, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str("getUserName'S 12345 漢字ab !!\n")] == words


def test_qwen_text_is_normalised_to_nfc() -> None:
    assert Tokenizer.from_gguf(byte_level("qwen2")).encode("e\u0301") == BYTE_LEVEL.encode("\u00e9")


def test_user_defined_tokens_always_match_and_control_tokens_when_asked() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(special=[("<tool>", 4), ("<tool><end>", 3)]))
    size = tokenizer.vocab_size
    assert tokenizer.encode("a<tool><end>b") == [*tokenizer.encode("a"), size - 2, *tokenizer.encode("<end>b")]
    assert tokenizer.encode("a<tool><end>b", parse_special=True) == [*tokenizer.encode("a"), size - 1, *tokenizer.encode("b")]
    assert tokenizer.decode([size - 2, size - 1], skip_special=True) == "<tool>"


def test_bos_is_added_once() -> None:
    assert SPM.encode("hi", add_special=True)[:2] == [1, *SPM.encode("hi")][:2]
    assert SPM.encode("<s>hi", add_special=True).count(1) == 1
    assert SPM.encode("", add_special=True) == [1]


def test_text_that_ends_a_turn_is_a_control_token_whatever_the_file_says() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(special=[("<|im_end|>", 1), ("<|fim_pad|>", 3)]))
    assert tokenizer.eog_ids == {tokenizer.vocab_size - 2, tokenizer.vocab_size - 1}
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>", parse_special=True), skip_special=True) == "a"


def test_harmony_messages_end_without_ending_the_answer() -> None:
    special = [("<|end|>", 3), ("<|return|>", 3), ("<|call|>", 3)]
    tokenizer = Tokenizer.from_gguf(byte_level(special=special))
    assert {tokenizer.token_bytes(token) for token in tokenizer.eog_ids} == {b"<|return|>", b"<|call|>"}


def test_wordpiece_equals_the_tokenizers_library() -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "aff", "able", "▁the", "▁fox", "es", "▁!"]
    ids = {"unknown_token_id": 1, "bos_token_id": 2, "seperator_token_id": 3}
    tokenizer = Tokenizer.from_gguf(gguf("bert", tokens, [3, 3, 3, 3, *[1] * 7], **ids))
    assert tokenizer.encode("The foxes Unaffable dog!", add_special=True) == [2, 7, 8, 9, 4, 5, 6, 1, 10, 3]
    assert tokenizer.decode([7, 8, 9], skip_special=True) == "the foxes"


@few
@given(text=texts)
def test_a_tokenizer_json_gives_the_same_ids_as_its_library(hub: Tokenizer, text: str) -> None:
    ids = hub.encode(text)
    assert ids == TRAINED.encode(text).ids
    assert hub.decode(ids) == text


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The trained tokenizer as a Hugging Face folder, with special tokens and settings that must not cut texts."""
    folder = tmp_path_factory.mktemp("hub")
    hub = HubTokenizer.from_str(TRAINED.to_str())
    hub.add_special_tokens(["<|bos|>", "<|eos|>"])
    hub.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", hub.token_to_id("<|bos|>"))])
    hub.enable_truncation(3)
    hub.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    return Tokenizer.from_file(folder)


def test_a_hub_folder_names_its_special_tokens(hub: Tokenizer) -> None:
    assert hub.encode("a<|eos|>", add_special=True)[::2] == [hub.bos_id, hub.eos_id]
    assert hub.eog_ids == {hub.eos_id, 5, 6}
    assert len(hub.encode("<|eos|>")) > 1


def test_a_sentencepiece_tokenizer_json_decodes_like_its_library(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    hub = HubTokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    hub.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hub.decoder = decoders.Sequence(steps)
    hub.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    ids = tokenizer.encode("a é a🚀")
    assert tokenizer.decode(ids) == hub.decode(ids) == "a é a🚀"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPM], ids=["bytes", "sentencepiece"])
@few
@given(text=texts, data=st.data())
def test_streamed_text_adds_up_and_never_splits_a_code_point(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text.replace("\ufffd", ""))
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids, skip_special=True)


@few
@given(st.lists(st.integers(-1, 600), max_size=30))
def test_any_ids_stream_to_what_they_decode_to(ids: list[int]) -> None:
    stream = TextStream(SPM)
    assert "".join(map(stream.push, ids)) + stream.flush() == SPM.decode(ids, skip_special=True)


def test_an_incomplete_code_point_comes_out_at_the_end() -> None:
    stream = TextStream(SPM)
    assert stream.push(SENTENCEPIECE.piece_to_id("<0xF0>")) == ""
    assert stream.flush() == "\ufffd"


def test_a_stream_that_continues_a_text_keeps_its_first_space() -> None:
    stream = TextStream(SPM, continues=True)
    assert "".join(map(stream.push, SPM.encode("fox"))) == " fox"


def test_a_stream_shows_the_control_tokens_it_is_told_to_keep() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(special=[("[TOOL_CALLS]", 3), ("<pad>", 3)]))
    stream = TextStream(tokenizer, keep=["[TOOL_CALLS]", "<think>"])
    assert [stream.push(tokenizer.vocab_size - 2), stream.push(tokenizer.vocab_size - 1)] == ["[TOOL_CALLS]", ""]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_and_masked(side: Any) -> None:
    batch = SPM.batch(["fox", "the quick brown fox"], side=side, pad_to=12)
    assert batch.ids.shape == batch.mask.shape == (2, 12)
    for row, mask, text in zip(batch.ids, batch.mask, ["fox", "the quick brown fox"], strict=True):
        assert row[mask].tolist() == SPM.encode(text, add_special=True)
        assert set(row[~mask]) == {SPM.eos_id}
        assert mask[-1 if side == "left" else 0]


def test_a_batch_is_cut_only_when_asked() -> None:
    assert SPM.batch(["the quick brown fox"], max_length=3).ids.shape == (1, 3)
    with pytest.raises(InvalidRequest, match="does not fit pad_to=2"):
        SPM.batch(["the quick brown fox"], pad_to=2)


def test_special_tokens_can_be_replaced_by_text() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(special=[("<a>", 3), ("<b>", 4)], bos_token_id=0))
    other = tokenizer.replaced(bos_token="<a>", eos_token="<b>", pad_token="<a>")
    assert (other.bos_id, other.eos_id, other.pad_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1, tokenizer.vocab_size - 2)
    assert other.eos_id in other.eog_ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (0, None, frozenset())
    with pytest.raises(InvalidRequest, match="pad_token '<nope>' is not in the model's vocabulary"):
        tokenizer.replaced(pad_token="<nope>")


def test_lone_surrogates_become_replacement_characters() -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "unsupported tokenizer 'rwkv'"),
        ({"tokenizer.ggml.pre": "nonesuch"}, "unknown pre-tokenizer 'nonesuch'"),
        ({"tokenizer.ggml.tokens": None}, "has no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' stands twice"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries for"),
        ({"tokenizer.ggml.tokens": ["\udcff"], "tokenizer.ggml.token_type": [1]}, "inconsistent"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair"),
        ({"tokenizer.ggml.merges": ["nope a"]}, "inconsistent"),
        ({"tokenizer.ggml.model": "llama"}, "scores has 0 entries"),
    ],
)
def test_broken_files_are_refused_with_the_reason(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf(byte_level() | broken)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"needs its tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
