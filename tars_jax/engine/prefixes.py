"""Prefix pages on disk: what an engine has read is still known after it was unloaded. Numbers only; nothing in a file can run.

One file an engine: the pages' tokens and their keys and values as safetensors, under a name made of everything these depend on.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tars_jax import kernels
from tars_jax.config import EngineConfig
from tars_jax.engine.scheduler import Scheduler
from tars_jax.loaders.loaded import Model

log = logging.getLogger(__name__)

SUFFIX = ".prefixes"
FORMAT = 1


def prefix_key(model: Model, draft: Model | None, config: EngineConfig) -> dict[str, object]:
    """What keys and values depend on beside the tokens."""
    models = {"model": model.digest, "draft": draft.digest if draft else ""}
    code = {"version": version("tars-jax"), "kernels": kernels.isa() if kernels.available() else ""}
    return {**models, **code, "dtype": model.dtype, "context": config.max_context}


@dataclasses.dataclass(frozen=True)
class PrefixPage:
    """A page's place among the saved ones."""

    before: int  # index of the page before it; -1: it begins a context
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Saved pages, each after the one before it. arrays: what the cache holds of them, [n, ...] each."""

    pages: Sequence[PrefixPage]
    arrays: Sequence[np.ndarray]


class Cache(Protocol):
    """What holds the pages' contents: a `Runner`."""

    def page_shapes(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of a page in each of the cache's arrays."""

    def read_pages(self, pages: list[int]) -> list[np.ndarray]:
        """Their contents, [n, ...] of each array."""

    def write_pages(self, pages: list[int], contents: list[np.ndarray]) -> None:
        """Fill them."""


class PrefixFolder:
    """A folder of such files, the least recently used of which go when it exceeds ``limit`` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def keep(self, key: Mapping[str, object], scheduler: Scheduler, cache: Cache) -> None:
        """Save what an engine still knows when it closes, the latest used first."""
        page_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in cache.page_shapes())
        kept = scheduler.pages.kept(scheduler.root, self.limit // page_bytes)
        if kept:
            contents = cache.read_pages([page for page, _, _ in kept])
            self.save(key, Prefixes([PrefixPage(before, tokens) for _, before, tokens in kept], contents))

    def restore(self, key: Mapping[str, object], scheduler: Scheduler, cache: Cache) -> None:
        """Give an engine that starts what one with the same key kept."""
        saved = self.load(key, cache.page_shapes(), scheduler.pages.page_size)
        if saved is not None:
            numbers = scheduler.pages.restore([(page.before, page.tokens) for page in saved.pages], scheduler.root)
            cache.write_pages(numbers, [array[: len(numbers)] for array in saved.arrays])

    def save(self, key: Mapping[str, object], prefixes: Prefixes) -> None:
        """Write, replacing what was there under this key. A disk that is full or read-only costs only the prefixes."""
        path = self._path(key)
        before = np.array([page.before for page in prefixes.pages], np.int32)
        tokens = np.array([page.tokens for page in prefixes.pages], np.int32)
        arrays = {f"cache.{i}": np.ascontiguousarray(array) for i, array in enumerate(prefixes.arrays)}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file({"before": before, "tokens": tokens, **arrays}, temporary)
            temporary.chmod(0o600)
            temporary.replace(path)
            self._shrink(keep=path)
        except OSError as error:
            log.warning("could not keep the prompt cache in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load(self, key: Mapping[str, object], shapes: Sequence[tuple[tuple[int, ...], np.dtype]], page_size: int) -> Prefixes | None:
        """What was saved under this key; None if nothing was, or if it is not what it should be (then the file is deleted).

        ``shapes``: of a page in each of the cache's arrays, with its type.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                found = Prefixes(
                    tuple(map(PrefixPage, file.get_tensor("before").tolist(), map(tuple, file.get_tensor("tokens").tolist()))),
                    [file.get_tensor(f"cache.{i}") for i in range(len(shapes))],
                )
            _check(found, shapes, page_size)
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("the prompt cache %s is unusable and is deleted: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def _path(self, key: Mapping[str, object]) -> Path:
        text = repr((FORMAT, sorted(key.items())))
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX)

    def _shrink(self, keep: Path) -> None:
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total > self.limit and path != keep:
                total -= path.stat().st_size
                path.unlink()


def _check(found: Prefixes, shapes: Sequence[tuple[tuple[int, ...], np.dtype]], page_size: int) -> None:
    for i, page in enumerate(found.pages):
        if not -1 <= page.before < i or len(page.tokens) != page_size:
            raise ValueError(f"page {i} is out of order")
    for array, (shape, dtype) in zip(found.arrays, shapes, strict=True):
        if array.shape != (len(found.pages), *shape) or array.dtype != dtype:
            raise ValueError(f"its arrays are {array.dtype} {list(array.shape)}, not {dtype} {[len(found.pages), *shape]}")
