"""The compiled steps of an engine, one per token bucket: made ahead in the background, or when first needed."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from tars_jax import memory
from tars_jax.compile_cache import Recipe
from tars_jax.engine.threads import start_deep, step_back

Program = Callable[..., Any]


class Programs:
    """Makes the program of ``recipe(bucket)``, each bucket once, whoever asks first."""

    def __init__(self, recipe: Callable[[int], Recipe], observe: Callable[[float], None] = lambda _: None) -> None:
        """``observe`` hears how many seconds a compilation took, from the thread that did it."""
        self._recipe, self._observe = recipe, observe
        self._programs: dict[int, Future[Program]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def compiled(self) -> list[int]:
        """Buckets that are ready, smallest first."""
        return sorted(bucket for bucket, future in list(self._programs.items()) if future.done())

    def get(self, bucket: int) -> Program:
        """The compiled step of a bucket; waits for it. What went wrong in compiling is raised here."""
        future, is_new = self._claim(bucket)
        if is_new:
            self._compile(bucket, future)
        return future.result()

    def prepare(self, buckets: Iterable[int]) -> None:
        """Compile buckets in a thread of their own, one after the other. No daemon: an interpreter that ends waits for the one it is
        at, since killing a thread within XLA's compiler aborts the process."""
        start_deep(partial(self._prepare, list(buckets)), "compile", daemon=False)

    def stop(self) -> None:
        """Begin no further compilation in the background."""
        self._stopped = True

    def _prepare(self, buckets: list[int]) -> None:
        for bucket in buckets:
            if bucket != buckets[0]:  # the first is wanted soon; the others must not take the cores from requests
                step_back()
            if self._stopped or not threading.main_thread().is_alive():
                return
            future, is_new = self._claim(bucket)
            if is_new:
                self._compile(bucket, future)

    def _claim(self, bucket: int) -> tuple[Future[Program], bool]:
        known = self._programs.get(bucket)  # of every step but the first: a new Future costs a tenth of a millisecond
        if known is not None:
            return known, False
        with self._lock:
            is_new = bucket not in self._programs
            return self._programs.setdefault(bucket, Future()), is_new

    def _compile(self, bucket: int, future: Future[Program]) -> None:
        try:
            started = time.perf_counter()
            program = self._recipe(bucket).make()
            self._observe(time.perf_counter() - started)
            memory.trim()
            future.set_result(program)
        except BaseException as error:
            with self._lock:
                del self._programs[bucket]  # the next one to ask tries again
            future.set_exception(error)
