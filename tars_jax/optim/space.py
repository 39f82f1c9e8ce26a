"""The search space: a flat vector of the free coordinates of a pytree, its bounds and its step sizes.

An optimizer works on vectors ``[d]``; a :class:`Space` carries them to pytrees and back. Leaves, or parts of leaves, that a mask
holds fixed never enter the vector.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tars_jax import struct
from tars_jax.errors import InvalidRequest

Tree = Any
Mode = Literal["reflect", "clip", "resample"]


@struct.dataclass
class Box:
    """Box bounds. ``lower`` and ``upper`` are numbers or (prefix) pytrees of ``x0``; infinities leave a side open.

    ``mode`` says what becomes of a coordinate outside: ``reflect`` mirrors it at the bound, ``clip`` puts it on the bound,
    ``resample`` draws it anew, uniformly between its parent and the bound.
    """

    lower: Tree = -jnp.inf
    upper: Tree = jnp.inf
    mode: Mode = struct.field(pytree_node=False, default="reflect")


@struct.dataclass
class Space:
    """Where a search happens. ``d`` coordinates are free; vectors are float32, or float64 where ``x0`` has float64."""

    frozen: tuple[Array | None, ...]  # by leaf: x0's values, where a mask holds any of them
    indices: tuple[Array | None, ...]  # by leaf: flat positions of the free values, where the mask holds only some
    lower: Array  # [d]
    upper: Array  # [d]
    step: Array  # [d] initial standard deviations
    treedef: Any = struct.field(pytree_node=False)
    shapes: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)
    dtypes: tuple[Any, ...] = struct.field(pytree_node=False)
    counts: tuple[int, ...] = struct.field(pytree_node=False)  # by leaf: how many free values
    mode: Mode = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def groups(self) -> np.ndarray:
        """The leaf of each coordinate, ``int32 [d]``, counted over the leaves that have any."""
        counts = [count for count in self.counts if count]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @property
    def num_groups(self) -> int:
        return sum(count > 0 for count in self.counts)

    def flatten(self, tree: Tree) -> Array:
        """A pytree as a vector ``[d]``."""
        leaves = [jnp.asarray(leaf) for leaf in self.treedef.flatten_up_to(tree)]
        parts = [
            (leaf.ravel() if index is None else leaf.ravel()[index]).astype(self.step.dtype)
            for leaf, index, count in zip(leaves, self.indices, self.counts, strict=True)
            if count
        ]
        return jnp.concatenate(parts)

    def unflatten(self, vector: Array) -> Tree:
        """A vector ``[d]`` as a pytree of ``x0``'s shapes and dtypes."""
        parts = jnp.split(vector, np.cumsum(self.counts)[:-1])
        leaves = []
        for part, frozen, index, shape, dtype in zip(parts, self.frozen, self.indices, self.shapes, self.dtypes, strict=True):
            if index is not None and frozen is not None:
                leaves.append(frozen.ravel().at[index].set(part.astype(dtype)).reshape(shape))
            else:
                leaves.append(part.astype(dtype).reshape(shape) if frozen is None else frozen)
        return self.treedef.unflatten(leaves)

    def confine(self, key: Array, x: Array, parent: Array) -> Array:
        """Bring ``x [..., d]`` inside the bounds. ``parent`` (inside, same shape) is used by ``resample`` only."""
        lower, upper = (jnp.broadcast_to(bound, x.shape) for bound in (self.lower, self.upper))
        if self.mode == "reflect":
            width = jnp.where(jnp.isfinite(upper - lower), upper - lower, 0)
            phase = jnp.where(width > 0, jnp.mod(x - jnp.where(width > 0, lower, 0), jnp.where(width > 0, 2 * width, 1)), 0)
            both = lower + jnp.where(phase > width, 2 * width - phase, phase)
            one = jnp.where(x < lower, 2 * lower - x, jnp.where(x > upper, 2 * upper - x, x))
            x = jnp.where((x < lower) | (x > upper), jnp.where(width > 0, both, one), x)
        elif self.mode == "resample":
            bound = jnp.where(x < lower, lower, upper)
            redrawn = parent + jax.random.uniform(key, x.shape, x.dtype) * (bound - parent)
            x = jnp.where((x < lower) | (x > upper), redrawn, x)
        return jnp.clip(x, lower, upper)


def make_space(x0: Tree, bounds: Box | None = None, mask: Tree = None, step: Tree = None) -> Space:
    """The space around ``x0``.

    ``mask`` is a (prefix) pytree of booleans, one a leaf or one a value; False holds ``x0``'s value fixed. ``step`` is a (prefix) pytree
    of initial standard deviations; without it 0.3 of a finite box, else the root mean square of the leaf (of the whole tree for a
    leaf of zeros, 1 for a tree of zeros). Raises InvalidRequest with all that is wrong with a leaf.
    """
    leaves, treedef = jax.tree.flatten(x0)
    paths = [jax.tree_util.keystr(path) or "x0" for path, _ in jax.tree_util.tree_flatten_with_path(x0)[0]]
    leaves = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in leaves]
    masks = [np.broadcast_to(np.asarray(m, bool), leaf.shape) for m, leaf in zip(_spread(mask, True, x0, "mask"), leaves, strict=True)]
    counts = tuple(int(m.sum()) for m in masks)
    if not sum(counts):
        raise InvalidRequest("nothing to optimise: x0 is empty or the mask holds every value fixed")
    for path, leaf, count in zip(paths, leaves, counts, strict=True):
        if count and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InvalidRequest(f"{path} has dtype {leaf.dtype}: only floating-point leaves move; cast it, or hold it with mask=False")
    wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64 and any(
        count and leaf.dtype == np.float64 for leaf, count in zip(leaves, counts, strict=True)
    )
    dtype = np.dtype(np.float64 if wide else np.float32)
    partly = [0 < count < leaf.size for count, leaf in zip(counts, leaves, strict=True)]
    indices = tuple(np.flatnonzero(m).astype(np.int32) if part else None for m, part in zip(masks, partly, strict=True))

    def vector(tree: Tree, default: float, name: str) -> Any:
        values = zip(_spread(tree, default, x0, name), leaves, counts, strict=True)
        return _join([_fit(value, leaf.shape, name) if count else None for value, leaf, count in values], indices, counts, dtype)

    box, start = bounds or Box(), _join(leaves, indices, counts, dtype)
    lower, upper = vector(box.lower, -np.inf, "lower bound"), vector(box.upper, np.inf, "upper bound")
    steps = _default_step(start, counts, lower, upper) if step is None else vector(step, 1.0, "step")
    _check(start, lower, upper, steps, box.mode)
    frozen = tuple(None if count == leaf.size else jnp.asarray(leaf) for leaf, count in zip(leaves, counts, strict=True))
    shapes = tuple(leaf.shape for leaf in leaves)
    dtypes = tuple(jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves)
    positions = tuple(None if index is None else jnp.asarray(index) for index in indices)
    vectors = {"lower": jnp.asarray(lower), "upper": jnp.asarray(upper), "step": jnp.asarray(steps)}
    return Space(frozen, positions, **vectors, treedef=treedef, shapes=shapes, dtypes=dtypes, counts=counts, mode=box.mode)


def _spread(tree: Tree, default: Any, x0: Tree, name: str) -> list[Any]:
    """A prefix pytree as one value a leaf of ``x0``."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(default if tree is None else tree, x0))
    except ValueError as error:
        raise InvalidRequest(f"{name} does not have the structure of x0: {error}") from None


def _fit(value: Any, shape: tuple[int, ...], name: str) -> Any:
    try:
        return _numpy(value).broadcast_to(value, shape)
    except ValueError:
        raise InvalidRequest(f"{name} of shape {np.shape(value)} does not fit a leaf of shape {shape}") from None


def _numpy(*values: Any) -> Any:
    """numpy for what is known, so that a search starts without compiling; jax.numpy under a trace."""
    return jnp if any(isinstance(value, jax.core.Tracer) for value in values) else np


def _join(leaves: Sequence[Any], indices: Sequence[Any], counts: tuple[int, ...], dtype: Any) -> Any:
    """The free values of all leaves as a vector."""
    xp = _numpy(*leaves)
    parts = [
        xp.ravel(leaf) if index is None else xp.ravel(leaf)[index]
        for leaf, index, count in zip(leaves, indices, counts, strict=True)
        if count
    ]
    return xp.concatenate([part.astype(dtype) for part in parts])


def _default_step(x0: Any, counts: tuple[int, ...], lower: Any, upper: Any) -> Any:
    xp, sizes = _numpy(x0, lower, upper), [count for count in counts if count]
    one = xp.ones((), x0.dtype)

    def size_of(values: Any, otherwise: Any) -> Any:
        rms = xp.sqrt(xp.mean(values**2))
        return xp.where(rms > 0, rms, otherwise)

    whole = size_of(x0, one)
    by_leaf = [xp.broadcast_to(size_of(part, whole), part.shape) for part in xp.split(x0, np.cumsum(sizes)[:-1])]
    bounded = xp.isfinite(lower) & xp.isfinite(upper)
    return xp.where(bounded, 0.3 * xp.where(bounded, upper - lower, one), xp.concatenate(by_leaf))


def _check(x0: Any, lower: Any, upper: Any, step: Any, mode: str) -> None:
    if mode not in ("reflect", "clip", "resample"):
        raise InvalidRequest(f"bounds mode {mode!r} is none of reflect, clip, resample")
    if _numpy(x0, lower, upper, step) is jnp:
        return  # not known yet
    faults = {
        "x0 has values that are not finite": ~np.isfinite(x0),
        "a lower bound is not below its upper bound": ~(lower < upper),
        "x0 lies outside its bounds": (x0 < lower) | (x0 > upper),
        "a step size is not positive and finite": ~((step > 0) & np.isfinite(step)),
    }
    for fault, where in faults.items():
        if where.any():
            raise InvalidRequest(f"{fault} (coordinate {where.argmax()} of the {x0.size} free ones)")
