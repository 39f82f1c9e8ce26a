"""The machine's memory: how much is free, and giving back what is not needed; and Python's collector of cycles."""

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30
# Limit, use and the name of reclaimable file pages in memory.stat, of control groups 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes() -> int:
    """Bytes that can be taken without swapping: MemAvailable on Linux, elsewhere half of what is installed; in a container no more
    than its limit leaves."""
    return min(_system_free_bytes(), *_cgroup_free_bytes(Path("/sys/fs/cgroup")))


def show(count: int) -> str:
    """A size for people, in the units of Ollama's messages: 5.6 GiB, 320.0 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def trim() -> None:
    """Return freed memory to the system: loading and compiling leave 50 to 100 MB behind in glibc's heaps."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


_lock = threading.Lock()
_pauses = 0  # pauses under way
_was_enabled = True  # before the first of them


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Python does not look for cycles meanwhile. Imports and loading make some 100,000 objects that stay, and each full look at them and
    jax's 300,000 takes 60 ms."""
    global _pauses, _was_enabled
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_enabled:
                gc.enable()


def _system_free_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_free_bytes(root: Path) -> list[int]:
    """What the limits of this process's control groups leave: nothing where there are none. ``root`` is where they are mounted."""
    try:
        groups = [line.rstrip("\n").split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        mount = root / controllers
        for folder in (mount / path.lstrip("/"), mount):  # a container sees its own group at the root
            found += _left(folder)
    return found


def _left(folder: Path) -> list[int]:
    for limit, usage, reclaimable in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            allowed = int((folder / limit).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return [max(allowed - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0)), 0)]
    return []
