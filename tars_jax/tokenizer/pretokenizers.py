"""Pre-tokenizers of byte-level BPE models, by the name a GGUF file gives in ``tokenizer.ggml.pre``.

A pre-tokenizer cuts text into words before BPE merges run inside each word. Every entry is a list of regular expressions applied in
turn: each splits the pieces left by the one before into its matches and the text between them. The expressions are those of the
models' own ``tokenizer.json`` files; the names are the ones llama.cpp writes (``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``).
"""

import dataclasses

from tars_jax.errors import ModelFileError


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How one family of models cuts text into words."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token needs no merges
    add_bos: bool = False  # when the file does not say
    nfc: bool = False  # text is normalised to NFC first, as the model's Hugging Face tokenizer does
    byte_level: bool = True  # False: pieces are UTF-8 with U+2581 for spaces (Gemma 4)


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""


def _cased(suffix: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """Words cut where lower case meets upper case (o200k), each with an optional ``suffix``."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}{_SYMBOLS}{_BLANKS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{_SYMBOLS}{_BLANKS}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_BLANKS}"
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_TEKKEN = rf"{_cased('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_BLANKS}"
_O200K = rf"{_cased(_CONTRACTION + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_BLANKS}"
_DEEPSEEK3 = rf"{_ASCII_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*{_BLANKS}"
_NOT_HAN_UPPER, _NOT_HAN_LOWER = _UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]"
_KIMI = rf"\p{{Han}}+|{_cased(_CONTRACTION + '?', _NOT_HAN_UPPER, _NOT_HAN_LOWER)}|\p{{N}}{{1,3}}{_SYMBOLS}{_BLANKS}"
_CJK, _CJK_KANA = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# DeepSeek LLM lists its cased letters one by one: Unicode's, less the blocks below.
_DEEPSEEK_LETTERS = (
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\u2d00-\u2d2d\ua790-\uab68\x{10570}-\x{105bc}\x{16e40}-\x{1df1e}]]+"  # Georgian to mathematical
)
_ASIAN = (  # Han, kana, Thai, Lao, Khmer, Myanmar, Hangul
    r"[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff"
    r"\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    r"|[\u3105-\u312f]+|" + _CJK_KANA
)
_SENTINELS = (r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )")
_JAIS2_BLANKS = "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"

_LLAMA3_FAMILY = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK3_FAMILY = PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK3))
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SYMBOLS + r"|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_WORD = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"

_FAMILIES: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default", ""),
    _LLAMA3_FAMILY: ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    PreTokenizer((_LLAMA3.removesuffix(r"|\s+(?!\S)|\s+") + _JAIS2_BLANKS,)): ("jais-2",),
    PreTokenizer((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+{_SYMBOLS}{_BLANKS}"), ignore_merges=True): ("minicpm5",),
    PreTokenizer(
        (r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _CJK, r"\p{N}+")
    ): ("deepseek-llm",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")): ("deepseek-coder",),
    _DEEPSEEK3_FAMILY: ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    PreTokenizer((_YOUTU_ASIAN, _O200K.replace(r"\p{N}{1,3}", r"\p{N}")), ignore_merges=True): ("youtu",),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    _DIGITS_GPT2: ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
    dataclasses.replace(_DIGITS_GPT2, nfc=True): ("command-r",),
    PreTokenizer((_GPT2,)): (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe", "gigachat"),
        *("a.x-4.0", "mellum", "jais", "trillion", "granite-docling", "exaone4"),
    ),
    PreTokenizer((_GPT2,), nfc=True): ("mpt", "olmo", "modern-bert"),
    PreTokenizer((_QWEN2,), nfc=True): ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
    PreTokenizer((_QWEN2,)): ("kormo", "f2llmv2", "solar-open", "grok-2"),
    PreTokenizer((_QWEN35,), nfc=True): ("qwen35",),
    PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)): ("laguna",),
    PreTokenizer((_QWEN2.removeprefix(_CONTRACTION + "|"),)): ("ufakzeka",),
    PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_BLANKS}",)): ("seed-coder",),
    PreTokenizer((_BAILING,)): ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreTokenizer((rf"{_CONTRACTION}|{_EXAONE_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)): ("exaone-moe",),
    PreTokenizer((_BLOOM,)): ("bloom", "poro-chat", "gpt3-finnish"),
    PreTokenizer((_BLOOM, r"\p{N}")): ("viking",),
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((_O200K,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer((_O200K,), ignore_merges=True): ("granite-embed-multi-97m",),
    PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K), nfc=True): ("tiny_aya", "cohere2moe"),
    PreTokenizer((_KIMI,)): ("kimi-k2",),
    PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
    PreTokenizer((r"\p{N}+", r"\p{N}{1,3}(?=(?:\p{N}{3})*$)", _ASIAN, _DEEPSEEK3)): ("afmoe",),
    PreTokenizer((*_SENTINELS, r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2), add_bos=True): ("chameleon",),
    PreTokenizer((r"[^\n]+|[\n]+",), ignore_merges=True, add_bos=True, byte_level=False): ("gemma4", "granite-embed-multi-311m"),
    PreTokenizer((r"[^\n]+|[\n]+",), byte_level=False): ("sarvam-moe",),
}
_BY_NAME = {name: family for family, names in _FAMILIES.items() for name in names}


def pretokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer a GGUF file names; a missing name is llama.cpp's ``default``. Raises ModelFileError for an unknown one."""
    if name not in _BY_NAME:
        raise ModelFileError(f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre): this model's text cannot be split into words")
    return _BY_NAME[name]
