"""Configurations: frozen, hashable dataclasses without arrays, so that a config can be a static jit argument."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tars_jax.errors import InvalidRequest

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]
GrammarKind = Literal["json", "regex", "gbnf", "lark"]

GRAMMAR_KINDS: tuple[GrammarKind, ...] = ("json", "regex", "gbnf", "lark")
MAX_BIASES = 1024  # tokens a request may give a bias


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (names follow Hugging Face's ``rope_scaling``)."""

    kind: RopeKind = "none"
    factor: float = 1.0
    original_context: int = 0  # tokens; 0: the model's own context length
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; None: the kind's own formula
    mscale: float = 0.0  # yarn as DeepSeek writes it; 0: unset
    mscale_all_dim: float = 0.0
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope, one per frequency
    long_factors: tuple[float, ...] = ()  # longrope; also the divisors a GGUF stores in rope_freqs.weight


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # tokens the model was trained for
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_dim: int = 0  # rotated dimensions of a head; 0: all
    rope_scaling: RopeScaling = RopeScaling()
    activation: Activation = "silu"
    gated_mlp: bool = True  # SwiGLU / GeGLU; False: up, activation, down
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every query and key head before the rotation (Qwen3)
    sliding_window: int = 0  # tokens; 0: full attention
    no_rope_interval: int = 0  # every n-th layer goes without rotation (SmolLM3); 0: none

    def __post_init__(self) -> None:
        positive = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for field in positive:
            if getattr(self, field) <= 0:
                raise InvalidRequest(f"model configuration: {field} must be positive, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidRequest(
                f"model configuration: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim or self.head_dim


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model."""

    max_context: int = 0  # tokens of one request, prompt and answer; 0: min(the model's context, 4096)
    max_rows: int = 64  # requests decoded together
    max_step_tokens: int = 512  # tokens of one step, prefill chunks and decodes together
    page_size: int = 16  # tokens of a KV page
    cache_tokens: int = 0  # tokens the KV pool holds; 0: from free memory, at most max_rows * max_context
    cache_dtype: Literal["", "float16", "bfloat16", "float32", "int8"] = ""  # "": bfloat16 on a CPU that multiplies it, else float16
    max_queue: int = 512  # waiting requests before new ones are refused
    kept_tokens: int = 0  # tokens whose pages are kept for reuse when no request holds them; 0: two contexts on a CPU, all on a GPU
    prefix_cache: bool = True  # keep finished requests' pages for others that begin with the same tokens
    prefix_bytes: int = 0  # of disk for such pages of models that were unloaded; 0: none are saved
    prefix_folder: str = ""  # where; "": in the cache folder
    prompt_lookup: bool = True  # guess tokens by what followed the same ones earlier in the request; answers do not change
    target_inter_token_ms: float = 100.0  # steps are kept this short, by measured times, while several requests share the engine
    tensor_parallel: int = 1  # devices that share every layer


_MOST, _INT = 1e6, 2**31 - 1  # stand for "no bound"
_RANGES: tuple[tuple[str, float, float], ...] = (  # of the fields of `SamplingParams`
    ("max_tokens", 0, _INT),
    ("temperature", 0, _MOST),
    ("top_k", 0, _INT),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("top_n_sigma", 0, _MOST),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 1),
    ("dynatemp_range", 0, _MOST),
    ("dynatemp_exponent", 0, _MOST),
    ("mirostat", 0, 2),
    ("mirostat_tau", 0, _MOST),
    ("mirostat_eta", 0, _MOST),
    ("repeat_penalty", 0, _MOST),
    ("presence_penalty", -_MOST, _MOST),
    ("frequency_penalty", -_MOST, _MOST),
    ("repeat_last_n", -1, _INT),
    ("dry_multiplier", 0, _MOST),
    ("dry_base", 1, _MOST),
    ("dry_allowed_length", 1, _INT),
    ("dry_penalty_last_n", -1, _INT),
    ("n", 1, 128),
    ("min_tokens", 0, _INT),
    ("top_logprobs", 0, 20),
    ("prompt_logprobs", 0, 20),
    ("num_keep", -1, _INT),
)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names and defaults are Ollama's, else llama.cpp's or vLLM's; the order of
    filters is llama.cpp's: penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature. Mirostat stands in for those after
    top-n-sigma but the temperature."""

    max_tokens: int | None = None  # None: until a stop or the context is full
    temperature: float = 0.8  # 0: greedy; filters then do not matter
    top_k: int = 40  # 0: off
    top_p: float = 0.9  # 1: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    top_n_sigma: float = 0.0  # standard deviations below the best; 0: off
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1  # above 0.5 it has no effect
    dynatemp_range: float = 0.0  # 0: off
    dynatemp_exponent: float = 1.0
    mirostat: int = 0  # 0: off; 1, 2: the version
    mirostat_tau: float = 5.0  # bits of surprise a token shall have in the mean
    mirostat_eta: float = 0.1  # learning rate
    repeat_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64  # tokens the penalties look back on; 0: off, -1: the whole context
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens that may be repeated without a penalty
    dry_penalty_last_n: int = -1  # tokens DRY looks back on; 0: off, -1: the whole context
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # tokens that contain one end a repetition
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[str, ...] = ()  # texts that are not generated, at a word's beginning or inside
    seed: int | None = None  # None: drawn at random
    n: int = 1  # answers; number i is drawn with seed + i
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # tokens before which nothing ends the answer
    logprobs: bool = False
    top_logprobs: int = 0  # 0..20 alternatives reported per token
    prompt_logprobs: int | None = None  # 0..20 alternatives reported per token of the prompt; None: not even its own
    grammar: str | None = None  # what the answer is constrained to, in the language of ``grammar_kind``
    grammar_kind: GrammarKind = "json"  # whose grammars are JSON schemas, or "json" for any object
    shift: bool = False  # when the context is full, forget its older half and go on
    num_keep: int = 4  # tokens at the beginning that a shift leaves

    def __post_init__(self) -> None:
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                bounded = f"between {low:g} and {high:g}" if high < _MOST else f"{low:g} or more"
                rule = bounded if low > -_MOST else "a finite number"
                raise InvalidRequest(f"{field} must be {rule}, got {value!r}")
        for field in ("top_p", "typical_p", "repeat_penalty"):
            if getattr(self, field) <= 0:
                raise InvalidRequest(f"{field} must be above 0, got {getattr(self, field)!r}")
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= _MOST:
                raise InvalidRequest(f"logit_bias must give token ids a finite number, got {token!r}: {bias!r}")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(f"logit_bias may name {MAX_BIASES} tokens, got {len(self.logit_bias)}")
        if self.grammar_kind not in GRAMMAR_KINDS:
            raise InvalidRequest(f"grammar_kind must be one of {', '.join(GRAMMAR_KINDS)}, got {self.grammar_kind!r}")


def models_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: ``OLLAMA_MODELS`` if set, else ``~/.tars/models``."""
    configured = environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    return Path(configured).expanduser() if configured else Path.home() / ".tars" / "models"
