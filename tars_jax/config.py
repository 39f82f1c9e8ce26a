"""Configurations: frozen, hashable dataclasses without arrays, so that a config can be a static jit argument."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tars_jax.errors import InvalidRequest

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]


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
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_queue: int = 512  # waiting requests before new ones are refused
    kept_tokens: int = 0  # tokens whose pages are kept for reuse when no request holds them; 0: two contexts on a CPU, all on a GPU
    prefix_cache: bool = True  # keep finished requests' pages for others that begin with the same tokens
    prefix_bytes: int = 0  # of disk for such pages of models that were unloaded; 0: none are saved
    prefix_folder: str = ""  # where; "": in the cache folder
    prompt_lookup: bool = True  # guess tokens by what followed the same ones earlier in the request; answers do not change
    target_inter_token_ms: float = 100.0  # steps are kept this short, by measured times, while several requests share the engine
    tensor_parallel: int = 1  # devices that share every layer


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names and defaults are Ollama's; order of filters is llama.cpp's."""

    max_tokens: int | None = None  # None: until a stop or the context is full
    temperature: float = 0.8  # 0: greedy
    top_k: int = 40  # 0: off
    top_p: float = 0.9  # 1: off
    min_p: float = 0.0  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64  # tokens the penalties look back on; 0: off, -1: the whole context
    seed: int | None = None  # None: drawn at random
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0  # 0..20 alternatives reported per token
    grammar: str | None = None  # "json", or a JSON schema as text: the answer is constrained to it

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} must be {rule}, got {getattr(self, field)!r}")

        check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        check(0 <= self.temperature < 1e6, "temperature", "a number from 0 up")
        check(self.top_k >= 0, "top_k", "at least 0")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(0 < self.repeat_penalty < 1e6, "repeat_penalty", "above 0")
        check(abs(self.presence_penalty) < 1e6, "presence_penalty", "a finite number")
        check(abs(self.frequency_penalty) < 1e6, "frequency_penalty", "a finite number")
        check(self.repeat_last_n >= -1, "repeat_last_n", "-1 or more")
        check(0 <= self.top_logprobs <= 20, "top_logprobs", "between 0 and 20")


def models_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: ``OLLAMA_MODELS`` if set, else ``~/.tars/models``."""
    configured = environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    return Path(configured).expanduser() if configured else Path.home() / ".tars" / "models"
