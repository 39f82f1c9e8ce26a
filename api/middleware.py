"""ASGI middleware: the server's name and log line, the guard against foreign origins and rebound host names."""

import ipaddress
import logging
import re
import socket
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("tars.access")

SERVER = "tars"
_ALLOW_HEADERS = (  # the x-stainless ones are sent by OpenAI's clients
    "Authorization, Content-Type, User-Agent, Accept, X-Requested-With, OpenAI-Beta, x-stainless-arch, x-stainless-async, "
    "x-stainless-custom-poll-interval, x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, "
    "x-stainless-poll-helper, x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
    "Access-Control-Allow-Headers": _ALLOW_HEADERS,
    "Access-Control-Max-Age": "43200",
}
_LOCAL_ORIGINS = (
    *(f"{scheme}://{host}" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1", "0.0.0.0")),
    *(f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1", "0.0.0.0")),
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)


class AccessMiddleware:
    """Names the server in every response and logs a line for every request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # nothing sent: the client went away

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["server"] = SERVER
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        finally:
            client = (scope.get("client") or ("-",))[0]
            # %r: a path comes from outside, and a line break in it must not forge a log line
            log.info("%d | %.3f s | %s | %s %r", status, time.monotonic() - started, client, scope["method"], scope["path"])


class OriginMiddleware:
    """CORS by Ollama's rules: a foreign origin gets 403, an allowed one its headers, a preflight 204."""

    def __init__(self, app: ASGIApp, origins: Iterable[str] = ()) -> None:
        self.app = app
        patterns = (*origins, *_LOCAL_ORIGINS)
        self._allows_all = "*" in patterns
        self._allowed = re.compile("|".join(".*".join(map(re.escape, pattern.lower().split("*"))) for pattern in patterns))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin, host = headers.get("origin", ""), headers.get("host", "")
        if not origin or origin in (f"http://{host}", f"https://{host}"):
            await self.app(scope, receive, send)
        elif not self._allows_all and not self._allowed.fullmatch(origin.lower()):
            await _empty(send, 403)
        elif scope["method"] == "OPTIONS":
            await _empty(send, 204, {**self._headers(origin), **_PREFLIGHT})
        else:
            await self._with_headers(origin, scope, receive, send)

    async def _with_headers(self, origin: str, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers(origin))
            await send(message)

        await self.app(scope, receive, send_allowed)

    def _headers(self, origin: str) -> dict[str, str]:
        if self._allows_all:
            return {"Access-Control-Allow-Origin": "*"}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}


class HostMiddleware:
    """Refuses names that are not this machine's, while the server listens on loopback only: DNS rebinding."""

    def __init__(self, app: ASGIApp, is_loopback: bool = True) -> None:
        self.app, self._is_guarding = app, is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_guarding and scope["type"] == "http" and not is_local_host(Headers(scope=scope).get("host", "")):
            await _empty(send, 403)
        else:
            await self.app(scope, receive, send)


def is_local_host(host: str) -> bool:
    """Whether a Host header means this machine or its own network."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower()
    if name in ("", "localhost", socket.gethostname().lower()) or name.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


async def _empty(send: Send, status: int, headers: dict[str, str] | None = None) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in {"Content-Length": "0", **(headers or {})}.items()]
    if status == 204:
        del raw[0]  # a 204 has no length
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": b""})
