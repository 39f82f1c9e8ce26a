"""Parameters as programs take them: a flat list in which every array stands once, and what makes the tree of it again.

Flattening 300 leaves anew for each step would cost the host a quarter of a millisecond, and so would handing over one array for each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Structure:
    """Hashable, as programs are compiled for one. places: of each leaf among the arrays."""

    tree: jax.tree_util.PyTreeDef
    places: tuple[int, ...]

    def fill(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays for its leaves."""
        return jax.tree.unflatten(self.tree, [arrays[place] for place in self.places])


def flatten(tree: Any) -> tuple[list[jax.Array], Structure]:
    """The arrays of a tree, each once in the order of its first place, and the tree's structure."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = {id(leaf): leaf for leaf in leaves}
    order = {name: place for place, name in enumerate(arrays)}
    return list(arrays.values()), Structure(structure, tuple(order[id(leaf)] for leaf in leaves))
