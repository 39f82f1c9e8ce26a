"""The compiled steps of an engine, one per token bucket: made ahead in the background, or when first needed."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import jax

from tars_jax import memory

Program = Callable[..., Any]
STACK_BYTES = 64 << 20  # XLA's compiler recurses deeper than a thread's usual 8 MiB allows


def _step_back() -> None:
    """Give this thread, and those the compiler starts from it, a low priority where threads can have their own (Linux)."""
    if sys.platform == "linux":  # elsewhere the call would slow the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


class Programs:
    """Compiles ``lower(bucket)``, each bucket once, whoever asks first."""

    def __init__(self, lower: Callable[[int], jax.stages.Lowered], observe: Callable[[float], None] = lambda _: None) -> None:
        """``observe`` hears how many seconds a compilation took, from the thread that did it."""
        self._lower, self._observe = lower, observe
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
        thread = threading.Thread(target=self._prepare, args=(list(buckets),), name="compile", daemon=False)
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)

    def stop(self) -> None:
        """Begin no further compilation in the background."""
        self._stopped = True

    def _prepare(self, buckets: list[int]) -> None:
        for bucket in buckets:
            if bucket != buckets[0]:  # the first is wanted soon; the others must not take the cores from requests
                _step_back()
            if self._stopped or not threading.main_thread().is_alive():
                return
            future, is_new = self._claim(bucket)
            if is_new:
                self._compile(bucket, future)

    def _claim(self, bucket: int) -> tuple[Future[Program], bool]:
        with self._lock:
            is_new = bucket not in self._programs
            return self._programs.setdefault(bucket, Future()), is_new

    def _compile(self, bucket: int, future: Future[Program]) -> None:
        try:
            started = time.perf_counter()
            program = self._lower(bucket).compile()
            self._observe(time.perf_counter() - started)
            memory.trim()
            future.set_result(program)
        except BaseException as error:
            with self._lock:
                del self._programs[bucket]  # the next one to ask tries again
            future.set_exception(error)
