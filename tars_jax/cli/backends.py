"""Where ``tars run`` finds its model: in a running server, or in this process. Both give the same Ollama-shaped chunks."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlencode

from tars_jax.cli.progress import load_bar
from tars_jax.config import EngineConfig
from tars_jax.errors import ModelNotFound, TarsError

if TYPE_CHECKING:
    import httpx

    from api.models import Models
    from api.settings import Settings
    from tars_jax.engine.engine import Engine
    from tars_jax.loaders.loaded import Model
    from tars_jax.store import Store, StoredModel

Chunk = dict[str, Any]


class Backend(Protocol):
    """What an interactive session needs of its models."""

    def has(self, model: str) -> bool:
        """Whether the model is here."""

    def pull(self, model: str) -> Iterator[Chunk]:
        """Bring it; status events."""

    def chat(self, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        """The chunks of an answer to the body of a chat request. Closing the iterator stops the answer."""

    def show(self, model: str) -> Chunk:
        """What /api/show says of a model."""

    def names(self) -> list[str]:
        """The names of all models."""

    def close(self) -> None:
        """Let everything go."""


class ServerBackend:
    """A running server."""

    def __init__(self, client: "httpx.Client") -> None:
        self._client = client

    def has(self, model: str) -> bool:
        try:
            self.show(model)
        except ModelNotFound:
            return False
        return True

    def pull(self, model: str) -> Iterator[Chunk]:
        return self._stream("/api/pull", {"model": model})

    def chat(self, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        return self._stream("/api/chat", body)

    def generate(self, body: Mapping[str, Any]) -> Chunk:
        """The answer of a generate request that is not streamed."""
        return self._request("POST", "/api/generate", body)

    def show(self, model: str) -> Chunk:
        return self._request("POST", "/api/show", {"model": model})

    def running(self) -> list[Chunk]:
        """The models in memory."""
        return list(self._request("GET", "/api/ps")["models"])

    def names(self) -> list[str]:
        return [model["name"] for model in self._request("GET", "/api/tags")["models"]]

    def optimize(self, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        """How a job stands, again and again until it ends. Closing the iterator does not stop it."""
        return self._stream("/api/optimize", body)

    def jobs(self) -> list[Chunk]:
        return list(self._request("GET", "/api/optimize")["jobs"])

    def stop_job(self, job_id: str) -> Chunk:
        """How the job stands when it has ended."""
        return self._request("DELETE", f"/api/optimize/{job_id}")

    def versions(self, model: str) -> Chunk:
        return self._request("GET", f"/api/versions?{urlencode({'model': model})}")

    def roll_back(self, model: str, version: int | None) -> Chunk:
        return self._request("POST", "/api/versions/rollback", {"model": model, "version": version})

    def save_version(self, model: str, version: int | None, name: str) -> Chunk:
        return self._request("POST", "/api/versions/save", {"model": model, "version": version, "name": name})

    def close(self) -> None:
        self._client.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Chunk:
        with _server_errors():
            return _checked(self._client.request(method, path, json=body))

    def _stream(self, path: str, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        with _server_errors(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                _checked(response)
            for line in response.iter_lines():
                chunk: Chunk = json.loads(line)
                if "error" in chunk and "id" not in chunk:  # a job that failed has more to say
                    raise TarsError(chunk["error"])
                yield chunk


def _checked(response: "httpx.Response") -> Chunk:
    try:
        answer: Chunk = response.json()
    except ValueError:
        raise TarsError(f"the server answers {response.status_code} {response.reason_phrase}") from None
    if response.is_error:
        raise (ModelNotFound if response.status_code == 404 else TarsError)(answer.get("error", response.text))
    return answer


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    """A server that dies or hangs up is an expected error."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        raise TarsError(f"the connection to the server is lost: {error}") from None


def find_server(settings: "Settings") -> ServerBackend | None:
    """The TARS server at OLLAMA_HOST, None if there is none; another program that speaks the API is not meant."""
    import httpx

    client = httpx.Client(base_url=settings.address.url, timeout=httpx.Timeout(None, connect=0.2), trust_env=False)
    try:
        if client.head("/", timeout=0.2).headers.get("server") == "tars":
            return ServerBackend(client)
    except httpx.HTTPError:
        pass
    client.close()
    return None


class LocalBackend:
    """The engine in this process, without HTTP: the same generators the server streams."""

    def __init__(self, models: "Models") -> None:
        self._models = models
        self._runner = asyncio.Runner()

    def has(self, model: str) -> bool:
        try:
            self._models.store.find(model)
        except ModelNotFound:
            return False
        return True

    def pull(self, model: str) -> Iterator[Chunk]:
        from tars_jax.hub import pull

        return pull(model, self._models.store)

    def chat(self, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        from api.decode import decode
        from api.ollama import chat_chunks
        from api.schema import ChatRequest

        request = decode(ChatRequest, json.dumps(body).encode())
        return self._iterate(chat_chunks(self._models, request))

    def _iterate(self, chunks: AsyncGenerator[Chunk, None]) -> Generator[Chunk, None, None]:
        """An async generator, run step by step; the engine works on in its own thread between the steps."""

        async def step() -> Chunk | None:
            return await anext(chunks, None)

        async def close() -> None:
            await chunks.aclose()

        try:
            while (chunk := self._runner.run(step())) is not None:
                yield chunk
        finally:
            self._runner.run(close())

    def show(self, model: str) -> Chunk:
        from api.catalog import show

        return show(self._models.store, model)

    def names(self) -> list[str]:
        return [stored.name.short() for stored in self._models.store.models()]

    def close(self) -> None:
        self._runner.run(self._models.close())
        self._runner.close()


def open_backend(settings: "Settings") -> Backend:
    """A running server if there is one, else this process."""
    return find_server(settings) or open_local(settings)


def open_local(settings: "Settings", adapters: Sequence[Path] = ()) -> LocalBackend:
    """This process; its models get these adapters."""
    from api.models import Models, load_model
    from tars_jax.store import Store

    def load(stored: "StoredModel", store: "Store", engine: EngineConfig) -> "Model":
        with load_bar(f"loading {stored.name.short()}") as progress:
            return load_model(stored, store, engine, progress, adapters)

    def make_engine(model: "Model", config: EngineConfig) -> "Engine":
        from tars_jax.engine.engine import Engine

        return Engine(model, config)  # one user, soon gone: nothing is compiled ahead

    return LocalBackend(Models(Store(settings.models), settings, load=load, make_engine=make_engine))
