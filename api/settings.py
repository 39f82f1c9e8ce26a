"""The one table of environment variables, read once into a frozen `Settings`. Parsing rules are Ollama's."""

import dataclasses
import ipaddress
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api.durations import keep_alive_seconds, parse_duration
from tars_jax.config import EngineConfig, models_dir
from tars_jax.tuning.knobs import read_knobs

log = logging.getLogger(__name__)

DEFAULT_PORT = 11434
_FALSE = frozenset({"", "0", "f", "false"})


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens, or where a client finds it. An empty host is every interface."""

    scheme: str = "http"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def url(self) -> str:
        """The base URL of a client: every interface is reached through loopback."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_host(text: str) -> Address:
    """``[scheme://]host[:port]``; a scheme sets the default port, a bad port falls back to it."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    default = {"http": 80, "https": 443}.get(scheme, DEFAULT_PORT) if separator else DEFAULT_PORT
    rest = rest.partition("/")[0]
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        return Address(scheme, host, _port(port.removeprefix(":"), default))
    if rest.count(":") == 1:
        host, _, port = rest.partition(":")
        return Address(scheme, host, _port(port, default))
    return Address(scheme, rest or "127.0.0.1", default)


def _port(text: str, default: int) -> int:
    if text.isascii() and text.isdigit() and int(text[:6]) <= 65535:
        return int(text)
    if text:
        log.warning("invalid port %r, using %d", text, default)
    return default


def _boolean(text: str) -> bool:
    return text.lower() not in _FALSE


def _debug(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else int(_boolean(text))


def _unsigned(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a number from 0 up")
    return int(text)


_CACHE_TYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "q8_0": "int8"}


def _cache_type(text: str) -> str:
    if text.lower() not in _CACHE_TYPES:
        raise ValueError(f"{text!r} is none of {', '.join(_CACHE_TYPES)}")
    return _CACHE_TYPES[text.lower()]


def _keep_alive(text: str) -> float:
    try:
        return keep_alive_seconds(int(text))
    except ValueError:
        return keep_alive_seconds(parse_duration(text))


_UNITS = {"": 1, "b": 1, **{f"{letter}{i}b": (1024 if i else 1000) ** (n + 1) for n, letter in enumerate("kmgt") for i in ("", "i")}}


def parse_size(text: str) -> int:
    """Bytes: a number with a unit (KB, MB, GB, KiB, MiB, ...) or without. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text, re.ASCII)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 100MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _networks(text: str) -> tuple[str, ...]:
    return tuple(str(ipaddress.ip_network(item, strict=False)) for item in _list(text))


@dataclasses.dataclass(frozen=True)
class Variable:
    """An environment variable: the `Settings` field it fills, how its text is read, what it means."""

    name: str
    field: str
    parse: Callable[[str], Any]
    help: str


VARIABLES = (
    Variable("OLLAMA_HOST", "address", parse_host, "address of the server (default 127.0.0.1:11434)"),
    Variable("OLLAMA_MODELS", "models", lambda text: Path(text).expanduser(), "folder of the models (default ~/.tars/models)"),
    Variable("OLLAMA_KEEP_ALIVE", "keep_alive", _keep_alive, 'how long idle models stay loaded (default "5m", negative: forever)'),
    Variable("OLLAMA_CONTEXT_LENGTH", "context_length", _unsigned, "tokens of a request, prompt and answer (default 4096)"),
    Variable("OLLAMA_NUM_PARALLEL", "num_parallel", _unsigned, "requests decoded together (default: the engine's)"),
    Variable("OLLAMA_MAX_LOADED_MODELS", "max_loaded_models", _unsigned, "models in memory at once (default 3)"),
    Variable("OLLAMA_MAX_QUEUE", "max_queue", _unsigned, "waiting requests before new ones are refused (default 512)"),
    Variable(
        "OLLAMA_KV_CACHE_TYPE",
        "cache_dtype",
        _cache_type,
        "numbers of the KV cache: f16, bf16, f32, q8_0 (default: bf16 if the CPU has it, else f16)",
    ),
    Variable("OLLAMA_ORIGINS", "origins", _list, "comma-separated origins allowed besides local ones"),
    Variable("TARS_PREFIX_CACHE", "prefix_bytes", parse_size, "disk for read prompts of unloaded models, in TARS_CACHE (default 0: off)"),
    Variable("TARS_PROMPT_LOOKUP", "prompt_lookup", _boolean, "guess tokens by what followed the same ones earlier (default on)"),
    Variable("TARS_INTER_TOKEN_MS", "inter_token_ms", _unsigned, "steps are kept this short if several share the engine (default 100)"),
    Variable("TARS_TUNED", "tuned", lambda text: read_knobs(Path(text).expanduser()), "file of engine settings, written by `tars tune`"),
    Variable("TARS_RESPONSE_CACHE", "response_cache_bytes", parse_size, "memory for answers to repeated requests (default 100MB, 0: off)"),
    Variable("TARS_RESPONSE_CACHE_TTL", "response_cache_ttl", _keep_alive, 'how long they are kept (default "1h", negative: forever)'),
    Variable(
        "TARS_RESPONSE_CACHE_SHARED", "response_cache_shared", _boolean, "give an answer to other clients than the one it was made for"
    ),
    Variable("TARS_TRUSTED_PROXIES", "trusted_proxies", _networks, "comma-separated addresses whose X-Forwarded-For is believed"),
    Variable("TARS_OPTIMIZATION", "optimization", _boolean, "let clients evolve the models that are served (default on)"),
    Variable("OLLAMA_DEBUG", "debug", _debug, "0 information, 1 debug"),
    Variable("OLLAMA_NOHISTORY", "no_history", _boolean, "do not keep the prompt history of interactive chats"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the server and the command line take from the environment."""

    address: Address = Address()
    models: Path = dataclasses.field(default_factory=models_dir)
    keep_alive: float = 300.0  # seconds; infinite: forever
    context_length: int = 4096  # tokens of one request; a model's own limit may be lower
    num_parallel: int = 0  # rows; 0: the engine's default
    max_loaded_models: int = 3
    max_queue: int = 512
    origins: tuple[str, ...] = ()
    cache_dtype: str = ""
    prefix_bytes: int = 0
    prompt_lookup: bool | None = None  # this and the next: None is what ``tuned`` or the engine says
    inter_token_ms: int | None = None
    tuned: Mapping[str, int | float] = dataclasses.field(default_factory=dict)  # fields of an engine's configuration
    response_cache_bytes: int = 100_000_000
    response_cache_ttl: float = 3600.0  # seconds; infinite: forever
    response_cache_shared: bool = False  # between API keys, or addresses of clients without one
    trusted_proxies: tuple[str, ...] = ()  # addresses and networks
    optimization: bool = True
    debug: int = 0
    no_history: bool = False

    def engine(self, context: int) -> EngineConfig:
        """How an engine serves a model with requests of up to ``context`` tokens."""
        chosen = {"prompt_lookup": self.prompt_lookup, "target_inter_token_ms": self.inter_token_ms}
        settings: dict[str, Any] = {
            "max_context": context,
            "max_rows": self.num_parallel or EngineConfig.max_rows,
            "max_queue": self.max_queue,
            "cache_dtype": self.cache_dtype,
            "prefix_bytes": self.prefix_bytes,
        }
        return EngineConfig(**settings | dict(self.tuned) | {name: value for name, value in chosen.items() if value is not None})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the table; a value that cannot be read is reported and its default kept. Raises InvalidRequest for a file that TARS_TUNED
        names and that cannot be used: whoever made it wants it to count."""
        values: dict[str, Any] = {}
        for variable in VARIABLES:
            text = environ.get(variable.name, "").strip().strip("\"'").strip()
            if not text:
                continue
            try:
                values[variable.field] = variable.parse(text)
            except ValueError as error:
                log.warning("%s: %s; keeping the default", variable.name, error)
        automatic = [field for field in ("max_loaded_models", "context_length") if values.get(field) == 0]
        return cls(**{field: value for field, value in values.items() if field not in automatic})
