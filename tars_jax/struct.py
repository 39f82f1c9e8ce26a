"""`flax.struct` without the rest of flax, whose layers take longer to import than all of this package and are not used here."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax.struct import dataclass, field

__all__ = ["dataclass", "field"]


class _Package(ModuleType):
    """A package that is not run before something is asked of it that is not there."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None  # noqa: PT018
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _flax_struct() -> ModuleType:
    if "flax" not in sys.modules and (spec := find_spec("flax")):
        package = module_from_spec(spec)
        package.__class__ = _Package
        sys.modules["flax"] = package
        import_module("flax.serialization")  # which flax.struct would ask the package for
    return import_module("flax.struct")


if not TYPE_CHECKING:
    _struct = _flax_struct()
    dataclass, field = _struct.dataclass, _struct.field
