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
import pytest
from fakes import FakeLoader, make_store, serving

from api.app import create_app
from api.models import Models
from api.settings import Settings
from tars_jax import Engine, EngineConfig
from tars_jax.engine import threads
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


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a server with a real, tiny model."""
    model = dataclasses.replace(tiny_model(scale=1.0), tokenizer=Printable())

    def make_engine(model: Any, config: EngineConfig) -> Engine:
        return Engine(model, EngineConfig(max_context=config.max_context, max_rows=4, max_step_tokens=16))

    models = Models(make_store(tmp_path_factory.mktemp("store")), Settings(), load=lambda *_: model, make_engine=make_engine)
    with pytest.MonkeyPatch.context() as patch, serving(create_app(models.settings, models)) as url:
        patch.setattr(threads, "NICE", 0)  # what else runs on the machine must not starve the tests
        with httpx.Client(base_url=url, timeout=300) as client:
            yield client


def say(client: httpx.Client, prompt: str, tokens: int = 1, **options: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": prompt, "raw": True, "options": {"temperature": 0, "num_predict": tokens, **options}}
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
    best = next(version["version"] for version in versions(client)["versions"] if version["kind"] == "optimized")
    current = client.post("/api/versions/rollback", json={"model": "fake", "version": best}).json()
    prompt = HELD_OUT[0]["prompt"]
    answers = [say(client, prompt, 8, num_ctx=context)["response"] for context in (128, 64)]  # the second of a new engine
    assert answers[0] == answers[1]
    assert answers[0][0] == "y"
    assert versions(client)["current"] == current["version"]
    assert metric(client, "tars_optimization_swaps_total") == current["version"] - 1
