"""Threads in the background: of low priority, and the others as they were."""

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from api.background import in_background
from tars_jax.engine import threads

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities belong to processes")


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called the compiler here: the real one must stay as fast as it is for the tests to come."""
    monkeypatch.setattr(threads, "COMPILER", "tars-test")


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux_only
def test_work_in_the_background_has_a_low_priority_and_nothing_else_has() -> None:
    ours = priority()
    assert asyncio.run(in_background(priority)) == threads.NICE
    assert priority() == ours


@linux_only
def test_the_compiler_steps_back_too() -> None:
    found: list[int] = []
    ready, done = threading.Event(), threading.Event()

    def worker() -> None:
        found.append(threading.get_native_id())
        Path(f"/proc/self/task/{found[0]}/comm").write_text("tars-test-0")
        ready.set()
        done.wait()

    thread = threading.Thread(target=worker)
    thread.start()
    ready.wait()
    asyncio.run(in_background(lambda: None))
    assert os.getpriority(os.PRIO_PROCESS, found[0]) == threads.NICE
    done.set()
    thread.join()


def test_what_goes_wrong_in_the_background_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_background(lambda: 1 // 0))
