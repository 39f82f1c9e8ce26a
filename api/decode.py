"""JSON bytes to frozen dataclasses, checked, with the error texts of Go's ``encoding/json``.

A request type is a dataclass: field names are JSON keys (matched whatever their case), field types say what is accepted,
``Annotated[..., Json(...)]`` gives it another key or a reader of its own. Unknown keys are ignored, ``null`` leaves a field unset.
"""

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tars_jax.errors import InvalidRequest

T = TypeVar("T")

MAX_DEPTH = 200  # nesting of a request; templates and serialisers behind us recurse on it
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SCALARS = {str: "string", bool: "bool", int: "int", float: "float32"}
_SYNTAX = {  # Python's decoder to Go's
    "Expecting property name": "looking for beginning of object key string",
    "Illegal trailing comma": "looking for beginning of object key string",
    "Expecting ':'": "after object key",
    "Expecting ','": "after array element or object key:value pair",
    "Invalid control character": "in string literal",
    "Invalid \\": "in string escape code",
}


class _MismatchError(Exception):
    """A value that does not fit; the path is filled in on the way out."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(found, wanted)
        self.found, self.wanted = found, wanted
        self.path: list[str] = []


@dataclasses.dataclass(frozen=True)
class Json:
    """How a field differs from the rule: its own key, or a function that reads its value (ValueError: 400 with that text)."""

    key: str = ""
    read: Callable[[Any], Any] | None = None


def decode(cls: type[T], body: bytes) -> T:
    """Decode a request body. Every fault of the body is an `InvalidRequest` (400)."""
    if not body.strip():
        raise InvalidRequest("missing request body")
    value = parse_json(body)
    if not isinstance(value, dict):
        if value is None:
            return cls()
        raise InvalidRequest(f"json: cannot unmarshal {_found(value)} into Go value of type api.{cls.__name__}")
    try:
        return typing.cast(T, _read_object(cls, value))
    except _MismatchError as error:
        where = f"Go struct field {cls.__name__}.{'.'.join(error.path)}"
        raise InvalidRequest(f"json: cannot unmarshal {error.found} into {where} of type {error.wanted}") from None


def parse_json(body: bytes) -> Any:
    """The first JSON value of a body; what follows it is ignored, as Go's decoder does."""
    text = body.decode("utf-8", errors="replace").lstrip(" \t\r\n")
    try:
        value, _ = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(_syntax_error(text, error)) from None
    except RecursionError:
        raise InvalidRequest("exceeded max depth") from None
    except ValueError as error:  # a number of thousands of digits, NaN, Infinity
        raise InvalidRequest(str(error)) from None
    # Counting brackets is a cheap bound: the walk over the value is only for bodies that could be too deep.
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise InvalidRequest("exceeded max depth")
    return _without_surrogates(value) if _LONE_SURROGATE.search(text) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"invalid character '{name[0]}' looking for beginning of value")


def _syntax_error(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated") or "truncated" in error.msg:
        return "unexpected EOF"
    where = next((go for python, go in _SYNTAX.items() if error.msg.startswith(python)), "looking for beginning of value")
    return f"invalid character {text[error.pos]!r} {where}"


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth


def _without_surrogates(value: Any) -> Any:
    """Half a surrogate pair is no character: U+FFFD takes its place, else it could not be encoded later."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str
    key: str
    type: Any
    read: Callable[[Any], Any] | None


@functools.cache
def _fields(cls: type) -> Mapping[str, _Field]:
    """JSON keys, lower-cased, to the fields of a dataclass."""
    fields = (_field(name, hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items())
    return {field.key.lower(): field for field in fields}


def _field(name: str, hint: Any) -> _Field:
    rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Json)]
    rule = rules[0] if rules else Json()
    return _Field(name, rule.key or name, typing.get_args(hint)[0] if rules else hint, rule.read)


def _read_object(cls: type, data: Mapping[str, Any]) -> Any:
    fields, values = _fields(cls), {}
    for key, value in data.items():
        field = fields.get(key.lower())
        if field is None or value is None:
            continue
        try:
            values[field.name] = field.read(value) if field.read else _read(field.type, value)
        except _MismatchError as error:
            error.path.insert(0, field.key)
            raise
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
    return cls(**values)


def _read(kind: Any, value: Any) -> Any:
    """A value as the annotated type, or `_MismatchError`."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only ``X | None``: null never comes here
        return _read(arguments[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], _zero(arguments[0]) if item is None else item) for item in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_object(typing.cast(type, kind), value)
    if kind is float and type(value) is int:
        return float(value)
    if (origin or kind) is type(value) and kind in (*_SCALARS, dict[str, Any]):
        return value
    raise _MismatchError(_found(value, kind), _wanted(kind))


def _zero(kind: Any) -> Any:
    return {str: "", bool: False, int: 0, float: 0.0}.get(kind, {})


def _found(value: Any, wanted: Any = None) -> str:
    """What Go calls a JSON value in its errors."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float) and wanted is int:
        return f"number {value}"
    return {str: "string", int: "number", float: "number", list: "array", dict: "object"}.get(type(value), "null")


def _wanted(kind: Any) -> str:
    """The Go name of a field's type."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"[]{_wanted(typing.get_args(kind)[0])}"
    if origin is dict:
        return "map[string]interface {}"
    return _SCALARS.get(kind) or f"api.{kind.__name__}"
