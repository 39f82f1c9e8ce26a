"""The HTTP API: plain answers through ASGI, streams and disconnects through a real server, and Ollama's own client."""

import asyncio
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from fakes import FakeLoader, FakeModel, make_store, serving

from api.app import create_app
from api.models import Models
from api.settings import Address, Settings
from tars_jax.store import Store

WORDS = [{"role": "user", "content": "hi"}]


class Server:
    """An app without a network: requests go straight in."""

    def __init__(self, store: Store, loader: FakeLoader | None = None, settings: Settings | None = None, **app: Any) -> None:
        self.loader = loader or FakeLoader()
        self.settings = settings or Settings()
        self.store, self._app = store, app

    def models(self) -> Models:
        return Models(self.store, self.settings, load=self.loader.load, make_engine=self.loader.make_engine)

    def requests(self, *requests: tuple[str, str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
        """Send (method, path, body) one after the other to a new app."""

        async def send() -> list[httpx.Response]:
            models = self.models()
            app = create_app(self.settings, models, **self._app)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                answers = []
                for method, path, body in requests:
                    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
                    answers.append(await client.request(method, path, content=content, headers=headers))
            await models.close()
            return answers

        return asyncio.run(send())

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.requests((method, path, body), headers=headers)[0]

    def generate(self, **body: Any) -> Any:
        return self.request("POST", "/api/generate", {"model": "fake", "stream": False, **body}).json()

    def chat(self, **body: Any) -> Any:
        return self.request("POST", "/api/chat", {"model": "fake", "stream": False, **body}).json()

    def prompts(self) -> list[str]:
        return [prompt for engine in self.loader.engines for prompt in engine.prompts()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path)


@pytest.fixture
def server(store: Store) -> Server:
    return Server(store)


def with_model(store: Store, **model: Any) -> Server:
    return Server(store, FakeLoader(FakeModel(**model)))


# generate and chat, whole


def test_generate(server: Server) -> None:
    answer = server.generate(prompt="hi there")
    assert (answer["model"], answer["response"], answer["done"], answer["done_reason"]) == ("fake", "one two three four five", True, "stop")
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (4, 5)
    assert (answer["prompt_eval_duration"], answer["eval_duration"]) == (250_000_000, 500_000_000)
    assert answer["total_duration"] >= answer["load_duration"] > 0
    assert len(answer["context"]) == 9
    assert datetime.datetime.fromisoformat(answer["created_at"]).tzinfo == datetime.UTC
    assert server.prompts() == ["<user> hi there\n<assistant>"]


def test_chat(server: Server) -> None:
    answer = server.chat(messages=WORDS)
    assert answer["message"] == {"role": "assistant", "content": "one two three four five"}
    assert answer["done_reason"] == "stop"
    assert "context" not in answer
    assert "response" not in answer


def test_model_is_echoed_as_sent(server: Server) -> None:
    assert server.generate(model="FAKE:latest", prompt="hi")["model"] == "FAKE:latest"


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [({"num_predict": 2}, "one two ", "length"), ({"stop": ["three"]}, "one two ", "stop"), ({"num_predict": 0}, "", "length")],
)
def test_how_answers_end(server: Server, options: dict[str, Any], text: str, reason: str) -> None:
    answer = server.generate(prompt="hi", options=options)
    assert (answer["response"], answer["done_reason"]) == (text, reason)


def test_raw_has_no_template_and_no_context(server: Server) -> None:
    assert "context" not in server.generate(prompt="as is", raw=True)
    assert server.prompts() == ["as is"]


def test_context_goes_before_the_prompt(server: Server) -> None:
    first = server.generate(prompt="hi")["context"]
    server.generate(prompt="again", context=first)
    assert server.prompts()[1] == "<user> hi\n<assistant>one two three four five<user> again\n<assistant>"


def test_system_and_messages_of_the_model(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    server = Server(make_store(tmp_path, system="Be brief.", messages=json.dumps(messages)))
    server.generate(prompt="hi")
    server.generate(prompt="hi", system="Be long.")
    server.chat(messages=WORDS)
    server.chat(messages=[{"role": "system", "content": "Mine."}, *WORDS])
    whole, own, chat, chat_own = server.prompts()
    assert whole == chat == "<system> Be brief.\n<user> q\n<assistant> a\n<user> hi\n<assistant>"
    assert own.startswith("<system> Be long.")
    assert chat_own == "<user> q\n<assistant> a\n<system> Mine.\n<user> hi\n<assistant>"


def test_parameters_of_the_model(tmp_path: Path) -> None:
    server = Server(make_store(tmp_path, params=json.dumps({"num_predict": 1, "temperature": 0.1})))
    assert server.generate(prompt="hi")["response"] == "one "
    assert server.generate(prompt="hi", options={"num_predict": 2})["response"] == "one two "
    assert server.loader.engines[0].requests[0].params.temperature == 0.1


def test_jinja_template_of_a_request(server: Server) -> None:
    server.generate(prompt="hi", template="Q: {{ messages[0].content }} A:")
    assert server.prompts() == ["Q: hi A:"]


def test_go_templates_of_the_store_are_passed_over(tmp_path: Path) -> None:
    server = Server(make_store(tmp_path, template="{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}"))
    server.generate(prompt="hi")
    assert server.prompts() == ["<user> hi\n<assistant>"]


def test_debug_render_only(server: Server) -> None:
    answer = server.chat(messages=WORDS, _debug_render_only=True)
    assert answer["_debug_info"] == {"rendered_template": "<user> hi\n<assistant>", "image_count": 0}
    assert server.prompts() == []


def test_format_constrains(server: Server) -> None:
    server.generate(prompt="hi", format={"type": "object"})
    assert server.loader.engines[0].requests[0].params.grammar == '{"type": "object"}'


def test_logprobs(server: Server) -> None:
    answer = server.generate(prompt="hi", logprobs=True, top_logprobs=1, options={"num_predict": 1})
    token = {"token": "one ", "logprob": -0.5, "bytes": list(b"one ")}
    assert answer["logprobs"] == [{**token, "top_logprobs": [token]}]


@pytest.mark.parametrize("endpoint", ["generate", "chat"])
def test_load_and_unload(server: Server, endpoint: str) -> None:
    load, ps, unload, empty = server.requests(
        ("POST", f"/api/{endpoint}", {"model": "fake"}),
        ("GET", "/api/ps", None),
        ("POST", f"/api/{endpoint}", {"model": "fake", "keep_alive": 0}),
        ("GET", "/api/ps", None),
    )
    for answer, reason in ((load, "load"), (unload, "unload")):
        assert answer.headers["content-type"] == "application/json; charset=utf-8"
        body = answer.json()
        shape = {"response": ""} if endpoint == "generate" else {"message": {"role": "assistant", "content": ""}}
        assert body == {"model": "fake", "created_at": body["created_at"], **shape, "done": True, "done_reason": reason}
    assert [model["name"] for model in ps.json()["models"]] == ["fake:latest"]
    assert empty.json() == {"models": []}


def test_old_turns_are_dropped(store: Store) -> None:
    server = with_model(store)
    turns = [{"role": "system", "content": "s"}] + [{"role": "user", "content": f"{i} x x x"} for i in range(6)]
    server.chat(messages=turns, options={"num_ctx": 16})
    # <system> s, <user> 4 x x x, <user> 5 x x x and <assistant> are 13 tokens; one turn more would be 18
    assert server.prompts() == ["<system> s\n<user> 4 x x x\n<user> 5 x x x\n<assistant>"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x " * 50}]},
        {"messages": [{"role": "user", "content": "x " * 50}] * 2},
        {"messages": [{"role": "user", "content": "x"}] * 20, "truncate": False},
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(server: Server, body: dict[str, Any]) -> None:
    answer = server.request("POST", "/api/chat", {"model": "fake", "options": {"num_ctx": 16}, **body})
    assert answer.status_code == 400
    assert "16" in answer.json()["error"]


def test_a_shift_keeps_the_ends_of_a_prompt_that_does_not_fit(server: Server) -> None:
    words = [f"w{i}" for i in range(40)]
    server.generate(prompt=" ".join(words), raw=True, shift=True, options={"num_ctx": 16, "num_keep": 4})
    assert server.prompts() == [" ".join(words[:4] + words[-6:])]
    assert server.loader.engines[0].requests[0].params.shift


def test_without_a_shift_nothing_is_cut(server: Server) -> None:
    body = {"model": "fake", "prompt": "x " * 50, "options": {"num_ctx": 16}}
    answer = server.request("POST", "/api/generate", body)
    assert answer.status_code == 400
    assert "16" in answer.json()["error"]


def test_a_shift_that_must_keep_everything_is_refused(server: Server) -> None:
    body = {"model": "fake", "prompt": "x " * 50, "shift": True, "options": {"num_ctx": 16, "num_keep": -1}}
    assert server.request("POST", "/api/generate", body).status_code == 400


def test_a_shift_cuts_a_last_message_that_does_not_fit(server: Server) -> None:
    server.chat(messages=[{"role": "user", "content": "x " * 50}], shift=True, options={"num_ctx": 16, "num_keep": 2})
    (prompt,) = server.prompts()
    assert prompt.startswith("<user> x")
    assert prompt.endswith("<assistant>")


# tools and thinking

TOOL_TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{{ messages[-1].content }} <tool_call>"
THINK_TEMPLATE = "{{ messages[-1].content }}{% if enable_thinking is false %} <think>\n\n</think>\n\n{% endif %}"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tool_calls(store: Store) -> None:
    server = with_model(store, template=TOOL_TEMPLATE, answer='Sure. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    message = server.chat(messages=WORDS, tools=[ADD])["message"]
    assert message["content"].strip() == "Sure."
    (call,) = message["tool_calls"]
    assert call["function"] == {"index": 0, "name": "add", "arguments": {"a": 1}}
    assert call["id"].startswith("call_")
    assert len(call["id"]) == len("call_") + 8


def test_thinking_is_told_apart(store: Store) -> None:
    server = with_model(store, template=THINK_TEMPLATE, answer="<think> hm </think> well")
    message = server.chat(messages=WORDS)["message"]
    assert (message["thinking"].strip(), message["content"].strip()) == ("hm", "well")
    answer = server.generate(prompt="hi")
    assert (answer["thinking"].strip(), answer["response"].strip()) == ("hm", "well")


def test_think_false_reaches_the_template(store: Store) -> None:
    server = with_model(store, template=THINK_TEMPLATE, answer="well")
    assert server.chat(messages=WORDS, think=False)["message"] == {"role": "assistant", "content": "well"}
    assert "</think>" in server.prompts()[0]


def test_a_grammar_holds_only_after_the_thinking(store: Store) -> None:
    server = with_model(store, template=THINK_TEMPLATE, answer="hm </think> well")
    answer = server.chat(messages=WORDS, format="json", options={"num_predict": 9})
    free, held = server.loader.engines[0].requests
    assert (free.params.grammar, free.params.stop, held.params.grammar) == (None, ("</think>",), "json")
    assert server.prompts() == ["hi<think>\n", "hi<think>\nhm </think>"]
    assert answer["message"]["thinking"].strip() == "hm"
    assert answer["eval_count"] == 1 + 3  # the fake says the whole of its text again


# errors


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("generate", {}, 404, "model '' not found"),
        ("generate", {"model": "nobody"}, 404, "model 'nobody' not found"),
        ("generate", {"model": "m:"}, 400, "invalid model name"),
        ("generate", {"prompt": "x", "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
        ("generate", {"prompt": "x", "raw": True, "system": "s"}, 400, "raw mode does not support template, system, or context"),
        ("generate", {"prompt": "x", "suffix": "s"}, 400, "registry.ollama.ai/library/fake:latest does not support insert"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, 400, "registry.ollama.ai/library/fake:latest does not support images"),
        ("generate", {"prompt": "x", "think": True}, 400, '"fake" does not support thinking'),
        ("generate", {"prompt": "x", "options": {"num_predict": "5"}}, 500, 'option "num_predict" must be of type integer'),
        ("generate", {"prompt": "x", "format": "xml"}, 500, 'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object'),
        ("generate", {"prompt": "x", "keep_alive": "300"}, 400, 'time: missing unit in duration "300"'),
        ("chat", {}, 400, "model is required"),
        ("chat", {"model": "nobody"}, 404, "model 'nobody' not found"),
        ("chat", {"messages": WORDS, "tools": [ADD]}, 400, "registry.ollama.ai/library/fake:latest does not support tools"),
        ("chat", {"messages": WORDS, "think": "high"}, 400, '"fake" does not support thinking'),
        ("show", {}, 400, "model is required"),
        ("show", {"model": "Nobody"}, 404, "model 'Nobody:latest' not found"),
        ("pull", {}, 400, "model is required"),
        ("pull", {"model": "m:"}, 400, "invalid model name"),
        ("copy", {"source": "nobody", "destination": "d"}, 404, 'model "nobody" not found'),
        ("copy", {"source": "/m", "destination": "d"}, 400, 'source "/m" is invalid'),
        ("copy", {"source": "fake", "destination": "d:"}, 400, 'destination "d:" is invalid'),
    ],
)
def test_errors(server: Server, path: str, body: dict[str, Any], status: int, text: str) -> None:
    if path in ("generate", "chat") and body:
        body = {"model": "fake", **body}
    answer = server.request("POST", f"/api/{path}", body)
    assert (answer.status_code, answer.json()) == (status, {"error": text})
    assert answer.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [({}, 400, "model is required"), ({"model": "nobody"}, 404, "model 'nobody' not found"), ({"name": "m:"}, 400, 'name "m:" is invalid')],
)
def test_delete_errors(server: Server, body: dict[str, Any], status: int, text: str) -> None:
    answer = server.request("DELETE", "/api/delete", body)
    assert (answer.status_code, answer.json()) == (status, {"error": text})


def test_go_templates_of_requests_are_refused(server: Server) -> None:
    assert "Go templates" in server.generate(prompt="x", template="{{ .Prompt }}")["error"]


def test_bodies_have_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.ollama.MAX_BODY", 10)
    assert server.request("POST", "/api/generate", b"x" * 11).status_code == 413


def test_unexpected_errors_tell_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.loader.error = RuntimeError("secret path")
    answer = server.request("POST", "/api/generate", {"model": "fake", "prompt": "x"})
    assert (answer.status_code, answer.json()) == (500, {"error": "internal server error, see the server's log"})
    assert "secret path" in caplog.text


def test_engine_failure_is_500_and_then_a_line(store: Store) -> None:
    server = with_model(store, error="out of memory")
    whole = server.request("POST", "/api/generate", {"model": "fake", "prompt": "x", "stream": False})
    assert (whole.status_code, whole.json()) == (500, {"error": "out of memory"})
    stream = server.request("POST", "/api/generate", {"model": "fake", "prompt": "x"})
    assert stream.status_code == 200
    assert json.loads(stream.text.splitlines()[-1]) == {"error": "out of memory"}


# the other endpoints


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "text"), [("/", "Ollama is running"), ("/api/version", '{"version":"0.33.0"}')])
def test_liveness(server: Server, method: str, path: str, text: str) -> None:
    answer = server.request(method, path)
    assert (answer.status_code, answer.headers["server"]) == (200, "tars")
    assert method == "HEAD" or answer.text == text


def test_tags(server: Server) -> None:
    (model,) = server.request("GET", "/api/tags").json()["models"]
    assert model["name"] == model["model"] == "fake:latest"
    assert len(model["digest"]) == 64
    assert model["details"]["quantization_level"] == "F32"
    assert server.request("HEAD", "/api/tags").status_code == 200


def test_tags_of_nothing(tmp_path: Path) -> None:
    assert Server(Store(tmp_path)).request("GET", "/api/tags").json() == {"models": []}


def test_show(tmp_path: Path) -> None:
    layers = {"system": "Be brief.", "license": "MIT", "params": json.dumps({"stop": ["a", "b"], "temperature": 1})}
    server = Server(make_store(tmp_path, **layers))
    shown = server.request("POST", "/api/show", {"name": "FAKE"}).json()
    info = shown["model_info"]
    assert (info["general.parameter_count"], info["llama.context_length"], info["tokenizer.ggml.tokens"]) == (6, 2048, None)
    assert "general.name" not in info
    assert shown["tensors"] == [{"name": "output.weight", "type": "F32", "shape": [3, 2]}]
    assert (shown["capabilities"], shown["license"], shown["system"]) == (["completion"], "MIT", "Be brief.")
    assert shown["parameters"].splitlines()[:2] == [f'{"stop":<30} "a"', f'{"stop":<30} "b"']
    assert "# FROM fake:latest" in shown["modelfile"]
    verbose = server.request("POST", "/api/show", {"model": "fake", "verbose": True}).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == 50


def test_ps(server: Server) -> None:
    _, ps = server.requests(("POST", "/api/generate", {"model": "fake", "keep_alive": "10m"}), ("GET", "/api/ps", None))
    (model,) = ps.json()["models"]
    assert (model["name"], model["size"], model["size_vram"], model["context_length"]) == ("fake:latest", 1500, 0, 4096)
    left = datetime.datetime.fromisoformat(model["expires_at"]) - datetime.datetime.now(datetime.UTC)
    assert 590 < left.total_seconds() <= 600


def test_copy_and_delete(server: Server) -> None:
    copy, delete, tags = server.requests(
        ("POST", "/api/copy", {"source": "fake", "destination": "twin"}),
        ("DELETE", "/api/delete", {"model": "fake"}),
        ("GET", "/api/tags", None),
    )
    assert (copy.status_code, copy.content, delete.status_code, delete.content) == (200, b"", 200, b"")
    assert [model["name"] for model in tags.json()["models"]] == ["twin:latest"]


def pull_fine(name: str, store: Store, *, insecure: bool) -> Iterator[dict[str, Any]]:
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


def pull_badly(name: str, store: Store, *, insecure: bool) -> Iterator[dict[str, Any]]:
    from tars_jax.errors import PullError

    yield {"status": "pulling manifest"}
    raise PullError("nobody has it")


def test_pull(store: Store) -> None:
    server = Server(store, pull=pull_fine)
    stream = server.request("POST", "/api/pull", {"model": "m"})
    assert [json.loads(line)["status"] for line in stream.text.splitlines()] == ["pulling manifest", "success"]
    assert server.request("POST", "/api/pull", {"model": "m", "stream": False}).json() == {"status": "success"}


def test_pull_that_fails(store: Store) -> None:
    server = Server(store, pull=pull_badly)
    stream = server.request("POST", "/api/pull", {"model": "m"})
    assert json.loads(stream.text.splitlines()[-1]) == {"error": "nobody has it"}
    whole = server.request("POST", "/api/pull", {"model": "m", "stream": False})
    assert (whole.status_code, whole.json()) == (500, {"error": "nobody has it"})


def test_health(server: Server) -> None:
    _, health = server.requests(("POST", "/api/generate", {"model": "fake"}), ("GET", "/health", None))
    assert health.json() == {"status": "ok", "models": ["fake:latest"], "queue": 0}


def test_metrics(server: Server) -> None:
    _, metrics = server.requests(("POST", "/api/generate", {"model": "fake", "prompt": "hi"}), ("GET", "/metrics", None))
    assert metrics.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    model = 'model_name="fake:latest"'
    expected = {
        f'vllm:request_success_total{{finished_reason="stop",{model}}}': 1,
        f"vllm:prompt_tokens_total{{{model}}}": 3,
        f"vllm:generation_tokens_total{{{model}}}": 5,
        f"vllm:time_to_first_token_seconds_count{{{model}}}": 1,
        f"vllm:inter_token_latency_seconds_count{{{model}}}": 4,
        f"vllm:e2e_request_latency_seconds_count{{{model}}}": 1,
        f"tars_model_load_seconds_count{{{model}}}": 1,
        f"vllm:num_requests_waiting{{{model}}}": 0,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert float(values[f"vllm:kv_cache_usage_perc{{{model}}}"]) == pytest.approx(0.2)


# HTTP manners


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/nowhere", 404, "404 page not found"),
        ("GET", "/nowhere/", 404, "404 page not found"),
        ("GET", "/api/chat", 405, "405 method not allowed"),
        ("POST", "/api/tags", 405, "405 method not allowed"),
        ("HEAD", "/api/ps", 405, ""),
    ],
)
def test_unknown_paths_and_methods(server: Server, method: str, path: str, status: int, text: str) -> None:
    answer = server.request(method, path)
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (status, "text/plain")
    assert method == "HEAD" or answer.text == text
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/api/tags/?a=1", 301), ("POST", "/api/chat/", 307)])
def test_trailing_slashes_redirect(server: Server, method: str, path: str, status: int) -> None:
    answer = server.request(method, path)
    assert (answer.status_code, answer.headers["location"]) == (status, path.replace("/?", "?").rstrip("/"))


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("app://x", 200),
        ("http://evil.example", 403),
        ("http://localhost.evil", 403),
    ],
)
def test_origins(server: Server, origin: str, status: int) -> None:
    answer = server.request("GET", "/api/version", headers={"Origin": origin})
    assert answer.status_code == status
    if status == 200:
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (origin, "Origin")
    else:
        assert answer.content == b""


def test_preflight(server: Server) -> None:
    answer = server.request("OPTIONS", "/api/chat", headers={"Origin": "http://localhost:3000"})
    assert (answer.status_code, answer.headers["access-control-max-age"]) == (204, "43200")
    assert "x-stainless-retry-count" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize(("origins", "answer"), [(("*",), "*"), (("http://*.example",), "http://a.example")])
def test_configured_origins(store: Store, origins: tuple[str, ...], answer: str) -> None:
    server = Server(store, settings=Settings(origins=origins))
    assert server.request("GET", "/", headers={"Origin": "http://a.example"}).headers["access-control-allow-origin"] == answer


def test_the_same_origin_needs_no_cors(server: Server) -> None:
    answer = server.request("GET", "/", headers={"Host": "me.local", "Origin": "http://me.local"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:11434", 200),
        ("127.0.0.1", 200),
        ("[::1]:1", 200),
        ("192.168.0.5", 200),
        ("a.localhost", 200),
        ("evil.example", 403),
        ("8.8.8.8", 403),
    ],
)
def test_rebound_hosts(server: Server, host: str, status: int) -> None:
    assert server.request("GET", "/", headers={"Host": host}).status_code == status


def test_hosts_are_free_when_the_server_is_public(store: Store) -> None:
    server = Server(store, settings=Settings(address=Address(host="0.0.0.0")))
    assert server.request("GET", "/", headers={"Host": "public.example"}).status_code == 200


# a real server


def test_streams(store: Store) -> None:
    server = with_model(store)
    with serving(create_app(server.settings, server.models())) as url:
        answer = httpx.post(f"{url}/api/generate", json={"model": "fake", "prompt": "hi"})
    chunks = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [chunk["response"] for chunk in chunks] == ["one ", "two ", "three ", "four ", "five", ""]
    assert [chunk["done"] for chunk in chunks] == [False] * 5 + [True]
    assert all(set(chunk) == {"model", "created_at", "response", "done"} for chunk in chunks[:-1])
    assert answer.headers["server"] == "tars"


def leave_early(url: str, body: dict[str, Any]) -> None:
    """Ask, and go away after 0.2 s without a byte, or after three lines."""
    with httpx.Client() as client, client.stream("POST", url, json=body, timeout=0.2) as answer:
        for count, _ in enumerate(answer.iter_lines()):
            if count == 2:
                raise httpx.ReadTimeout("enough")


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(store: Store, stream: bool) -> None:
    server = with_model(store, answer="word " * 500, delay=0.01)
    with serving(create_app(server.settings, server.models())) as url:
        with pytest.raises(httpx.ReadTimeout):
            leave_early(f"{url}/api/generate", {"model": "fake", "prompt": "x", "stream": stream})
        (engine,) = server.loader.engines
        deadline = time.monotonic() + 2
        while engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 0 < engine.said < 300


def test_the_ollama_client(store: Store) -> None:
    server = with_model(store)
    with serving(create_app(server.settings, server.models())) as url:
        client = ollama.Client(url)
        try:
            assert client.generate("fake", "hi").response == "one two three four five"
            assert [part.response for part in client.generate("fake", "hi", stream=True)][:2] == ["one ", "two "]
            assert client.chat("fake", WORDS).message.content == "one two three four five"
            parts = list(client.chat("fake", WORDS, stream=True, options={"num_predict": 2}))
            assert ("".join(part.message.content or "" for part in parts), parts[-1].done_reason) == ("one two ", "length")
            assert [model.model for model in client.list().models] == ["fake:latest"]
            assert client.show("fake").details.family == "llama"
            assert [model.name for model in client.ps().models] == ["fake:latest"]
            assert client.copy("fake", "twin").status == "success"
            assert client.delete("twin").status == "success"
            with pytest.raises(ollama.ResponseError, match="model 'nobody' not found"):
                client.chat("nobody", WORDS)
        finally:
            client._client.close()
