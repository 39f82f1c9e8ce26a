"""Requests of Ollama's API as frozen dataclasses. `api.decode` makes them from JSON; the command line makes them directly."""

import base64
import binascii
import dataclasses
import json
import re
from typing import Annotated, Any

from api.decode import Json
from api.durations import keep_alive_seconds, parse_duration
from tars_jax.errors import InvalidRequest

Think = bool | str | None  # None: the model's own default
_LEVELS = ("high", "medium", "low", "max")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")
_GO_TYPES = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}


class BadOption(InvalidRequest):
    """An option or a format of the wrong type, which Ollama answers with status 500."""

    status = 500


def read_keep_alive(value: Any) -> float:
    """Seconds from a number of seconds or a Go duration; negative is forever."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"Unsupported type: '{_GO_TYPES.get(type(value), 'unknown')}'")
    if isinstance(value, str):
        return keep_alive_seconds(parse_duration(value))
    return keep_alive_seconds(float(min(value, 1e18)))  # an integer of hundreds of digits does not fit a float


def read_think(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError('think must be a boolean or string ("high", "medium", "low", "max", true, or false)')
    if value not in _LEVELS:
        raise ValueError(f'invalid think value: "{value}" (must be "high", "medium", "low", "max", true, or false)')
    return value


def read_images(value: Any) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("images must be a list of base64 strings")
    return tuple(_from_base64(item) for item in value)


def _from_base64(text: str) -> bytes:
    text = text.replace("\n", "").replace("\r", "")
    bad = _NOT_BASE64.search(text.rstrip("="))
    try:
        if bad is None:
            return base64.b64decode(text, validate=True)
        position = bad.start()
    except (binascii.Error, ValueError):
        position = len(text) - len(text) % 4  # the quantum that is not whole
    raise ValueError(f"illegal base64 data at input byte {position}") from None


def grammar(request_format: Any) -> str | None:
    """What constrains an answer: nothing, ``"json"`` or a JSON schema as text."""
    if request_format in (None, ""):
        return None
    if request_format == "json":
        return "json"
    if isinstance(request_format, dict):
        return json.dumps(request_format, ensure_ascii=False)
    shown = json.dumps(json.dumps(request_format))
    raise BadOption(f'invalid format: {shown}; expected "json" or a valid JSON Schema object')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inference:
    """What generate and chat have in common."""

    model: str = ""
    stream: bool = True
    format: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_alive: Annotated[float | None, Json(read=read_keep_alive)] = None  # seconds
    think: Annotated[Think, Json(read=read_think)] = None
    truncate: bool = True  # a chat that does not fit loses its oldest turns
    shift: bool = False  # a prompt that still does not fit loses its middle, and a full context its older half; else an error, or the end
    logprobs: bool = False
    top_logprobs: int = 0
    debug_render_only: Annotated[bool, Json(key="_debug_render_only")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest(_Inference):
    """POST /api/generate"""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: tuple[int, ...] | None = None
    raw: bool = False
    images: Annotated[tuple[bytes, ...], Json(read=read_images)] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str = ""
    content: str = ""
    thinking: str = ""
    images: Annotated[tuple[bytes, ...], Json(read=read_images)] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The message as a template wants it: role and content always, the rest when there is any."""
        fields = {"role": self.role.lower(), "content": self.content, "thinking": self.thinking, "reasoning_content": self.thinking}
        fields |= {"tool_name": self.tool_name, "name": self.tool_name, "tool_call_id": self.tool_call_id}
        message: dict[str, Any] = {key: value for key, value in fields.items() if value or key in ("role", "content")}
        return {**message, "tool_calls": list(self.tool_calls)} if self.tool_calls else message


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(_Inference):
    """POST /api/chat"""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Named:
    """A request about a model, with the old spelling of its key."""

    model: str = ""
    name: str = ""

    @property
    def model_name(self) -> str:
        """Raises InvalidRequest: model is required."""
        if not (self.model or self.name):
            raise InvalidRequest("model is required")
        return self.model or self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowRequest(_Named):
    """POST /api/show"""

    verbose: bool = False
    system: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PullRequest(_Named):
    """POST /api/pull"""

    stream: bool = True
    insecure: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeleteRequest(_Named):
    """DELETE /api/delete"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyRequest:
    """POST /api/copy"""

    source: str = ""
    destination: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizeRequest(_Named):
    """POST /api/optimize"""

    data: tuple[dict[str, Any], ...] = ()
    eval: tuple[dict[str, Any], ...] = ()  # none: a fifth of the data is held out
    space: str = "low-rank"
    strategy: str = "eggroll"
    fitness: str = "label"
    layers: str = "last:6"
    population: int = 32
    batch: int | None = None  # None: as many as make a short slice
    rank: int = 4
    sigma: float = 0.02
    lr: float = 0.02
    momentum: float = 0.0
    decay: float = 0.0
    generations: int | None = None
    seconds: float = 120.0
    target: float = 1.0
    max_new_tokens: int = 32
    seed: int = 0
    accept: str = "auto"
    stream: bool = True
    keep_alive: Annotated[float | None, Json(read=read_keep_alive)] = None  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollbackRequest(_Named):
    """POST /api/versions/rollback"""

    version: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveVersionRequest:
    """POST /api/versions/save"""

    model: str = ""
    version: int | None = None  # None: the one that is served
    name: str = ""  # of the new model
