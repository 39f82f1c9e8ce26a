"""Compiled programs kept between processes, so that only the first start on a machine compiles.

A cached program is machine code: the folder is as trusted as the programs in it, and belongs to the user alone.
"""

import hashlib
import platform
from importlib.metadata import version

import jax

from tars_jax.kernels.build import cache_dir

MIN_COMPILE_SECONDS = 0.3  # cheaper programs are compiled faster than they are found on a disk


def enable() -> None:
    """Turn jax's persistent compilation cache on, unless the user has set one or the folder cannot be made."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_dir() / "xla" / f"{version('jaxlib')}-{_processor()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def _processor() -> str:
    """A short name of this processor's instruction set: code compiled for another one must not be found."""
    text = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            text += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:12]
