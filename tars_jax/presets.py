"""Model sizes by name, read from ``configs/presets.toml``: shapes to plan with, and to build with random weights."""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from tars_jax.config import ModelConfig, RopeScaling
from tars_jax.errors import InvalidRequest, ModelNotFound

PREFIX = "preset:"  # names a preset where a model's name is expected


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's shape."""

    name: str
    config: ModelConfig
    title: str  # of what published model, or of which family


@functools.cache
def load_presets() -> Mapping[str, Preset]:
    """The presets in the file's order, by name."""
    return parse_presets(files("configs").joinpath("presets.toml").read_text("utf-8"))


def parse_presets(text: str) -> dict[str, Preset]:
    """Raises InvalidRequest when ``text`` is no table of presets."""
    try:
        tables: dict[str, dict[str, Any]] = tomllib.loads(text)["presets"]
        return {name: _preset(name, dict(table)) for name, table in tables.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"presets: {error}") from error


def find_preset(name: str) -> Preset:
    """A preset by its name, with or without the prefix. Raises ModelNotFound."""
    name = name.removeprefix(PREFIX).lower()
    if found := load_presets().get(name):
        return found
    raise ModelNotFound(f"there is no preset {name!r}; there are {', '.join(load_presets())}")


def named(name: str) -> Preset | None:
    """The preset that ``preset:NAME`` names; None for other names. Raises ModelNotFound."""
    return find_preset(name) if name.startswith(PREFIX) else None


def _preset(name: str, table: dict[str, Any]) -> Preset:
    title = table.pop("title")
    table.setdefault("num_kv_heads", table["num_heads"])
    table.setdefault("head_dim", table["hidden_size"] // table["num_heads"])
    scaling = RopeScaling(**table.pop("rope_scaling", {}))
    return Preset(name, ModelConfig(rope_scaling=scaling, **table), title)
