"""The compiled programs of an engine, such as a step for each token bucket: made ahead in the background, or when first needed."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from tars_jax import memory
from tars_jax.compile_cache import Recipe
from tars_jax.engine.threads import start_deep, step_back

Program = Callable[..., Any]
Kind = TypeVar("Kind", bound=Any)  # a size, perhaps with more; comparable


class Programs(Generic[Kind]):
    """Makes the program of ``recipe(kind)``, each kind once, whoever asks first."""

    def __init__(self, recipe: Callable[[Kind], Recipe], observe: Callable[[float], None] = lambda _: None) -> None:
        """``observe`` hears how many seconds a compilation took, from the thread that did it."""
        self._recipe, self._observe = recipe, observe
        self._programs: dict[Kind, Future[Program]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def compiled(self) -> list[Kind]:
        """Kinds that are ready, smallest first."""
        return sorted(kind for kind, future in list(self._programs.items()) if future.done())

    def get(self, kind: Kind) -> Program:
        """The program of a kind; waits for it. What went wrong in compiling is raised here."""
        future, is_new = self._claim(kind)
        if is_new:
            self._compile(kind, future)
        return future.result()

    def prepare(self, kinds: Iterable[Kind]) -> None:
        """Compile them in a thread of their own, one after the other. No daemon: an interpreter that ends waits for the one it is
        at, since killing a thread within XLA's compiler aborts the process."""
        start_deep(partial(self._prepare, list(kinds)), "compile", daemon=False)

    def stop(self) -> None:
        """Begin no further compilation in the background."""
        self._stopped = True

    def _prepare(self, kinds: list[Kind]) -> None:
        for kind in kinds:
            if kind != kinds[0]:  # the first is wanted soon; the others must not take the cores from requests
                step_back()
            if self._stopped or not threading.main_thread().is_alive():
                return
            future, is_new = self._claim(kind)
            if is_new:
                self._compile(kind, future)

    def _claim(self, kind: Kind) -> tuple[Future[Program], bool]:
        known = self._programs.get(kind)  # of every step but the first: a new Future costs a tenth of a millisecond
        if known is not None:
            return known, False
        with self._lock:
            is_new = kind not in self._programs
            return self._programs.setdefault(kind, Future()), is_new

    def _compile(self, kind: Kind, future: Future[Program]) -> None:
        try:
            started = time.perf_counter()
            program = self._recipe(kind).make()
            self._observe(time.perf_counter() - started)
            memory.trim()
            future.set_result(program)
        except BaseException as error:
            with self._lock:
                del self._programs[kind]  # the next one to ask tries again
            future.set_exception(error)
