"""Handlers of Ollama's endpoints: they parse, enqueue and stream. What they stream is made in `api.answers`."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api import catalog
from api.answers import AnyRequest, chat_chunks, collect, generate_chunks
from api.callers import client_key, header_options
from api.decode import decode
from api.models import Models
from api.schema import ChatRequest, CopyRequest, DeleteRequest, GenerateRequest, PullRequest, ShowRequest
from api.stream import ClientGoneError, JsonResponse, NdjsonResponse, error_response, read_body, until_disconnect
from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.store import ModelName

__all__ = ["VERSION", "chat_chunks", "collect", "endpoint", "generate_chunks"]

T = TypeVar("T")
R = TypeVar("R", GenerateRequest, ChatRequest)
Chunk = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]

MAX_BODY = 64 << 20  # bytes
VERSION = "0.33.0"  # of the API: clients ask what they may use


def endpoint(handler: Handler) -> Handler:
    """A handler whose errors become JSON."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return error_response(error)

    return answer


async def root(request: Request) -> Response:
    """GET /"""
    return PlainTextResponse("Ollama is running")


async def version(request: Request) -> Response:
    """GET /api/version"""
    return JsonResponse({"version": VERSION})


async def generate(request: Request) -> Response:
    """POST /api/generate"""
    body = _with_headers(await _body(GenerateRequest, request), request)
    return await _answer(request, body, not body.prompt, generate_chunks(_models(request), body, client_key(request)))


async def chat(request: Request) -> Response:
    """POST /api/chat"""
    body = _with_headers(await _body(ChatRequest, request), request)
    return await _answer(request, body, not body.messages, chat_chunks(_models(request), body, client_key(request)))


async def tags(request: Request) -> Response:
    """GET /api/tags"""
    return JsonResponse(await asyncio.to_thread(catalog.tags, _models(request).store))


async def show(request: Request) -> Response:
    """POST /api/show"""
    body = await _body(ShowRequest, request)
    store, name = _models(request).store, body.model_name
    return JsonResponse(await asyncio.to_thread(catalog.show, store, name, verbose=body.verbose, system=body.system))


async def running(request: Request) -> Response:
    """GET /api/ps"""
    return JsonResponse(catalog.running(_models(request)))


async def copy(request: Request) -> Response:
    """POST /api/copy"""
    body = await _body(CopyRequest, request)
    await asyncio.to_thread(catalog.copy_model, _models(request).store, body.source, body.destination)
    return Response()


async def delete(request: Request) -> Response:
    """DELETE /api/delete"""
    body = await _body(DeleteRequest, request)
    models, name = _models(request), body.model_name
    try:
        ModelName.parse(name)
    except InvalidRequest:
        raise InvalidRequest(f'name "{name}" is invalid') from None
    with contextlib.suppress(ModelFileError):  # a model with a broken manifest can be deleted too
        await models.unload(name)
    await asyncio.to_thread(models.store.delete, name)
    return Response()


async def pull(request: Request) -> Response:
    """POST /api/pull"""
    body = await _body(PullRequest, request)
    events = pull_events(request.app.state.pull(body.model_name, _models(request).store, insecure=body.insecure))
    if body.stream:
        return await _streamed(request, events)
    return JsonResponse(await until_disconnect(request.receive, _last(events)))


async def pull_events(events: Iterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """Events of a blocking generator, each awaited in a thread; the generator is closed from the thread that ran it last."""
    step: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, events, None))
            event = await asyncio.shield(step)
            if event is None:
                return
            yield event
    finally:
        if step is not None and not step.done():
            await asyncio.wait([step])  # a generator cannot be closed while it runs
            step.exception()
        await asyncio.to_thread(_close, events)


async def health(request: Request) -> Response:
    """GET /health"""
    models = _models(request)
    names = [entry.name for entry in models.loaded()]
    queued = models.waiting() + sum(entry.engine.stats().waiting for entry in models.loaded())
    return JsonResponse({"status": "ok", "models": names, "queue": queued})


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(_models(request).telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


async def _body(kind: type[T], request: Request) -> T:
    return decode(kind, await read_body(request, MAX_BODY))


def _with_headers(body: R, request: Request) -> R:
    """The body with the options that headers carry over its own."""
    return dataclasses.replace(body, options={**body.options, **header_options(request)})


async def _answer(request: Request, body: AnyRequest, is_load: bool, chunks: AsyncGenerator[Chunk, None]) -> Response:
    """One object, or a stream; loading, unloading and rendering are always one object."""
    if body.stream and not is_load and not body.debug_render_only:
        return await _streamed(request, chunks)
    return JsonResponse(await until_disconnect(request.receive, collect(chunks)))


async def _streamed(request: Request, chunks: AsyncGenerator[Chunk, None]) -> Response:
    """The first chunk is awaited here, so that an error before it has its own status."""
    first = await until_disconnect(request.receive, _next(chunks))
    return NdjsonResponse(first, chunks)


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk:
    return await anext(chunks)


async def _last(chunks: AsyncGenerator[Chunk, None]) -> Chunk:
    last: Chunk = {}
    async for chunk in chunks:
        last = chunk
    return last


def _close(events: Iterator[Chunk]) -> None:
    if close := getattr(events, "close", None):
        with contextlib.suppress(Exception):
            close()
