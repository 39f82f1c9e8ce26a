"""Where evolution searches: vectors of D numbers, each of which stands for a change of the model; zeros stand for none."""

import re
from typing import Protocol

import jax

from tars_jax.adapters import Adapter
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest
from tars_jax.model import Decoder


class Space(Protocol):
    """A pytree of what is fixed during a search. Its numbers have no unit: one step size suits all."""

    @property
    def size(self) -> int:
        """D."""
        ...

    def updated(self, params: Decoder, vectors: jax.Array) -> Decoder:
        """The parameters changed by one vector [D]; or by N, [N, D], for N equal runs of rows, as a `LowRank` has them."""
        ...

    def adapter(self, vector: jax.Array) -> Adapter:
        """The change by a vector [D], to the bit, as what files hold."""
        ...

    def drift(self, vector: jax.Array) -> float:
        """Norm of the change over the norm of what it changes."""
        ...


def choose_layers(spec: str, config: ModelConfig) -> list[int]:
    """Layers by number: ``last:6``, ``all``, or a list such as ``0-3,29``. Raises InvalidRequest."""
    count = config.num_layers
    if spec == "all":
        return list(range(count))
    if match := re.fullmatch(r"last:(\d+)", spec):
        layers = list(range(max(count - int(match[1]), 0), count))
    elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", spec):
        ends = [part.partition("-") for part in spec.split(",")]
        layers = sorted({i for first, _, last in ends for i in range(int(first), min(int(last or first), count) + 1)})
    else:
        raise InvalidRequest(f'layers are "all", "last:6" or a list such as "0-3,29", got {spec!r}')
    if not layers or layers[-1] >= count:
        raise InvalidRequest(f"no such layers: {spec!r}; the model has the layers 0 to {count - 1}")
    return layers
