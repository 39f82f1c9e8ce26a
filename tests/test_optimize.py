"""Evolving a model that is being served, over HTTP: what is refused, how jobs go, and that clients notice nothing but better answers."""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeLoader, make_store, serving
from typer.testing import CliRunner

from api.app import create_app
from api.models import Models
from api.settings import Settings
from tars_jax import Engine, EngineConfig
from tars_jax.adapters import apply_adapter
from tars_jax.cli import make_app
from tars_jax.engine import threads
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.opening import read_adapter
from tars_jax.store import Store, StoredModel
from tests.tiny import TinyTokenizer, tiny_model

WORDS = [a + b for a in ("al", "bra", "char", "del", "ech") for b in ("pha", "vo", "lie", "ta")]
TASK = [{"prompt": f"{word}:", "completion": "y"} for word in WORDS]
DATA, HELD_OUT = TASK[:12], TASK[12:]
SEARCH = {"data": DATA, "eval": HELD_OUT, "layers": "all", "population": 16, "batch": 6, "sigma": 0.1, "lr": 0.2}
ENDLESS = {**SEARCH, "target": 2.0, "seconds": 600}


class Printable(TinyTokenizer):
    add_eos = False

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [max(byte - 32, 0) for byte in text.encode("ascii", "replace")]


def tiny_store(root: Path) -> Store:
    """With a model "fake" of which the header is in a file."""
    sizes = {"context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    tensors = {"token_embd.weight": np.zeros((96, 64), np.float32), "blk.0.ffn_gate.weight": np.zeros((96, 64), np.float32)}
    write_gguf(root / "base.gguf", {"general.architecture": "llama"} | {f"llama.{key}": size for key, size in sizes.items()}, tensors)
    store = Store(root)
    with (root / "base.gguf").open("rb") as file:
        store.write_manifest("fake", {"model_format": "gguf", "model_family": "llama"}, [store.add_layer("model", file)])
    return store


def tiny_app(store: Store) -> Any:
    """A server of real engines, small ones: steps of 1, 2 and 4 tokens are all there is to compile."""

    def load(stored: StoredModel, *_: Any) -> Any:
        model = dataclasses.replace(tiny_model(scale=1.0), tokenizer=Printable())
        for path in stored.adapter_paths:
            model = dataclasses.replace(model, params=apply_adapter(model.params, read_adapter(path, model.config)))
        return model

    def make_engine(model: Any, config: EngineConfig) -> Engine:
        return Engine(model, EngineConfig(max_context=config.max_context, max_rows=2, max_step_tokens=4))

    models = Models(store, Settings(), load=load, make_engine=make_engine)
    return create_app(models.settings, models)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(store: Store) -> Iterator[httpx.Client]:
    """Of a server with a real, tiny model."""
    with pytest.MonkeyPatch.context() as patch, serving(tiny_app(store)) as url:
        patch.setattr(threads, "NICE", 0)  # what else runs on the machine must not starve the tests
        with httpx.Client(base_url=url, timeout=300) as client:
            yield client


def say(client: httpx.Client, prompt: str, tokens: int = 1, model: str = "fake", **options: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "raw": True, "options": {"temperature": 0, "num_predict": tokens, **options}}
    lines = client.post("/api/generate", json=body).text.splitlines()
    chunks = [json.loads(line) for line in lines]
    return {**chunks[-1], "response": "".join(chunk["response"] for chunk in chunks)}


def versions(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/api/versions", params={"model": "fake"}).json()
    return found


def begin(client: httpx.Client, **body: Any) -> str:
    """Start a job, see its first line, and leave."""
    with client.stream("POST", "/api/optimize", json={"model": "fake", **ENDLESS, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        first = json.loads(next(answer.iter_lines()))
    assert (first["model"], first["done"]) == ("fake", False)
    return str(first["id"])


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


# What is refused, by a server whose model does nothing.


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"data": DATA}, 400, "model is required"),
        ({"model": "other", "data": DATA}, 404, "model 'other' not found"),
        ({"model": "fake"}, 400, "data is required"),
        ({"model": "fake", "data": "x"}, 400, "cannot unmarshal string into Go struct field OptimizeRequest.data of type []map"),
        ({"model": "fake", "data": DATA, "sigma": "x"}, 400, "cannot unmarshal string into Go struct field OptimizeRequest.sigma"),
        ({"model": "fake", "data": DATA, "accept": "maybe"}, 400, 'accept must be "auto" or "never"'),
        ({"model": "fake", "data": DATA, "fitness": "os:system"}, 400, 'fitness must be "label", "exact" or "json"'),
        ({"model": "fake", "data": DATA, "fitness": "regex:(a+)+$"}, 400, "fitness must be"),
        ({"model": "fake", "data": DATA, "strategy": "luck"}, 400, "strategy must be one of eggroll"),
        ({"model": "fake", "data": DATA, "space": "luck"}, 400, "space must be one of low-rank, gains, steering"),
        ({"model": "fake", "data": DATA, "space": "sampler"}, 400, "sampler settings are not searched beside serving"),
        ({"model": "fake", "data": DATA, "population": 5}, 400, "population must be an even number"),
        ({"model": "fake", "data": DATA, "population": 2048}, 400, "population must be at most 1024"),
        ({"model": "fake", "data": DATA, "rank": 65}, 400, "rank must be at most 64"),
        ({"model": "fake", "data": DATA * 1000}, 400, "data must be at most 10000"),
        ({"model": "fake", "data": DATA, "eval": DATA * 100}, 400, "eval must be at most 1000"),
        ({"model": "fake", "data": DATA, "seconds": 0}, 400, "seconds must be above 0"),
        ({"model": "fake", "data": DATA, "generations": 0}, 400, "generations must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(client: httpx.Client, body: dict[str, Any], status: int, message: str) -> None:
    answer = client.post("/api/optimize", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert client.get("/api/optimize").json()["jobs"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [*DATA, {"prompt": "x"}]}, 'line 13 has no "completion"'),
        ({"eval": [{"prompt": "x" * 250, "completion": "y" * 50}]}, "line 1 has 300 tokens"),
        ({"data": DATA[:1], "eval": []}, "one example cannot be both"),
        ({"layers": "7"}, "no such layers"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_with_a_status(client: httpx.Client, changes: dict[str, Any], message: str) -> None:
    answer = client.post("/api/optimize", json={"model": "fake", **SEARCH, **changes})
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert client.get("/api/optimize").json()["jobs"] == []


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    settings = Settings(optimization=False)
    models = FakeLoader().models(make_store(tmp_path), optimization=False)
    with serving(create_app(settings, models)) as url:
        answer = httpx.post(f"{url}/api/optimize", json={"model": "fake", "data": DATA})
    assert answer.status_code == 403
    assert "TARS_OPTIMIZATION" in answer.json()["error"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_job(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/api/optimize/nothing")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no optimization job 'nothing'"})


def test_a_model_as_it_came_has_one_version(client: httpx.Client) -> None:
    found = versions(client)
    assert (found["current"], [version["kind"] for version in found["versions"]]) == (1, ["file"])
    answer = client.post("/api/versions/rollback", json={"model": "fake"})
    assert (answer.status_code, "no earlier version" in answer.json()["error"]) == (400, True)


# Under load.


def test_clients_notice_nothing_but_better_answers(client: httpx.Client) -> None:
    original = {item["prompt"]: say(client, item["prompt"], 8)["response"] for item in HELD_OUT}
    done, answers = threading.Event(), list[dict[str, Any]]()

    def talk(number: int) -> None:
        while not done.is_set():
            answers.append(say(client, f"client {number} says {len(answers)}", 24))
            time.sleep(0.01)

    with ThreadPoolExecutor(3) as pool:
        talks = [pool.submit(talk, number) for number in range(3)]
        try:
            job = client.post("/api/optimize", json={"model": "fake", "stream": False, "seconds": 120, "generations": 60, **SEARCH}).json()
        finally:
            done.set()
        for future in talks:
            future.result()

    assert job["status"] == "success", job
    before, after = job["result"]["before"], job["result"]["after"]
    assert after["score"] > before["score"]
    assert after["general_loss"] <= before["general_loss"] * 1.02
    assert len(answers) > 3
    assert {(answer["done_reason"], answer["eval_count"]) for answer in answers} == {("length", 24)}
    found = versions(client)
    assert found["current"] == job["version"] > 1
    assert found["versions"][-1] | {"kind": "optimized", "job": job["id"], "held_out_after": after["score"]} == found["versions"][-1]
    assert metric(client, "tars_optimization_swaps_total") == job["version"] - 1
    assert metric(client, "tars_optimization_generations_total") == job["generation"]
    assert metric(client, "tars_optimization_cycles_total") >= job["generation"]

    served = {prompt: say(client, prompt, 8)["response"] for prompt in original}
    assert sum(text[0] == "y" for text in served.values()) / len(served) == after["score"]

    back = client.post("/api/versions/rollback", json={"model": "fake", "version": 1}).json()
    assert (back["version"], back["kind"], back["source"]) == (job["version"] + 1, "rollback", 1)
    assert {prompt: say(client, prompt, 8)["response"] for prompt in original} == original


@pytest.mark.parametrize(
    "space", [{"space": "gains", "sigma": 0.1, "lr": 0.1}, {"space": "steering", "layers": "last:1", "sigma": 0.4, "lr": 0.4}], ids=str
)
def test_other_spaces_are_served_and_gone_back_from(client: httpx.Client, space: dict[str, Any]) -> None:
    first = client.post("/api/versions/rollback", json={"model": "fake", "version": 1}).json()["version"]
    original = [say(client, item["prompt"], 8)["response"] for item in HELD_OUT]
    body = {"model": "fake", "stream": False, "generations": 60, **SEARCH, **space}
    job = client.post("/api/optimize", json=body).json()
    assert (job["status"], job["result"]["accepted"]) == ("success", True), job
    assert versions(client)["current"] == job["version"] > first
    served = [say(client, item["prompt"], 8)["response"] for item in HELD_OUT]
    assert sum(text[0] == "y" for text in served) / len(served) == job["result"]["after"]["score"]
    back = client.post("/api/versions/rollback", json={"model": "fake"}).json()
    assert (back["kind"], back["version"]) == ("rollback", job["version"] + 1)
    client.post("/api/versions/rollback", json={"model": "fake", "version": first})
    assert [say(client, item["prompt"], 8)["response"] for item in HELD_OUT] == original


# Jobs.


def test_a_model_has_one_job_and_leaving_does_not_stop_it(client: httpx.Client) -> None:
    running = begin(client)
    other = client.post("/api/optimize", json={"model": "fake", **SEARCH})
    assert (other.status_code, running in other.json()["error"]) == (409, True)
    while client.get(f"/api/optimize/{running}").json()["generation"] < 3:
        time.sleep(0.02)
    assert running in [job["id"] for job in client.get("/api/optimize").json()["jobs"] if not job["done"]]
    stopped = client.delete(f"/api/optimize/{running}").json()
    assert (stopped["status"], stopped["done"], stopped["result"]["reason"]) == ("stopped", True, "it was stopped")
    assert client.delete(f"/api/optimize/{running}").json() == stopped


def test_progress_is_streamed_to_the_end(client: httpx.Client) -> None:
    answer = client.post("/api/optimize", json={"model": "fake", **SEARCH, "generations": 5, "accept": "never"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1] | {"status": "success", "generation": 5, "version": None} == lines[-1]
    assert lines[-1]["result"]["evaluations"] == 5 * 16
    assert "searching" in {line["status"] for line in lines}


def test_going_back_stops_the_job_that_would_undo_it(client: httpx.Client) -> None:
    running = begin(client)
    back = client.post("/api/versions/rollback", json={"model": "fake", "version": 1}).json()
    assert client.get(f"/api/optimize/{running}").json()["status"] == "stopped"
    assert versions(client)["current"] == back["version"]


def test_a_job_gives_way_to_requests_for_another_context(client: httpx.Client) -> None:
    running = begin(client)
    say(client, "x", num_ctx=128)
    job = client.get(f"/api/optimize/{running}").json()
    assert (job["status"], job["result"]["reason"]) == ("stopped", "its model had to leave")


def test_versions_outlive_a_stay_in_memory(client: httpx.Client) -> None:
    best = next(version for version in versions(client)["versions"] if version["kind"] == "optimized")
    current = client.post("/api/versions/rollback", json={"model": "fake", "version": best["version"]}).json()
    answers = [[say(client, item["prompt"], 8, num_ctx=n)["response"] for item in HELD_OUT] for n in (128, 256)]  # each of a new engine
    assert answers[0] == answers[1]
    assert sum(answer[0] == "y" for answer in answers[0]) / len(HELD_OUT) == best["held_out_after"] > 0
    assert versions(client)["current"] == current["version"]
    assert metric(client, "tars_optimization_swaps_total") == current["version"] - 1


# Versions as models, and the command line.


def test_a_version_becomes_a_model_that_outlives_the_server(client: httpx.Client, store: Store) -> None:
    best = next(version["version"] for version in versions(client)["versions"] if version["kind"] == "optimized")
    client.post("/api/versions/rollback", json={"model": "fake", "version": best})
    live = [say(client, item["prompt"], 8)["response"] for item in HELD_OUT]
    saved = client.post("/api/versions/save", json={"model": "fake", "version": best, "name": "better"})
    assert saved.json() | {"model": "fake", "version": best, "name": "better:latest"} == saved.json()
    base, kept = store.find("fake"), store.find("better")
    assert [layer.digest for layer in kept.layers[:-1]] == [layer.digest for layer in base.layers]
    with serving(tiny_app(Store(store.root))) as url, httpx.Client(base_url=url, timeout=300) as other:
        assert [say(other, item["prompt"], 8, model="better")["response"] for item in HELD_OUT] == live
        assert other.get("/api/versions", params={"model": "better"}).json()["current"] == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "fake"}, 400, "model and name are required"),
        ({"model": "other", "name": "x"}, 404, "model 'other' not found"),
        ({"model": "fake", "name": "x", "version": 1}, 400, "version 1 is the model as it came"),
        ({"model": "fake", "name": "x", "version": 99}, 400, "there is no version 99"),
        ({"model": "fake", "name": "not a name"}, 400, "name"),
    ],
)
def test_what_cannot_be_saved_is_refused(client: httpx.Client, body: dict[str, Any], status: int, message: str) -> None:
    answer = client.post("/api/versions/save", json=body)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True)


@pytest.fixture
def tars(client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``tars`` against the server; gives the result."""
    monkeypatch.setenv("OLLAMA_HOST", str(client.base_url))
    for name, items in (("data", DATA), ("eval", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return lambda *words: CliRunner().invoke(make_app(), words)


def live_words(tmp_path: Path, *more: str) -> list[str]:
    files = ["--data", str(tmp_path / "data.jsonl"), "--eval", str(tmp_path / "eval.jsonl")]
    search = ["--layers", "all", "--population", "16", "--batch", "6", "--sigma", "0.1", "--lr", "0.2"]
    return ["optimize", "fake", "--live", *files, *search, *more]


def test_the_command_line_improves_what_is_served(client: httpx.Client, tars: Any, tmp_path: Path) -> None:
    client.post("/api/versions/rollback", json={"model": "fake", "version": 1})
    done = tars(*live_words(tmp_path, "--generations", "60", "--save", "by-hand"))
    assert done.exit_code == 0, done.output
    assert "generation 1  best" in done.stderr
    assert f"version {versions(client)['current']}" in done.stderr
    assert "saved as 'by-hand:latest'" in done.stderr
    listed = tars("versions", "fake").stdout.splitlines()
    assert listed[0].split() == ["VERSION", "KIND", "FROM", "BEFORE", "AFTER", "SIZE", "CREATED"]
    assert listed[-1].split()[:3] == [str(versions(client)["current"]), "*", "optimized"]
    assert "is version 1 again" in tars("rollback", "fake", "1").stderr
    assert "success" in tars("jobs").stdout.splitlines()[-1]


def test_ctrl_c_stops_the_job_and_keeps_what_was_accepted(
    client: httpx.Client, tars: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(view: dict[str, Any]) -> str:
        if view["generation"] >= 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr("tars_jax.cli.live.describe", describe)
    stopped = tars(*live_words(tmp_path, "--target", "2", "--seconds", "600"))
    assert stopped.exit_code == 0, stopped.output
    assert "stopped after" in stopped.stderr
    assert client.get("/api/optimize").json()["jobs"][-1]["status"] == "stopped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--generations", "0"], "generations must be at least 1"),
        (["--fitness", "os:system"], "fitness must be"),
        (["--space", "sampler"], "--live searches weights"),
    ],
)
def test_what_a_live_search_cannot_do_is_an_error(tars: Any, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in str(tars(*live_words(tmp_path, *words)).exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2", "--evaluate-every", "2"], "--samples, --evaluate-every: only for a search of its own"),
        (["--out", "x", "--resume"], "--out, --resume: only for a search of its own; --live keeps its result with --save"),
        (["--matrices", "q"], "--matrices: only for a search of its own"),
        (["--space", "gains", "--rank", "4"], "--rank: only for --space low-rank"),
        (["--strategy", "genetic"], "--lr: only for --strategy eggroll"),
    ],
)
def test_an_option_that_a_live_search_would_pass_over_is_an_error(tars: Any, tmp_path: Path, words: list[str], message: str) -> None:
    error = tars(*live_words(tmp_path, *words)).exception
    assert message in str(error)
    assert getattr(error, "exit_code", None) == 2


def test_a_search_needs_a_place_for_its_result(tars: Any, tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "data.jsonl")]
    assert "give --out DIR" in str(tars("optimize", "fake", *data).exception)


def test_without_a_server_a_live_search_is_an_error(tars: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    for words in (live_words(tmp_path), ["jobs"], ["versions", "fake"], ["rollback", "fake"]):
        assert "no TARS server answers" in str(tars(*words).exception)
