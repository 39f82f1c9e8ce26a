"""The compiled programs of a search, and how to have them before it begins.

Within `rehearsal` a call of a `program` compiles it and runs nothing; so a search can be gone through beforehand, in a thread of low
priority, by the code that does it, and compiles nothing later, when others wait for its slices.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def program(static_argnames: Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`jax.jit` for a function whose runs take long enough to matter."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        jitted = jax.jit(function, static_argnames=static_argnames)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return _compiled(jitted, args, kwargs) if _rehearsing.get() else jitted(*args, **kwargs)

        return call

    return decorate


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Compile programs instead of running them, in this thread; their results are zeros."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def _compiled(jitted: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    lowered = jitted.lower(*args, **kwargs)
    lowered.compile()  # jax keeps it, and takes it for calls of the same types
    return jax.tree.map(lambda out: jax.device_put(np.zeros(out.shape, out.dtype)), lowered.out_info)
