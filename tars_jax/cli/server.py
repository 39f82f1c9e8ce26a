"""Commands about a server: serve, ps, stop."""

import datetime
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tars_jax.cli.output import human_bytes, human_time, note, table
from tars_jax.errors import ModelNotFound, TarsError

if TYPE_CHECKING:
    from api.settings import Address
    from tars_jax.cli.backends import ServerBackend

_GRACE = 3  # seconds that running answers have at shutdown


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default OLLAMA_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; default OLLAMA_HOST's or 11434. 0: any.")] = None,
    tuned: Annotated[str, typer.Option(metavar="FILE", help="Engine settings written by `tars tune`; default TARS_TUNED.")] = "",
) -> None:
    """Start the server."""
    import dataclasses

    import uvicorn

    from api.app import create_app
    from api.settings import Settings

    settings = Settings.from_environ({**os.environ, "TARS_TUNED": tuned} if tuned else os.environ)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("api", "tars", "tars_jax"):  # other libraries only warn
        logging.getLogger(name).setLevel(logging.DEBUG if settings.debug else logging.INFO)
    address = settings.address
    address = dataclasses.replace(address, host=address.host if host is None else host, port=address.port if port is None else port)
    listener = listen(address)
    address = dataclasses.replace(address, port=listener.getsockname()[1])
    app = create_app(dataclasses.replace(settings, address=address))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=_GRACE
    )
    server = uvicorn.Server(config)
    # For a signal before uvicorn has its own handlers, and for the one it raises again when it has shut down.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    note(f"TARS listens on {address.url} (models in {settings.models})")
    with listener:
        server.run(sockets=[listener])


def listen(address: "Address") -> socket.socket:
    """A listening socket.

    Raises:
        TarsError: the address cannot be had, with the reason.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise TarsError(f"cannot listen on {address.host}:{address.port}: {reason}") from None


def running() -> None:
    """List models in memory."""
    server = running_server()
    rows = [_row(model) for model in server.running()]
    server.close()
    print(table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), rows))


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    share = round(100 * model["size_vram"] / model["size"]) if model["size"] else 0
    processor = {0: "100% CPU", 100: "100% GPU"}.get(share, f"{100 - share}%/{share}% CPU/GPU")
    until = human_time(datetime.datetime.fromisoformat(model["expires_at"]))
    return model["name"], model["digest"][:12], human_bytes(model["size"]), processor, str(model["context_length"]), until


def stop(model: str) -> None:
    """Unload a model."""
    server = running_server()
    try:
        server.generate({"model": model, "keep_alive": 0})
    except ModelNotFound:
        raise ModelNotFound(f'couldn\'t find model "{model}" to stop') from None
    finally:
        server.close()


def running_server() -> "ServerBackend":
    """The server at OLLAMA_HOST. Raises TarsError: there is none."""
    from api.settings import Settings
    from tars_jax.cli.backends import find_server

    settings = Settings.from_environ()
    if server := find_server(settings):
        return server
    raise TarsError(f"no TARS server answers at {settings.address.url}; start one with `tars serve`, or set OLLAMA_HOST")
