"""A model whose answers are known beforehand: it says the words of a canned text, a token a word."""

import contextlib
import dataclasses
import functools
import re
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.applications import Starlette

from api.models import Models
from api.settings import Settings
from tars_jax.chat import ChatTemplate
from tars_jax.config import EngineConfig
from tars_jax.engine.request import Output, Request, TokenLogprob, Usage
from tars_jax.engine.stats import EngineStats
from tars_jax.errors import ContextOverflow
from tars_jax.store import Store, StoredModel

ANSWER = "one two three four five"
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
USAGE = Usage(prompt_tokens=0, output_tokens=0, queue_seconds=0.001, prefill_seconds=0.25, decode_seconds=0.5)


class FakeTokenizer:
    """A token is a word with the white space after it."""

    bos_id = eos_id = None
    add_eos = False

    def __init__(self) -> None:
        self._words: list[str] = []

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool | None = None) -> list[int]:
        return [self._id(word) for word in re.findall(r"\s*\S+\s*", text)]

    def _id(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def token_bytes(self, token_id: int) -> bytes:
        return self._words[token_id].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._words[i] for i in ids)


@dataclasses.dataclass
class FakeModel:
    """What the API needs to know of a model, and what its engine will say."""

    answer: str = ANSWER
    template: str = TEMPLATE
    delay: float = 0.0  # seconds a token
    error: str = ""  # what the engine fails with after the first token
    timeout_after: int | None = None  # tokens
    context_length: int = 8192

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(context_length=self.context_length)
        self.tokenizer = FakeTokenizer()
        self.chat_template = ChatTemplate(self.template)
        self.nbytes = 1000


class FakeEngine:
    """Says the model's answer from a thread of its own, as the real one does."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.requests: list[Request] = []
        self.cancelled: set[int] = set()
        self.said = 0  # tokens
        self.weights_version = 1
        self.counted: dict[str, Any] = {}  # further numbers of its stats
        self.is_closed = False
        self._threads: list[threading.Thread] = []
        self._running: set[int] = set()

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) >= self.config.max_context:
            raise ContextOverflow(f"the prompt is {len(request.prompt_ids)} tokens long, but the context is {self.config.max_context}")
        self.requests.append(request)
        self._running.add(request.id)
        request = dataclasses.replace(request, sink=functools.partial(self._sink, request))
        thread = threading.Thread(target=self._say, args=(request,))
        self._threads.append(thread)
        thread.start()

    def _sink(self, request: Request, output: Output) -> None:
        if output.finish_reason:
            self._running.discard(request.id)  # before whoever waits for the end looks
        request.sink(output)

    def cancel(self, request_id: int) -> None:
        self.cancelled.add(request_id)

    def stats(self) -> Any:
        return EngineStats(
            running=len(self._running),
            waiting=0,
            num_pages=11,
            free_pages=8,
            nbytes=1500,
            weights_version=self.weights_version,
            compiled_steps=(1, 16),
            **self.counted,
        )

    def close(self) -> None:
        self.is_closed = True
        for thread in self._threads:
            thread.join()

    def prompts(self) -> list[str]:
        """The prompts it was given, as text."""
        return [self.model.tokenizer.decode(request.prompt_ids) for request in self.requests]

    def _say(self, request: Request) -> None:
        ids = self.model.tokenizer.encode(self.model.answer)
        reason = "stop"
        for count, token_id in enumerate(ids):
            if request.params.max_tokens is not None and count >= request.params.max_tokens:
                reason = "length"
                break
            time.sleep(self.model.delay)
            if self.is_closed or request.id in self.cancelled:
                request.sink(Output(finish_reason="cancelled", usage=USAGE))
                return
            if count == self.model.timeout_after:
                request.sink(Output(finish_reason="timeout", usage=USAGE))
                return
            text = self.model.tokenizer.decode([token_id])
            if text.strip() in request.params.stop:
                break
            if self.model.error and count:
                request.sink(Output(finish_reason="error", error=self.model.error))
                return
            self.said += 1
            logprobs = (TokenLogprob(token_id, -0.5, ((token_id, -0.5),)),) if request.params.logprobs else ()
            request.sink(Output(text=text, token_ids=(token_id,), logprobs=logprobs))
        else:
            count = len(ids)
        usage = dataclasses.replace(USAGE, prompt_tokens=len(request.prompt_ids), output_tokens=count)
        request.sink(Output(finish_reason=reason, usage=usage))


class FakeLoader:
    """Loads a fake model and remembers its engines; ``block`` holds loads back."""

    def __init__(self, model: FakeModel | None = None) -> None:
        self.model = model or FakeModel()
        self.engines: list[FakeEngine] = []
        self.loads = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def load(self, stored: StoredModel, store: Store, engine: EngineConfig) -> Any:
        self.gate.wait(5)
        self.loads += 1
        if self.error:
            raise self.error
        return self.model

    def make_engine(self, model: Any, config: EngineConfig) -> Any:
        self.engines.append(FakeEngine(model, config))
        return self.engines[-1]

    def models(self, store: Store, **settings: Any) -> Models:
        return Models(store, Settings(**settings), load=self.load, make_engine=self.make_engine)


def gguf_bytes(metadata: dict[str, str | int | list[str]]) -> bytes:
    """A GGUF file of metadata and one tensor of 2 x 3 zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: str | int | list[str]) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))

    pairs = b"".join(text(key) + typed(value) for key, value in metadata.items())
    tensor = text("output.weight") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata)) + pairs + tensor
    return header + bytes(-len(header) % 32) + bytes(24)


METADATA: dict[str, str | int | list[str]] = {
    "general.architecture": "llama",
    "general.name": "hidden",
    "general.file_type": 0,
    "llama.context_length": 2048,
    "llama.embedding_length": 3,
    "tokenizer.ggml.tokens": [str(i) for i in range(50)],
    "tokenizer.chat_template": TEMPLATE,
}


def make_store(root: Path, *names: str, **layers: str) -> Store:
    """A store with small models; ``layers`` are texts, e.g. ``system="Be brief."``."""
    store = Store(root)
    path = root / "model.gguf"
    root.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(METADATA))
    config = {"model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "model_type": "6", "file_type": "F32"}
    with path.open("rb") as file:
        model = store.add_layer("model", file)
    others = [store.add_layer(kind, text) for kind, text in layers.items()]
    for name in names or ("fake",):
        store.write_manifest(name, config, [model, *others])
    return store


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The app behind a real HTTP server; gives its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, server_header=False, loop="asyncio", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
