"""A state on disk: one ``.npz`` of its leaves with a JSON manifest inside, never a pickle.

A search saved after G generations, loaded by another process and run for G more gives the bits of 2G generations in one go (same machine,
same versions: the manifest names them).
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.errors import CheckpointError

FORMAT = 1
T = TypeVar("T")


class Checkpoint(NamedTuple, Generic[T]):
    """What a file holds."""

    tree: T
    arrays: dict[str, np.ndarray]
    manifest: dict[str, Any]


def save(path: str | Path, tree: Any, arrays: dict[str, np.ndarray] | None = None, **notes: str | int | float) -> None:
    """Write a pytree of arrays and random keys, whole or not at all; with it ``arrays`` of any shape, and ``notes`` in the manifest."""
    leaves = [_to_numpy(leaf) for leaf in jax.tree.leaves(tree)]
    manifest = {"format": FORMAT, "leaves": _shapes(tree), "jax": jax.__version__, "numpy": np.__version__, **notes}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        numbered: dict[str, Any] = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)} | {
            f"array.{name}": array for name, array in (arrays or {}).items()
        }
        np.savez(file, manifest=np.array(json.dumps(manifest)), **numbered)
    os.replace(partial, path)


def load(path: str | Path, like: T) -> Checkpoint[T]:
    """Read what :func:`save` wrote. ``like``: a pytree of the same structure, shapes and dtypes.

    Raises CheckpointError where the file is damaged or belongs to another search.
    """
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            manifest = json.loads(str(file["manifest"]))
            stored = {name: file[name] for name in file.files if name != "manifest"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a checkpoint of an optimizer: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("leaves") != _shapes(like):
        raise CheckpointError(f"{path} belongs to another search: its optimizer, population or parameters differ from this one's")
    leaves, treedef = jax.tree.flatten(like)
    tree = jax.tree.unflatten(treedef, [_from_numpy(stored[f"leaf{i}"], leaf) for i, leaf in enumerate(leaves)])
    return Checkpoint(tree, {name.removeprefix("array."): stored[name] for name in stored if name.startswith("array.")}, manifest)


def _shapes(tree: Any) -> list[str]:
    """Path, dtype and shape of each leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [f"{jax.tree_util.keystr(path)} {jnp.asarray(leaf).dtype}{list(jnp.shape(leaf))}" for path, leaf in flat]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    """An array numpy can store: keys as their words, bfloat16 and its like as bytes."""
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return array if array.dtype.isbuiltin == 1 else np.frombuffer(array.tobytes(), np.uint8)


def _from_numpy(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    dtype = np.asarray(like).dtype
    if dtype.isbuiltin != 1:
        array = np.frombuffer(array.tobytes(), dtype).reshape(np.shape(like))
    return jnp.asarray(array)
