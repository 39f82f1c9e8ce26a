"""A web server on this machine that plays Ollama's registry and Hugging Face, and a pull from it."""

import hashlib
import http.server
import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from tars_jax.errors import ModelFileError
from tars_jax.hub import pull
from tars_jax.hub.catalog import parse_catalog
from tars_jax.store import Store

GGUF = b"GGUF" + bytes(range(256)) * 1200  # 307 kB
CONFIG = b'{"model_format":"gguf","model_family":"llama"}'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Web:
    """A web server of fixed files, which can break off, stall, ignore ranges and redirect."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.cuts: dict[str, list[int]] = {}  # bytes the next answers send before they break off
        self.stalls: dict[str, int] = {}  # bytes sent before the answer stands still
        self.ranges = True
        self.log: list[tuple[str, str | None]] = []  # path, Range header
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, *args: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, range_header = request.path.partition("?")[0], request.headers["Range"]
        self.log.append((path, range_header))
        self.headers.append(dict(request.headers))
        if path in self.redirects:
            request.send_response(307)
            request.send_header("Location", self.redirects[path])
            request.end_headers()
            return
        if path not in self.files:
            request.send_error(404)
            return
        start = int(range_header[6:-1]) if range_header and self.ranges else 0
        body = self.files[path][start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.cuts.get(path):
            body = body[: self.cuts[path].pop(0)]
        request.wfile.write(body[: self.stalls.get(path)])
        if path in self.stalls:
            self.released.wait(20)

    def add_model(self, model: bytes = GGUF, path: str = "library/tiny", tag: str = "latest") -> str:
        """Serve a model as Ollama's registry does; returns the path of its model blob."""
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{sha256(model)}", "size": len(model)}]
        config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": f"sha256:{sha256(CONFIG)}", "size": len(CONFIG)}
        manifest = {"schemaVersion": 2, "config": config, "layers": layers}
        self.files[f"/v2/{path}/manifests/{tag}"] = json.dumps(manifest, indent=3).encode()
        for data in (model, CONFIG):
            self.files[f"/v2/{path}/blobs/sha256:{sha256(data)}"] = data
        return f"/v2/{path}/blobs/sha256:{sha256(model)}"

    def add_repository(self, files: dict[str, bytes], repo: str = "me/tiny-GGUF") -> None:
        """Serve a repository as Hugging Face does."""
        siblings = [
            {"rfilename": name, "size": len(data), "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
            for name, data in files.items()
        ]
        info = {"id": repo, "sha": "c0ffee", "siblings": siblings, "cardData": {"license": "mit"}, "tags": [], "downloads": 0}
        self.files[f"/api/models/{repo}/revision/main"] = json.dumps(info).encode()
        for name, data in files.items():
            self.files[f"/{repo}/resolve/c0ffee/{name}"] = data

    def __enter__(self) -> "Web":
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def replace_gguf_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of GGUF headers that knows one model: these tests are about moving bytes."""

    def open_gguf(path: Path) -> types.SimpleNamespace:
        if path.read_bytes()[:4] != b"GGUF":
            raise ModelFileError(f"{path}: no GGUF file")
        metadata = {"general.architecture": "llama", "general.file_type": 3}
        return types.SimpleNamespace(metadata=metadata, tensors={"w": types.SimpleNamespace(shape=(269, 500_000))})

    monkeypatch.setitem(sys.modules, "tars_jax.loaders.gguf", types.SimpleNamespace(open_gguf=open_gguf))


def environ(web: Web, **more: str) -> dict[str, str]:
    return {"TARS_REGISTRY": web.url, "HF_ENDPOINT": web.url, **more}


def run(name: str, store: Store, web: Web, catalog: str = "", **more: str) -> list[dict[str, Any]]:
    return list(pull(name, store, catalog=parse_catalog(catalog), environ=environ(web, **more)))


def statuses(events: list[dict[str, Any]]) -> list[str]:
    """Statuses without repetition."""
    return list(dict.fromkeys(event["status"] for event in events))
