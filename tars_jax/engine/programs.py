"""The compiled programs of an engine, such as a step for each token bucket: made ahead in the background, or when first needed."""

import logging
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


log = logging.getLogger(__name__)


class Programs(Generic[Kind]):
    """Makes the program of ``recipe(kind)``, each kind once, whoever asks first."""

    def __init__(self, recipe: Callable[[Kind], Recipe], observe: Callable[[float], None] = lambda _: None) -> None:
        """``observe`` hears how many seconds a compilation took, from the thread that did it."""
        self._recipe, self._observe = recipe, observe
        self._programs: dict[Kind, Future[Program]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def compiled(self) -> list[Kind]:
        """Kinds that are ready, smallest first."""
        return sorted(kind for kind, future in list(self._programs.items()) if _is_ready(future))

    def get(self, kind: Kind) -> Program:
        """The program of a kind; waits for it. What went wrong in compiling is raised here."""
        future, is_new = self._claim(kind)
        if is_new:
            self._compile(kind, future)
        return future.result()

    def find(self, kind: Kind) -> Program | None:
        """The program of a kind if it is there; else it is made in the background, with a low priority."""
        future, is_new = self._claim(kind)
        if is_new:
            self._start(partial(self._compile_behind, kind, future))
        return future.result() if _is_ready(future) else None

    def prepare(self, kinds: Iterable[Kind], rare: Iterable[Kind] = ()) -> None:
        """Compile kinds in a thread of their own, one after the other; of those that are rare only see that they need not be compiled
        when they are wanted."""
        self._start(partial(self._prepare, list(kinds), list(rare)))

    def settle(self) -> None:
        """Wait until nothing is made in the background."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Begin no further compilation in the background."""
        self._stopped = True

    def _start(self, work: Callable[[], None]) -> None:
        # No daemon: an interpreter that ends waits for the one it is at, since killing a thread within XLA's compiler aborts the process.
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(start_deep(work, "compile", daemon=False))

    @property
    def _must_stop(self) -> bool:
        return self._stopped or not threading.main_thread().is_alive()

    def _prepare(self, kinds: list[Kind], rare: list[Kind]) -> None:
        for place, kind in enumerate(kinds + rare):
            if place:  # the first is wanted soon; the others must not take the cores from requests
                step_back()
            if self._must_stop:
                return
            if place >= len(kinds):
                self._store(kind)
                continue
            future, is_new = self._claim(kind)
            if is_new:
                self._compile(kind, future)

    def _store(self, kind: Kind) -> None:
        if kind in self._programs:
            return
        try:
            started = time.perf_counter()
            program = self._recipe(kind).store()
        except Exception as error:
            log.warning("a program could not be compiled ahead: %s", error)
            return
        if program is not None:
            self._observe(time.perf_counter() - started)
            future, is_new = self._claim(kind)
            if is_new:
                future.set_result(program)
        memory.trim()

    def _claim(self, kind: Kind) -> tuple[Future[Program], bool]:
        known = self._programs.get(kind)  # of every step but the first: a new Future costs a tenth of a millisecond
        if known is not None:
            return known, False
        with self._lock:
            is_new = kind not in self._programs
            return self._programs.setdefault(kind, Future()), is_new

    def _compile_behind(self, kind: Kind, future: Future[Program]) -> None:
        step_back()
        if self._must_stop:
            return future.set_exception(RuntimeError("nothing is compiled any more"))
        self._compile(kind, future)
        if error := future.exception():
            log.warning("a program could not be compiled, the engine goes on without it: %s", error)
            self._programs[kind] = future  # and nobody tries again

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


def _is_ready(future: Future[Program]) -> bool:
    return future.done() and future.exception() is None
