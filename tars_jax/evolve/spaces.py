"""The spaces by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from tars_jax.evolve.data import Example
from tars_jax.evolve.gains import find_gains
from tars_jax.evolve.low_rank import find_low_rank
from tars_jax.evolve.settings import Settings, SpaceName
from tars_jax.evolve.space import Space
from tars_jax.evolve.steering import find_steering
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder

Finder = Callable[[Decoder, Model, Settings, Sequence[int], Sequence[Example], Sequence[Example]], Iterator[Space | None]]
FINDERS: Mapping[SpaceName, Finder] = {"low-rank": find_low_rank, "gains": find_gains, "steering": find_steering}


def find(
    params: Decoder, model: Model, settings: Settings, layers: Sequence[int], task: Sequence[Example], other: Sequence[Example]
) -> Iterator[Space | None]:
    """The space that the settings name, of changes to these layers or what is beside them: last, None after each bounded piece of
    work before. ``task`` and ``other``: examples and other text to measure the model with. Raises InvalidRequest."""
    return FINDERS[settings.space](params, model, settings, layers, task, other)
