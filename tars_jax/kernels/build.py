"""Compile the C++ kernels with the host's compiler, once per source and compiler, into the user's cache.

``python -m tars_jax.kernels.build --out DIR`` builds into DIR instead: what a package's build step calls.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxlib
from jaxlib.version import __version__ as jaxlib_version

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = "libtars_cpu.so"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-Wno-psabi")
# Flags of single files.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
X86_FLAGS: dict[str, tuple[str, ...]] = {
    "isa_avx2.cc": AVX2,
    "isa_avx512.cc": AVX512,
    "isa_amx.cc": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
NEWEST = ("isa_amx.cc",)  # whose flags older compilers do not know; without them these files compile to nothing
FILE_FLAGS: dict[str, tuple[str, ...]] = {"isa_portable.cc": ("-O2",)}  # a fallback: this halves its compile time
COMPILE_JOBS = 2
COMPILE_TIMEOUT = 900  # seconds a file: it takes half a minute, and much more with sanitizers on a busy machine


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a built library is: written beside it, and read before the library is opened."""

    sources: str  # hash of sources and flags
    jaxlib: str  # version whose headers it was compiled with
    machine: str
    sha256: str  # of the file itself


def extra_flags(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Further flags for compiler and linker, from ``TARS_CXXFLAGS``: a library built with others is another library."""
    return shlex.split(environ.get("TARS_CXXFLAGS", ""))


def source_hash() -> str:
    """Hash of everything we hand to a compiler."""
    digest = hashlib.sha256(repr((FLAGS, X86_FLAGS, FILE_FLAGS, extra_flags(), platform.machine(), sys.platform)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cc"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of c++, g++, clang++. Raises BuildError."""
    if configured := environ.get("CXX", "").strip():
        command = shlex.split(configured)
        if shutil.which(command[0], path=environ.get("PATH")):
            return command
        raise BuildError(f"the compiler that CXX names, {command[0]}, is not on the path")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=environ.get("PATH")):
            return [found]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++ and clang++)")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where TARS keeps what it can make again: ``TARS_CACHE``, else ``$XDG_CACHE_HOME/tars``, else ``~/.cache/tars``."""
    if configured := environ.get("TARS_CACHE", "").strip():
        return Path(configured).expanduser()
    base = environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "tars"


def check(directory: Path) -> str | None:
    """Why the library in a directory cannot be used here; None if it can. Opens nothing but files."""
    try:
        manifest = Manifest(**json.loads((directory / f"{LIBRARY}.json").read_text()))
        contents = hashlib.sha256((directory / LIBRARY).read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError) as error:
        return f"no usable library in {directory}: {error}"
    if manifest.sha256 != contents:
        return f"{directory / LIBRARY} is not the file its manifest describes"
    if manifest.machine != platform.machine():
        return f"{directory / LIBRARY} is for {manifest.machine}"
    if manifest.sources != source_hash():
        return f"{directory / LIBRARY} was built from other sources"
    if _version(manifest.jaxlib) > _version(jaxlib_version):  # the other way round works
        return f"{directory / LIBRARY} was built for jaxlib {manifest.jaxlib}, newer than {jaxlib_version}"
    return None


def ensure() -> Path:
    """The library for this machine, built if need be. Raises BuildError."""
    installed = Path(__file__).parent
    if check(installed) is None:
        return installed / LIBRARY
    compiler = find_compiler()
    key = hashlib.sha256(f"{source_hash()} {jaxlib_version} {_compiler_version(compiler)}".encode()).hexdigest()[:32]
    directory = cache_dir() / "kernels" / key
    if check(directory) is not None:
        logger.warning("compiling the CPU kernels with %s; this is done once and takes half a minute", compiler[0])
        build(directory, compiler)
    if problem := check(directory):
        raise BuildError(problem)
    return directory / LIBRARY


def build(directory: Path, compiler: list[str] | None = None) -> None:
    """Compile into a directory; of several processes that want the same one builds and the others wait. Raises BuildError."""
    command = compiler or find_compiler()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            if check(directory) is None:
                return
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                _compile(command, Path(scratch))
                library = Path(scratch) / LIBRARY
                contents = hashlib.sha256(library.read_bytes()).hexdigest()
                manifest = Manifest(source_hash(), jaxlib_version, platform.machine(), contents)
                described = Path(scratch) / "manifest"
                described.write_text(json.dumps(dataclasses.asdict(manifest)))
                # Replaced one after the other: between the two the hashes disagree, which reads as "not built".
                library.replace(directory / LIBRARY)
                described.replace(directory / f"{LIBRARY}.json")
    except OSError as error:
        raise BuildError(f"cannot build in {directory}: {error}") from error


def _compile(compiler: list[str], scratch: Path) -> None:
    # Portable code first: of inline functions that several objects contain, the linker keeps the first.
    units = sorted(SOURCES.glob("*.cc"), key=lambda path: (path.name.startswith("isa_"), path.name != "isa_portable.cc"))
    objects = [scratch / f"{path.stem}.o" for path in units]

    def unit(index: int) -> None:
        path = units[index]
        include = Path(jaxlib.__file__).parent / "include"

        def compile_with(flags: tuple[str, ...]) -> None:
            _run([*compiler, *FLAGS, *flags, *extra_flags(), "-isystem", str(include), "-c", str(path), "-o", str(objects[index])])

        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        try:
            compile_with((*FILE_FLAGS.get(path.name, ()), *(X86_FLAGS.get(path.name, ()) if is_x86 else ())))
        except BuildError as error:
            if path.name not in NEWEST:
                raise
            logger.info("the kernels do without %s, which this compiler refuses: %s", path.stem, error)
            compile_with(())

    slow_first = sorted(range(len(units)), key=lambda i: not units[i].name.startswith("isa_"))
    with ThreadPoolExecutor(min(COMPILE_JOBS, os.cpu_count() or 1)) as pool:
        list(pool.map(unit, slow_first))
    _run([*compiler, "-shared", *extra_flags(), "-o", str(scratch / LIBRARY), *map(str, objects), "-pthread"])


def _run(command: list[str]) -> None:
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    except OSError as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    try:
        _, errors = process.communicate(timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler proper, which the command has started
        process.communicate()
        raise BuildError(f"{command[0]} failed: {error}") from error
    if process.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{errors[-2000:]}")


def _compiler_version(compiler: list[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} does not run: {error}") from error
    return done.stdout


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory for the library")
    arguments = parser.parse_args()
    try:
        build(arguments.out)
    except BuildError as error:
        sys.exit(str(error))
    print(arguments.out / LIBRARY)


if __name__ == "__main__":
    main()
