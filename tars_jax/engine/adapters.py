"""Adapters that requests choose among: all of them lie in one `LowRank` per weight, and each token's scales say which ones act on it.

An adapter holds a run of ranks from the moment it is added until nobody uses it. The ranks come in powers of two, and a weight
that was once updated stays a `LowRank`, so that a change seldom needs another program. (Cf. S-LoRA, arXiv 2311.03285, which gathers
factors row by row; for the few adapters of one engine a wider product with zeros is simpler, and exact.)
"""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.adapters import Adapter, change_weights, is_weight
from tars_jax.engine.sequence import Share
from tars_jax.errors import InvalidRequest
from tars_jax.model import Decoder
from tars_jax.quant import LowRank

MIN_RANKS = 8

Choice = tuple[str, float]  # name, strength


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """An adapter in its place. ``id`` tells it from others that have had or will have its name."""

    id: int
    start: int
    adapter: Adapter

    @property
    def stop(self) -> int:
        return self.start + self.adapter.rank


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterSlots:
    """The adapters of an engine. Immutable: changes give new ones."""

    named: Mapping[str, Slot] = dataclasses.field(default_factory=dict)
    retired: tuple[Slot, ...] = ()  # without a name, but perhaps still used
    ranks: int = 0  # of every `LowRank`
    weights: frozenset[str] = frozenset()  # that are `LowRank`s
    added: int = 0  # so far: the last one's id

    def adding(self, name: str, adapter: Adapter, used: Collection[int]) -> "AdapterSlots":
        """With one more adapter, in the place of retired ones that are not ``used``, by id. An adapter of that name is retired."""
        before = dataclasses.replace(self, retired=tuple(slot for slot in self.retired if slot.id in used)).removing(name)
        slot = Slot(self.added + 1, _gap([*before.named.values(), *before.retired], adapter.rank), adapter)
        ranks = max(self.ranks, MIN_RANKS, 1 << (slot.stop - 1).bit_length())
        return AdapterSlots({**before.named, name: slot}, before.retired, ranks, self.weights | adapter.updates.keys(), slot.id)

    def removing(self, name: str) -> "AdapterSlots":
        """Without this name; requests under way go on with the adapter."""
        named = {other: slot for other, slot in self.named.items() if other != name}
        gone = [self.named[name]] if name in self.named else []
        return dataclasses.replace(self, named=named, retired=(*self.retired, *gone))

    def find(self, choices: Collection[Choice]) -> tuple[Share, ...]:
        """The shares of a request that chooses these. Raises InvalidRequest for unknown names."""
        if unknown := [name for name, _ in choices if name not in self.named]:
            known = ", ".join(sorted(self.named)) or "none"
            raise InvalidRequest(f"the engine has no adapter {unknown[0]!r}; it has {known}")
        slots = [(self.named[name], float(strength)) for name, strength in choices]
        return tuple(sorted(Share(slot.id, slot.start, slot.stop, strength) for slot, strength in slots))

    def put_on(self, params: Decoder) -> Decoder:
        """The parameters with a `LowRank` of all adapters for every weight that one of them updates; its scale is left open."""
        slots = [*self.named.values(), *self.retired]
        return change_weights(params, {name: partial(_stack, name=name, slots=slots, ranks=self.ranks) for name in self.weights})


def fill_scales(params: Decoder, scales: jax.Array) -> Decoder:
    """The parameters with scales [T, R] in every `LowRank` that `AdapterSlots.put_on` made."""

    def fill(leaf: Any) -> Any:
        return dataclasses.replace(leaf, scale=scales) if isinstance(leaf, LowRank) and leaf.scale is None else leaf

    filled: Decoder = jax.tree.map(fill, params, is_leaf=is_weight)
    return filled


def _stack(base: Any, name: str, slots: Collection[Slot], ranks: int) -> LowRank:
    outputs, inputs = base.shape
    a, b = np.zeros((ranks, outputs), np.float32), np.zeros((ranks, inputs), np.float32)
    for slot in slots:
        if update := slot.adapter.updates.get(name):
            a[slot.start : slot.start + update.rank] = update.a.T * np.float32(update.scale)
            b[slot.start : slot.start + update.rank] = update.b
    return LowRank(base, jnp.asarray(a), jnp.asarray(b), None)


def _gap(slots: list[Slot], ranks: int) -> int:
    """The first place where so many ranks are free."""
    start = 0
    for slot in sorted(slots, key=lambda slot: slot.start):
        if slot.start - start >= ranks:
            break
        start = slot.stop
    return start
