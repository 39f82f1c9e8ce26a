"""Content-addressed files, ``blobs/sha256-<hex>`` as in Ollama's store.

A blob appears under its name only when it is complete, verified and on disk: it is written elsewhere in the folder, hashed on the
way, fsynced and renamed. Downloads write ``sha256-<hex>-partial``, which outlives a crash and is continued; everything else writes
``incoming-<random>``. Whoever writes such a file holds its lock, so two processes never write the same one.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from tars_jax.errors import InvalidRequest, TarsError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks there
    fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 1 << 20
_STALE_SECONDS = 3600  # an unlocked temporary file older than this belongs to a dead process
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")

BlobSource = BinaryIO | Path | Iterable[bytes]


class BlobBusyError(TarsError):
    """Another process or thread is downloading this blob."""


def normal_digest(text: str) -> str:
    """``sha256:<64 hex>`` in lower case, from that or from the ``sha256-<hex>`` of file names.

    Raises:
        InvalidRequest: "invalid digest format".
    """
    match = _DIGEST.fullmatch(text)
    if not match:
        raise InvalidRequest("invalid digest format")
    return f"sha256:{match[1].lower()}"


def try_lock(file: BinaryIO, *, wait: bool = False) -> bool:
    """Take the file's exclusive lock, which closing the file releases; False when another holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks (some network mounts): go on without
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobWriter:
    """One blob on its way into the folder: a context manager; leaving it without ``commit`` stores nothing."""

    def __init__(self, temporary: Path, file: BinaryIO, expected: str | None, *, keep: bool) -> None:
        self._temporary = temporary
        self._file = file
        self._expected = expected
        self._keep = keep  # a partial download stays for the next try
        self._committed = False
        self._sha = hashlib.sha256()
        self.size = 0  # bytes written so far
        for chunk in _read_chunks(file):
            self._count(chunk)
        self.resumed = self.size > 0

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if not self._committed and not (self._keep and self.size):
            self._temporary.unlink(missing_ok=True)

    def _count(self, chunk: bytes) -> None:
        self._sha.update(chunk)
        self.size += len(chunk)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Forget everything written."""
        self._file.seek(0)
        self._file.truncate()
        self._sha, self.size, self.resumed = hashlib.sha256(), 0, False

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha.hexdigest()}"

    def commit(self) -> str:
        """Verify, flush to disk, and give the blob its name. Returns its digest.

        Raises:
            InvalidRequest: the bytes do not have the expected digest; nothing is stored and a partial is emptied.
        """
        digest = self.digest
        if self._expected not in (None, digest):
            self.restart()
            raise InvalidRequest(f'digest mismatch, expected "{self._expected}", got "{digest}"')
        self._file.flush()
        os.fsync(self._file.fileno())
        if fcntl is None:
            self._file.close()  # Windows cannot rename an open file
        os.replace(self._temporary, self._temporary.parent / digest.replace(":", "-"))
        self._committed = True
        sync_folder(self._temporary.parent)
        return digest


class Blobs:
    """The folder of blobs. It is created by the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Raises InvalidRequest ("invalid digest format") unless ``digest`` is ``sha256:<64 hex>``."""
        return self.folder / normal_digest(digest).replace(":", "-")

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def partial_size(self, digest: str) -> int:
        """Bytes of a download under way, 0 when there is none."""
        try:
            return self._partial(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def writer(self, expected: str | None = None) -> BlobWriter:
        """A writer that begins at byte 0."""
        expected = normal_digest(expected) if expected else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_stale()
        temporary = self.folder / f"incoming-{os.urandom(8).hex()}"
        file = _open(temporary, os.O_EXCL)
        try_lock(file)
        return BlobWriter(temporary, file, expected, keep=False)

    def resume(self, digest: str) -> BlobWriter:
        """A writer that continues where an interrupted download of ``digest`` stopped.

        Raises:
            BlobBusyError: somebody else is writing it.
        """
        digest, partial = normal_digest(digest), self._partial(digest)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = _open(partial)
        if not try_lock(file) or not _is_same_file(file, partial):
            file.close()
            raise BlobBusyError(digest)
        return BlobWriter(partial, file, digest, keep=True)

    def add(self, source: BlobSource, expected: str | None = None, on_progress: Callable[[int], None] | None = None) -> str:
        """Store a file, stream or chunks of bytes; returns the digest.

        Raises:
            InvalidRequest: the bytes do not have the expected digest.
        """
        with self.writer(expected) as writer:
            for chunk in _chunks(source):
                writer.write(chunk)
                if on_progress:
                    on_progress(writer.size)
            return writer.commit()

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def _partial(self, digest: str) -> Path:
        owner = "" if fcntl else f"-{os.getpid()}"  # without locks every process has its own
        path = self.path(digest)
        return path.with_name(f"{path.name}{owner}-partial")

    def _drop_stale(self) -> None:
        for path in self.folder.glob("incoming-*"):
            try:
                if time.time() - path.stat().st_mtime < _STALE_SECONDS:
                    continue
                with path.open("rb") as file:
                    if try_lock(file):
                        path.unlink()
            except OSError:
                continue  # gone already, or another user's: not ours to clean


def _open(path: Path, flags: int = 0) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | flags | getattr(os, "O_BINARY", 0), 0o644), "r+b")


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    """Whether ``path`` still names the open file: its last writer may have renamed it while we waited for the lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _chunks(source: BlobSource) -> Iterator[bytes]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield from _read_chunks(file)
    elif hasattr(source, "read"):
        yield from _read_chunks(cast(BinaryIO, source))
    else:
        yield from source
