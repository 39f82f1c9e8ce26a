"""``options`` of a request: request over model PARAMETER over default, each value checked against one table."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from api.schema import BadOption
from tars_jax.config import SamplingParams
from tars_jax.errors import InvalidRequest

log = logging.getLogger(__name__)

_INT32 = 2**31 - 1
_IGNORED = frozenset(  # options of other runners, and old ones: accepted without effect
    {"num_batch", "num_gpu", "main_gpu", "use_mmap", "use_mlock", "num_thread", "numa", "low_vram", "f16_kv", "logits_all"}
    | {"draft_num_predict", "tfs_z", "penalize_newline", "vocab_only"}
    | {"num_gqa", "rope_frequency_base", "rope_frequency_scale"}
)


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return max(-_INT32, min(int(value), _INT32))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        return None
    return float(value)


def _strings(value: Any) -> tuple[str, ...] | None:
    items = [value] if isinstance(value, str) else value  # a lone string is what openapi.yaml allows
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        return None
    return tuple(item for item in items if item)


def _same(value: Any) -> Any:
    return value


# Ollama's runner takes any number and clamps it; these are its clamps. What Ollama does not have is refused when it makes no sense.
_Clamp = Callable[[Any], Any]
_READERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "integer": ("integer", _integer),
    "float32": ("float32", _number),
    "array": ("array", _strings),
    "bool": ("bool", lambda value: value if isinstance(value, bool) else None),
}
_OPTIONS: Mapping[str, tuple[str, str, _Clamp]] = {  # option: (type, SamplingParams field, clamp)
    "num_predict": ("integer", "max_tokens", lambda n: None if n < 0 else n),
    "seed": ("integer", "seed", lambda n: None if n < 0 else n),
    "temperature": ("float32", "temperature", lambda x: min(max(x, 0.0), 1e5)),
    "top_k": ("integer", "top_k", lambda n: max(n, 0)),
    "top_p": ("float32", "top_p", lambda x: min(max(x, 1e-9), 1.0)),
    "min_p": ("float32", "min_p", lambda x: min(max(x, 0.0), 1.0)),
    "repeat_penalty": ("float32", "repeat_penalty", _same),
    "presence_penalty": ("float32", "presence_penalty", _same),
    "frequency_penalty": ("float32", "frequency_penalty", _same),
    "repeat_last_n": ("integer", "repeat_last_n", lambda n: max(n, -1)),
    "stop": ("array", "stop", _same),
    "typical_p": ("float32", "typical_p", lambda x: min(max(x, 1e-9), 1.0)),
    "num_keep": ("integer", "num_keep", lambda n: max(n, -1)),
    "mirostat": ("integer", "mirostat", _same),
    "mirostat_tau": ("float32", "mirostat_tau", _same),
    "mirostat_eta": ("float32", "mirostat_eta", _same),
    "top_n_sigma": ("float32", "top_n_sigma", lambda x: max(x, 0.0)),  # negative is off in llama.cpp
    "xtc_probability": ("float32", "xtc_probability", _same),
    "xtc_threshold": ("float32", "xtc_threshold", _same),
    "dynatemp_range": ("float32", "dynatemp_range", _same),
    "dynatemp_exponent": ("float32", "dynatemp_exponent", _same),
    "dry_multiplier": ("float32", "dry_multiplier", _same),
    "dry_base": ("float32", "dry_base", _same),
    "dry_allowed_length": ("integer", "dry_allowed_length", _same),
    "dry_penalty_last_n": ("integer", "dry_penalty_last_n", _same),
    "dry_sequence_breakers": ("array", "dry_sequence_breakers", _same),
    "min_tokens": ("integer", "min_tokens", _same),
    "ignore_eos": ("bool", "ignore_eos", _same),  # as in llama.cpp and vLLM
}

_OTHERS: Mapping[str, str] = {"num_ctx": "integer", "priority": "integer", "timeout": "float32"}  # what is not about sampling: type


@dataclasses.dataclass(frozen=True)
class Options:
    """The merged options of a request: how to sample, how the model must be loaded, how long it may take."""

    sampling: SamplingParams
    num_ctx: int | None = None  # tokens; None: the server's default
    priority: int = 0  # lower is served first
    timeout: float | None = None  # seconds from arrival to the end of the answer; None: as long as it takes


def merge_options(
    request: Mapping[str, Any],
    model: Mapping[str, Any],
    *,
    grammar: str | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    shift: bool = False,
) -> Options:
    """Options of a request over the PARAMETERs of its model.

    Raises:
        BadOption: a value of the wrong type (500, as Ollama).
        InvalidRequest: a value no sampler can use.
    """
    merged = {**_known(model), **_known(request)}
    num_ctx, priority, timeout = merged.pop("num_ctx", None), merged.pop("priority", 0), merged.pop("timeout", None)
    if timeout is not None and timeout <= 0:
        raise InvalidRequest(f"timeout must be a number of seconds above 0, got {timeout}")
    fields = {_OPTIONS[name][1]: _OPTIONS[name][2](value) for name, value in merged.items()}
    sampling = SamplingParams(**fields, grammar=grammar, logprobs=logprobs, top_logprobs=top_logprobs, shift=shift)
    return Options(sampling, None if num_ctx is None or num_ctx <= 0 else max(num_ctx, 4), priority, timeout)


def check_top_logprobs(count: int) -> None:
    if not 0 <= count <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20")


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have an effect here, with checked types."""
    values = {}
    for name, value in options.items():
        kind = _OPTIONS[name][0] if name in _OPTIONS else _OTHERS.get(name)
        if kind is None:
            if name not in _IGNORED:
                log.warning("invalid option provided: %r", name)
        elif value is not None:
            values[name] = _checked(name, kind, value)
    return values


def read_parameters(lines: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of a Modelfile's PARAMETER lines, name and text each; those of a list are gathered.

    Raises InvalidRequest for names that are unknown and values of the wrong type.
    """
    params: dict[str, Any] = {}
    for name, text in lines:
        kind = _OPTIONS[name][0] if name in _OPTIONS else _OTHERS.get(name)
        if kind == "array":
            params.setdefault(name, []).append(text)
        elif kind or name in _IGNORED:
            params[name] = _plain(name, kind, text)
        else:
            raise InvalidRequest(f"unknown parameter {name!r}")
    return params


def _plain(name: str, kind: str | None, text: str) -> Any:
    """A number or a boolean as JSON has it; ``kind``: None for what has no effect here, which is kept as it is."""
    try:
        value = json.loads(text.lower())
    except ValueError:
        value = None
    if kind is None:
        return text if value is None else value
    if (found := _READERS[kind][1](value)) is None or found != value:
        raise InvalidRequest(f"parameter {name!r} must be of type {kind}, got {text!r}")
    return found


def _checked(name: str, kind: str, value: Any) -> Any:
    type_name, read = _READERS[kind]
    result = read(value)
    if result is None:
        raise BadOption(f'option "{name}" must be of type {type_name}')
    return result
