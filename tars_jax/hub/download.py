"""Downloading one blob over HTTP: resumed, verified, never stored half."""

import time
from collections.abc import Iterator, Mapping

import httpx

from tars_jax.errors import InvalidRequest
from tars_jax.hub.job import Event, SourceError, progress
from tars_jax.store import Store
from tars_jax.store.blobs import BlobBusyError, BlobWriter

TIMEOUT = httpx.Timeout(30.0, connect=5.0)  # seconds; 30: a stalled transfer
_EVENT_SECONDS = 0.1  # between progress events
_BUSY_SECONDS = 0.2  # between looks at somebody else's download


def client() -> httpx.Client:
    """An HTTP client; proxies come from the environment (HTTPS_PROXY, NO_PROXY)."""
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers={"User-Agent": "tars-jax"})


def reason(error: httpx.HTTPError) -> str:
    """Why a request failed, in one line."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"cannot be reached: no connection within {TIMEOUT.connect:.0f} s"
    if isinstance(error, httpx.TimeoutException):
        return f"timed out: nothing received for {TIMEOUT.read:.0f} s"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"cannot be reached: {text}" if isinstance(error, httpx.ConnectError) else text


def download(
    http: httpx.Client, url: str, digest: str, total: int, store: Store, headers: Mapping[str, str] | None = None
) -> Iterator[Event]:
    """Bring the blob ``digest`` of ``total`` bytes into the store, going on from a partial of an earlier try.

    Raises:
        SourceError: the server cannot be reached, refuses, breaks off repeatedly, or sends other bytes.
    """
    while not store.has_blob(digest):
        try:
            writer = store.blobs.resume(digest)
        except BlobBusyError:  # show how far the other one is
            yield progress(digest, total, min(store.blobs.partial_size(digest), total))
            time.sleep(_BUSY_SECONDS)
            continue
        with writer:
            yield from _fill(http, url, total, writer, digest, headers or {})
    yield progress(digest, total, total)


def _fill(http: httpx.Client, url: str, total: int, writer: BlobWriter, digest: str, headers: Mapping[str, str]) -> Iterator[Event]:
    while True:
        if writer.size > total:  # no partial of this blob
            writer.restart()
        resumed = writer.resumed
        yield from _receive(http, url, total, writer, digest, headers)
        try:
            writer.commit()
            return
        except InvalidRequest as error:  # bytes of an earlier try may be to blame: once more from the start
            if not resumed:
                raise SourceError(f"sent a damaged file: {error}") from error


def _receive(http: httpx.Client, url: str, total: int, writer: BlobWriter, digest: str, headers: Mapping[str, str]) -> Iterator[Event]:
    """Requests until all bytes are here; a broken connection is picked up again as long as each one brings something."""
    yield progress(digest, total, writer.size)
    while writer.size < total:
        before = writer.size
        failure = "breaks off without sending anything"
        try:
            yield from _request(http, url, total, writer, digest, headers)
        except httpx.HTTPError as error:
            failure = reason(error)
        if writer.size <= before:
            raise SourceError(failure)


def _request(http: httpx.Client, url: str, total: int, writer: BlobWriter, digest: str, headers: Mapping[str, str]) -> Iterator[Event]:
    ranged = {"Range": f"bytes={writer.size}-"} if writer.size else {}
    shown = time.monotonic()
    with http.stream("GET", url, headers={**headers, **ranged, "Accept-Encoding": "identity"}) as response:
        if response.status_code == 200 and writer.size:  # the server ignores ranges
            writer.restart()
        elif response.status_code != (206 if writer.size else 200):
            raise SourceError(f"answers {response.status_code} {response.reason_phrase}".rstrip())
        for chunk in response.iter_raw():
            if writer.size + len(chunk) > total:
                raise SourceError(f"sends more than the {total} bytes it announced")
            writer.write(chunk)
            if time.monotonic() - shown >= _EVENT_SECONDS:
                shown = time.monotonic()
                yield progress(digest, total, writer.size)
