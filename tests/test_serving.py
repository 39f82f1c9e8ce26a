"""The server with a real engine behind it: who leaves is forgotten wherever the request was, and the queue has an end."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fakes import make_store, serving

from api.app import create_app
from api.models import Models
from api.settings import Settings
from tars_jax import Engine, EngineConfig
from tests.tiny import TinyTokenizer, tiny_model

CONFIG = EngineConfig(max_context=128, max_rows=1, max_step_tokens=32, max_queue=2, prefix_cache=False)


class Tokenizer(TinyTokenizer):
    """What the API asks of a tokenizer beside the engine."""

    add_eos = False

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool | None = None) -> list[int]:
        return super().encode(text, add_special=add_special)


class Gate:
    """Lets an engine take so many steps; meanwhile it goes on listening."""

    def __init__(self, engine: Engine) -> None:
        self._permits, self._is_open = threading.Semaphore(0), True
        step = engine._step

        def held() -> None:
            if self._is_open or self._permits.acquire(timeout=0.005):
                step()

        engine._step = held  # type: ignore[method-assign]

    def open(self) -> None:
        self._is_open = True

    def close(self) -> None:
        self._permits, self._is_open = threading.Semaphore(0), False

    def permit(self, steps: int) -> None:
        self._permits.release(steps)


class Served:
    """A server of a tiny model: one row, two places in the queue."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine, self.gate = url, engine, Gate(engine)
        self.pages = engine.stats().free_pages

    def ask(self, prompt: str, max_tokens: int) -> socket.socket:
        """Send a request and do not wait for anything."""
        host, port = self.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "fake", "prompt": prompt, "raw": True, "options": {"num_predict": max_tokens}})
        connection = socket.create_connection((host, int(port)))
        connection.sendall(f"POST /api/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        return connection

    def has(self, *, running: int = 1, waiting: int = 0) -> bool:
        stats = self.engine.stats()
        return (stats.running, stats.waiting) == (running, waiting)

    def is_forgotten(self) -> bool:
        return self.has(running=0) and self.engine.stats().free_pages == self.pages and not self.engine._sequences


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer: Any = Tokenizer()
    model = dataclasses.replace(tiny_model(), tokenizer=tokenizer)
    engine = Engine(model, CONFIG)
    settings = Settings(context_length=CONFIG.max_context)
    models = Models(make_store(tmp_path_factory.mktemp("store")), settings, load=lambda *_: model, make_engine=lambda *_: engine)
    with pytest.MonkeyPatch.context() as patch, serving(create_app(settings, models)) as url:
        patch.setattr("tars_jax.engine.engine.LONG_STEP", float("inf"))  # on a busy machine a permit would be spent on reading a slow step
        httpx.post(f"{url}/api/generate", json={"model": "fake"})  # loads it
        yield Served(url, engine)


@pytest.fixture
def held(server: Served) -> Iterator[Served]:
    """The server with an engine that takes no step by itself."""
    server.gate.close()
    yield server
    server.gate.open()
    eventually(server.is_forgotten)


def test_who_leaves_during_prefill_is_forgotten(held: Served) -> None:
    before = held.engine.stats().output_tokens
    with held.ask("p" * 100, 5):
        eventually(lambda: held.has(running=0, waiting=1))
        held.gate.permit(3)  # 96 of its tokens
        eventually(lambda: held.engine.stats().free_pages == held.pages - 6)
    eventually(held.is_forgotten)
    assert held.engine.stats().output_tokens == before


def test_who_leaves_during_decode_is_forgotten(held: Served) -> None:
    before = held.engine.stats().output_tokens
    with held.ask("hello", 100):
        eventually(lambda: held.has(running=0, waiting=1))
        held.gate.permit(8)
        eventually(lambda: held.engine.stats().output_tokens > before + 2)
    eventually(held.is_forgotten)
    assert held.engine.stats().output_tokens < before + 9


def test_who_leaves_the_queue_is_forgotten_and_the_next_is_served(held: Served) -> None:
    first = held.ask("hello", 4)
    eventually(lambda: held.has(running=0, waiting=1))
    held.gate.permit(1)
    eventually(held.has)
    with held.ask("leaves", 4):
        eventually(lambda: held.has(waiting=1))
        stays = held.ask("stays", 4)
        eventually(lambda: held.has(waiting=2))
    eventually(lambda: held.has(waiting=1))
    held.gate.open()
    for client in (first, stays):
        assert b'"eval_count":4' in everything(client)


def test_a_full_queue_is_a_503_and_the_rest_are_served(held: Served) -> None:
    clients = [held.ask("hello", 4)]
    eventually(lambda: held.has(running=0, waiting=1))
    held.gate.permit(1)
    eventually(held.has)
    for waiting in (1, 2):
        clients.append(held.ask("hello", 4))
        eventually(lambda waiting=waiting: held.has(waiting=waiting))  # type: ignore[misc]
    body = {"model": "fake", "prompt": "hello", "raw": True}
    refused = httpx.post(f"{held.url}/api/generate", json=body)
    assert (refused.status_code, refused.json()) == (503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
    held.gate.open()
    for client in clients:
        assert b'"eval_count":4' in everything(client)


def everything(client: socket.socket) -> bytes:
    """What is sent until the connection's last chunk."""
    client.settimeout(60)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += client.recv(65536)
    client.close()
    return data
