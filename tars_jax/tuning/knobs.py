"""The settings that are tuned, and the file that carries them to a server. Plain Python.

What changes answers (the cache's number format) or what a server can hold (its rows, contexts and memory) is no knob.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tars_jax.config import EngineConfig
from tars_jax.errors import InvalidRequest, refuse

Value = bool | int | float
Knobs = dict[str, Value]  # fields of an EngineConfig that differ from its defaults


@dataclasses.dataclass(frozen=True)
class Knob:
    """A field of `EngineConfig`. values: those that are tried; allows: what a file may say, described by ``rule``."""

    name: str
    values: tuple[Value, ...]
    kind: type[Value]
    allows: Callable[[Any], bool]
    rule: str

    @property
    def default(self) -> Value:
        return getattr(EngineConfig, self.name)


def _is_power(value: int) -> bool:
    return value & (value - 1) == 0


KNOBS = (
    Knob(
        "max_step_tokens", (128, 256, 512, 1024), int, lambda n: 16 <= n <= 1 << 16 and _is_power(n), "a power of two between 16 and 65536"
    ),
    Knob("page_size", (8, 16, 32, 64), int, lambda n: 8 <= n <= 256 and _is_power(n), "a power of two between 8 and 256"),
    Knob("prompt_lookup", (False, True), bool, lambda _: True, "true or false"),
    Knob("target_inter_token_ms", (25.0, 50.0, 100.0, 200.0), float, lambda ms: 1 <= ms <= 60_000, "a number between 1 and 60000"),
)
BY_NAME = {knob.name: knob for knob in KNOBS}


def differing(knobs: Mapping[str, Value]) -> Knobs:
    """Those of some settings that are not the defaults."""
    return {name: value for name, value in knobs.items() if value != BY_NAME[name].default}


def read_knobs(path: Path) -> Knobs:
    """The settings of a file that `write_knobs` or somebody wrote. Raises InvalidRequest that names everything that is wrong with it."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is no file of engine settings: {error}") from None
    faults = [f"unknown key {key!r}" for key in content if key not in ("model", "engine")]
    found = content.get("engine", {})
    if not isinstance(found, dict):
        found, faults = {}, [*faults, "engine must be a table, [engine]"]
    knobs = {name: _checked(name, value, faults) for name, value in found.items()}
    refuse(faults, f"{path} cannot be used (run `tars tune` to write one)")
    return {name: value for name, value in knobs.items() if value is not None}


def _checked(name: str, value: Any, faults: list[str]) -> Value | None:
    knob = BY_NAME.get(name)
    if knob is None:
        faults.append(f"unknown setting {name!r} (there are {', '.join(BY_NAME)})")
        return None
    of_kind = type(value) is knob.kind or (knob.kind is float and type(value) is int)
    if not of_kind or not knob.allows(value):
        faults.append(f"{name} must be {knob.rule}, got {value!r}")
        return None
    return knob.kind(value)


def write_knobs(path: Path, model: str, knobs: Mapping[str, Value], remarks: Sequence[str] = ()) -> None:
    """Write settings; ``remarks`` become comments. Raises InvalidRequest for a place that cannot be written."""
    name = model.replace("\\", "\\\\").replace('"', '\\"')
    lines = ["# Engine settings, measured on this machine. `tars serve --tuned FILE` or TARS_TUNED=FILE uses them."]
    lines += [f"# {remark}".rstrip() for remark in remarks]
    lines += [f'model = "{name}"', "", "[engine]"] + [f"{key} = {str(value).lower()}" for key, value in knobs.items()]
    try:
        path.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}") from None
