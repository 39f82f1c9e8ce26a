"""Threads that compile beside serving: with a deep stack, and of low priority. Plain Python."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

STACK_BYTES = 64 << 20  # XLA's compiler recurses deeper than a thread's usual 8 MiB allows
NICE = 19  # a thread of this priority gets a sixtieth of a core that another one wants too
COMPILER = "llvm-worker"  # how the threads that XLA's compiler shares its work with are called


def start_deep(work: Callable[[], None], name: str, *, daemon: bool) -> threading.Thread:
    """Run ``work`` in a thread of its own with room for XLA's compiler."""
    thread = threading.Thread(target=work, name=name, daemon=daemon)
    before = threading.stack_size(STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def step_back() -> None:
    """Give this thread, and the compiler's for good, a low priority where threads can have their own (Linux)."""
    if sys.platform != "linux":  # elsewhere the call would slow the whole process
        return
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith(COMPILER):
                os.setpriority(os.PRIO_PROCESS, int(task.name), NICE)
        except OSError:  # it has ended
            continue
