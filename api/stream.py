"""Answers that stop working when the client goes away, streamed (NDJSON) or whole."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tars_jax.errors import TarsError

log = logging.getLogger(__name__)

T = TypeVar("T")
Chunk = dict[str, Any]


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make such an encoder for every chunk


def dump(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return _encode(value).encode("utf-8", "replace")


class JsonResponse(Response):
    """One JSON object, with Ollama's content type."""

    media_type = "application/json; charset=utf-8"

    def render(self, content: Any) -> bytes:
        return dump(content)


def error_response(error: Exception) -> JsonResponse:
    """What a client may know of an error: an expected one entirely, any other only that it happened."""
    return JsonResponse({"error": error_text(error)}, getattr(error, "status", 500) if isinstance(error, TarsError) else 500)


def error_text(error: Exception) -> str:
    if isinstance(error, TarsError):
        return str(error)
    log.error("unexpected error", exc_info=error)
    return "internal server error, see the server's log"


class NdjsonResponse(Response):
    """A stream of JSON objects, one a line. Its generator is closed when it ends, fails or loses its client."""

    media_type = "application/x-ndjson"

    def __init__(self, first: Chunk, rest: AsyncGenerator[Chunk, None]) -> None:
        self.status_code, self.background = 200, None
        self._first, self._rest = first, rest
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGoneError):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._rest) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_line(send, self._first)
            try:
                async for chunk in chunks:
                    await _send_line(send, chunk)
            except Exception as error:  # the status line is gone: the error becomes the last line
                await _send_line(send, {"error": error_text(error)})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_line(send: Send, chunk: Mapping[str, Any]) -> None:
    await send({"type": "http.response.body", "body": dump(chunk) + b"\n", "more_body": True})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, and cancel it when the client disconnects: then `ClientGoneError`."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        BodyTooLargeError: more than ``limit`` bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLargeError(f"request body too large: more than {limit >> 20} MiB")
    return bytes(body)


class BodyTooLargeError(TarsError):
    """The body is larger than the server accepts."""

    status = 413
