"""The compiled library: found or built, opened, and its calls registered with XLA, once and when first needed."""

import ctypes
import functools
import logging

import jax

from tars_jax.kernels import build

TARGETS = ("tars_empty", "tars_product", "tars_blocks", "tars_attention", "tars_rope_write", "tars_take_rows")

logger = logging.getLogger(__name__)


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library with its targets registered, or the reason why there is none."""
    try:
        library = ctypes.CDLL(str(build.ensure()))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        library.tars_isa.restype = ctypes.c_char_p
    except Exception as error:  # whatever is wrong with a compiler or a library, the plain path works
        logger.warning("no CPU kernels, everything runs on plain XLA and slower: %s", error)
        return f"{type(error).__name__}: {error}"
    return library


def get() -> ctypes.CDLL:
    """The library. Raises RuntimeError when there is none."""
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"CPU kernels are unavailable: {library}")
    return library


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used; None when they can."""
    library = load()
    return library if isinstance(library, str) else None


def available() -> bool:
    """Whether the kernels can be used here; builds them on the first call."""
    return unavailable_reason() is None


def isa() -> str:
    """The instruction set in use: amx, avx512, avx2 or portable. ``TARS_CPU_ISA`` forces one that the machine has."""
    name: bytes = get().tars_isa()
    return name.decode()


def multiplies_bf16() -> bool:
    """Whether the instruction set in use has products of bfloat16."""
    return bool(get().tars_native_pairs())


def use_isa(name: str) -> bool:
    """Switch every later call of this process to another instruction set; False if there is none of that name here."""
    return bool(get().tars_use_isa(name.encode()))
