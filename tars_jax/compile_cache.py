"""Compiled programs kept between processes, so that only the first start on a machine compiles.

jax's own cache finds a program by what it is lowered to, which takes longer than loading it. An engine's programs are kept by what they
are made of besides (`Recipe`), and then not even traced.

A cached program is machine code: the folder is as trusted as the programs in it, and belongs to the user alone.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import platform
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tars_jax.kernels.build import cache_dir

SECONDS = "jax_persistent_cache_min_compile_time_secs"
MIN_COMPILE_SECONDS = 0.3  # cheaper programs are compiled faster than they are found on a disk
MOST_PROGRAMS = 256  # kept by recipe; of 0.2 to 1 MB
DIGEST = hashlib.sha256().digest_size
SOURCES = (".py", ".cc", ".h")

log = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """What a program is made of: a jitted function, its arguments or their shapes, its static arguments, and a tree like its result."""

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    result: Any

    def make(self) -> jax.stages.Compiled:
        """The compiled program, from the disk if it was made before; else it is kept there."""
        path = self._path
        program = None if path is None else self._load(path)
        return program or self._compile_and_save(path)

    def store(self) -> jax.stages.Compiled | None:
        """See that the program can be had from the disk; what had to be compiled where it cannot be kept there."""
        path = self._path
        if path is not None and path.exists():
            os.utime(path)
            return None
        program = self._compile_and_save(path)
        return None if path is not None and path.exists() else program

    def _compile_and_save(self, path: Path | None) -> jax.stages.Compiled:
        if path is None:
            return self._compile()
        with _JAX_CACHE.unwritten():
            program = self._compile()
        if _JAX_CACHE.was_hit:
            _FOUND_ELSEWHERE.add(path)
        if path not in _FOUND_ELSEWHERE:
            _save(path, program)
        return program

    def _compile(self) -> jax.stages.Compiled:
        program: jax.stages.Compiled = self.function.lower(*self.arguments, **self.static).compile()
        self.function.clear_cache()  # what it was traced to takes more memory than the program, and is not asked for again
        return program

    @property
    def _path(self) -> Path | None:
        folder = jax.config.values["jax_compilation_cache_dir"]
        leaves = jax.tree.leaves(self.arguments)
        is_spread = any(len(leaf.sharding.device_set) > 1 for leaf in leaves if getattr(leaf, "sharding", None) is not None)
        if folder is None or jax.default_backend() != "cpu" or is_spread:
            return None
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        static = sorted((name, str(value)) for name, value in self.static.items())
        what = self.function.__name__, shapes, str(jax.tree.structure(self.arguments)), static, _surroundings()
        return Path(folder) / "programs" / hashlib.sha256(repr(what).encode()).hexdigest()

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        from jax.experimental.serialize_executable import deserialize_and_load

        try:
            if path.stat().st_uid != os.geteuid():
                return None
            content = path.read_bytes()
            if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
                return None
            os.utime(path)
            trees = jax.tree.structure((self.arguments, {})), jax.tree.structure(self.result)
            return deserialize_and_load(content[DIGEST:], *trees, execution_devices=jax.devices()[:1])
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with a file, the program can be made again
            log.debug("cannot load the program in %s: %s", path, error)
            return None


class _JaxCache:
    """jax's own cache. A program that came from there is not whole when it is serialised again, so those kept here must never be in it."""

    def __init__(self) -> None:
        self._here = threading.local()  # jax tells what it finds from the thread that compiles
        self._lock, self._writers, self._usual = threading.Lock(), 0, 0.0
        jax.monitoring.register_event_listener(self._hear)

    @contextlib.contextmanager
    def unwritten(self) -> Iterator[None]:
        """Nothing is written to it meanwhile; afterwards `was_hit` is about this thread's compilations in between."""
        self._here.hit = False
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @property
    def was_hit(self) -> bool:
        return bool(self._here.hit)

    def _count(self, change: int) -> None:
        with self._lock:
            if not self._writers:
                self._usual = jax.config.values[SECONDS]
            self._writers += change
            jax.config.update(SECONDS, math.inf if self._writers else self._usual)

    def _hear(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._here.hit = True


_JAX_CACHE = _JaxCache()
_FOUND_ELSEWHERE: set[Path] = set()  # where programs would be that jax's cache had: jax may hand them out again without a look there


def _save(path: Path, program: jax.stages.Compiled) -> None:
    from jax.experimental.serialize_executable import serialize

    try:
        content = serialize(program)[0]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, path)
        oldest_first = sorted(path.parent.iterdir(), key=lambda kept: kept.stat().st_mtime)
        for kept in oldest_first[:-MOST_PROGRAMS]:
            kept.unlink(missing_ok=True)
    except Exception as error:  # a program that cannot be kept is made again the next time
        log.debug("cannot keep a program in %s: %s", path, error)


@functools.cache
def _sources() -> str:
    """What tells this state of the package from every other: names, sizes and times of its files."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in SOURCES)
    return repr([(str(path.relative_to(root)), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files])


def _surroundings() -> tuple[str, ...]:
    """What else a program depends on: versions, processor, devices, jax's settings."""
    settings = sorted((name, str(value)) for name, value in jax.config.values.items() if name != SECONDS)
    flags = os.environ.get("XLA_FLAGS", "")
    return version("jax"), version("jaxlib"), _processor(), str(jax.devices()), flags, repr(settings), _sources()


def enable() -> None:
    """Turn jax's persistent compilation cache on, unless the user has set one or the folder cannot be made."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_dir() / "compiled" / f"{version('jaxlib')}-{_processor()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update(SECONDS, MIN_COMPILE_SECONDS)


@functools.cache
def _processor() -> str:
    """A short name of this processor's instruction set: code compiled for another one must not be found."""
    text = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            text += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:12]
