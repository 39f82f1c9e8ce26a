"""The machine's memory: how much is free, and giving back what is not needed."""

import contextlib
import ctypes
import os


def free_bytes() -> int:
    """Bytes that can be taken without swapping: MemAvailable on Linux, elsewhere half of what is installed."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def trim() -> None:
    """Return freed memory to the system: loading and compiling leave 50 to 100 MB behind in glibc's heaps."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
