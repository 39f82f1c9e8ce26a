"""The application: routes, middleware and lifespan as data, put together by a function."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api import ollama, optimize
from api.jobs import Jobs
from api.middleware import AccessMiddleware, HostMiddleware, OriginMiddleware
from api.models import Models
from api.settings import Settings
from api.stream import JsonResponse
from tars_jax.store import Store

log = logging.getLogger(__name__)

Pull = Callable[..., Iterator[dict[str, Any]]]

ROUTES: tuple[tuple[str, tuple[str, ...], ollama.Handler], ...] = (
    ("/", ("GET", "HEAD"), ollama.root),
    ("/health", ("GET", "HEAD"), ollama.health),
    ("/metrics", ("GET",), ollama.metrics),
    ("/api/version", ("GET", "HEAD"), ollama.version),
    ("/api/tags", ("GET", "HEAD"), ollama.tags),
    ("/api/ps", ("GET",), ollama.running),
    ("/api/show", ("POST",), ollama.show),
    ("/api/generate", ("POST",), ollama.generate),
    ("/api/chat", ("POST",), ollama.chat),
    ("/api/pull", ("POST",), ollama.pull),
    ("/api/copy", ("POST",), ollama.copy),
    ("/api/delete", ("DELETE",), ollama.delete),
    ("/api/optimize", ("POST",), optimize.optimize),
    ("/api/optimize", ("GET",), optimize.jobs),
    ("/api/optimize/{id}", ("GET",), optimize.job),
    ("/api/optimize/{id}", ("DELETE",), optimize.stop),
    ("/api/versions", ("GET",), optimize.versions),
    ("/api/versions/rollback", ("POST",), optimize.roll_back),
    ("/api/versions/save", ("POST",), optimize.save),
)


def create_app(
    settings: Settings | None = None, models: Models | None = None, store: Store | None = None, pull: Pull | None = None
) -> Starlette:
    """The server. Everything it holds is made here or given: ``models`` and ``pull`` are fakes in tests."""
    settings = settings or Settings.from_environ()
    models = models or Models(store or Store(settings.models), settings)
    models.telemetry.watch(models.loaded, models.waiting, models.responses)
    jobs = Jobs(models)
    app = Starlette(
        routes=[_route(path, methods, handler) for path, methods, handler in ROUTES],
        middleware=[
            Middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies)),
            Middleware(AccessMiddleware),
            Middleware(HostMiddleware, is_loopback=settings.address.is_loopback),
            Middleware(OriginMiddleware, origins=settings.origins),
        ],
        exception_handlers={404: _not_found, 405: _method_not_allowed, Exception: _failed},
        lifespan=functools.partial(_lifespan, models, jobs),
    )
    app.router.redirect_slashes = False  # its redirects are all 307
    app.state.models, app.state.jobs, app.state.pull = models, jobs, pull or _pull
    return app


def _route(path: str, methods: tuple[str, ...], handler: ollama.Handler) -> Route:
    route = Route(path, ollama.endpoint(handler), methods=list(methods))
    route.methods = set(methods)  # Starlette adds HEAD to every GET; Ollama does not
    return route


@contextlib.asynccontextmanager
async def _lifespan(models: Models, jobs: Jobs, app: Starlette) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await jobs.close()
        await models.close()


def _pull(name: str, store: Store, *, insecure: bool = False) -> Iterator[dict[str, Any]]:
    from tars_jax.hub import pull  # here: HTTP clients are slow to import, and most servers never pull

    return pull(name, store, insecure=insecure)


async def _not_found(request: Request, error: Exception) -> Response:
    path = request.url.path.rstrip("/")
    if path and path != request.url.path and any(path == known for known, _, _ in ROUTES):
        target = path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(target, 301 if request.method == "GET" else 307)
    return PlainTextResponse("404 page not found", 404)


async def _method_not_allowed(request: Request, error: Exception) -> Response:
    return PlainTextResponse("405 method not allowed", 405, headers=getattr(error, "headers", None))


async def _failed(request: Request, error: Exception) -> Response:
    """What no handler caught. The traceback is in the log; the client learns nothing of our insides."""
    return JsonResponse({"error": "internal server error, see the server's log"}, 500)
