"""The load generator: what it draws, what it sends, what it concludes; against a server of a fake model."""

import asyncio
import dataclasses
import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeLoader, FakeModel, make_store, serving
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from api.app import create_app
from tars_jax.cli import make_app
from tars_jax.cli.load_test import started_server
from tars_jax.errors import InvalidRequest, ModelNotFound, TarsError
from tars_jax.load_test.client import Exchange, _follow, exchange, open_client, probe, send_all, warm_up
from tars_jax.load_test.report import parse_goodput, percentile, summarize
from tars_jax.load_test.workload import Lengths, Workload

FIVE = Workload(model="fake", input=Lengths.parse("3"), output=Lengths.parse("5"), requests=5)


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def url(tmp_path: Path, loader: FakeLoader) -> Iterator[str]:
    models = loader.models(make_store(tmp_path))
    with serving(create_app(models.settings, models)) as url:
        yield url


def send(url: str, workload: Workload, **options: Any) -> list[Exchange]:
    async def run() -> list[Exchange]:
        async with open_client(url, timeout=30) as client:
            return await send_all(client, workload, 1.0, **options)

    return asyncio.run(run())


# what is drawn


@pytest.mark.parametrize(("text", "low", "high"), [("7", 7, 7), ("3..9", 3, 9), ("1..1", 1, 1)])
def test_lengths_cover_their_range(text: str, low: int, high: int) -> None:
    lengths, generator = Lengths.parse(text), random.Random(0)
    drawn = Counter(lengths.sample(generator) for _ in range(500))
    assert set(drawn) == set(range(low, high + 1))


def test_nine_of_ten_lognormal_lengths_lie_in_the_range() -> None:
    lengths, generator = Lengths.parse("lognormal:32..512"), random.Random(0)
    drawn = [lengths.sample(generator) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(128, rel=0.05)
    assert sum(32 <= length <= 512 for length in drawn) / 4000 == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("text", ["", "0", "0..5", "9..3", "x", "5..", "lognormal:5", "normal:1..5", "-3"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="lengths are given as"):
        Lengths.parse(text)


def test_arrivals_at_once() -> None:
    assert list(FIVE.arrivals()) == [0.0] * 5


def test_arrivals_are_a_poisson_process() -> None:
    at = list(dataclasses.replace(FIVE, requests=5000, rate=4.0).arrivals())
    gaps = np.diff(at)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)  # of an exponential distribution it is the mean


def test_arrivals_end_with_the_time() -> None:
    at = list(dataclasses.replace(FIVE, requests=None, seconds=10.0, rate=100.0).arrivals())
    assert 800 < len(at) < 1200
    assert max(at) < 10


def test_a_seed_asks_the_same_questions() -> None:
    again = dataclasses.replace(FIVE)
    assert [FIVE.body(i, 1.0) for i in range(3)] == [again.body(i, 1.0) for i in range(3)]
    assert FIVE.body(0, 1.0) != FIVE.body(1, 1.0) != dataclasses.replace(FIVE, seed=1).body(1, 1.0)


def test_a_prompt_has_as_many_words_as_its_tokens_need() -> None:
    assert len(dataclasses.replace(FIVE, input=Lengths.parse("90")).body(0, 1.5)["prompt"].split()) == 60


def test_prefixes_are_shared() -> None:
    workload = dataclasses.replace(FIVE, shared_prefix=20, prefixes=3)
    prompts = [workload.body(i, 1.0)["prompt"].split() for i in range(60)]
    assert {len(prompt) for prompt in prompts} == {23}
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 3
    assert len({tuple(prompt) for prompt in prompts}) == 60


@pytest.mark.parametrize(
    "change",
    [{"requests": 0}, {"requests": None}, {"seconds": -1.0}, {"rate": 0.0}, {"rate": math.nan}, {"clients": 0}, {"prefixes": 0}],
)
def test_workloads_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        dataclasses.replace(FIVE, **change)


# what is sent


def test_every_request_is_sent_once_and_measured(url: str, loader: FakeLoader) -> None:
    seen: list[int] = []
    results = send(url, FIVE, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    assert [(result.error, result.prompt_tokens, result.output_tokens, len(result.arrivals)) for result in results] == [("", 3, 5, 5)] * 5
    assert all(0 < result.first_token <= result.latency for result in results)
    (engine,) = loader.engines
    assert sorted(engine.prompts()) == sorted(FIVE.body(i, 1.0)["prompt"] for i in range(5))
    assert {(request.params.max_tokens, request.params.ignore_eos) for request in engine.requests} == {(5, True)}


def test_no_more_requests_than_clients_are_under_way(url: str, loader: FakeLoader) -> None:
    loader.model.delay = 0.01
    results = send(url, dataclasses.replace(FIVE, requests=12, clients=3))
    events = sorted([(r.sent, 1) for r in results] + [(r.ended, -1) for r in results])
    assert max(np.cumsum([step for _, step in events])) == 3


def test_a_time_limit_ends_a_closed_loop(url: str, loader: FakeLoader) -> None:
    loader.model.delay = 0.005
    results = send(url, dataclasses.replace(FIVE, requests=None, seconds=0.5, clients=2))
    assert len(results) > 2
    assert not any(result.error for result in results)
    start = min(result.sent for result in results)
    assert max(result.sent for result in results) - start < 0.5


def test_requests_are_spread_over_keys(url: str, loader: FakeLoader) -> None:
    send(url, dataclasses.replace(FIVE, requests=9, api_keys=3))
    assert sorted(Counter(request.client for request in loader.engines[0].requests).values()) == [3, 3, 3]


def test_the_probe_counts_tokens_of_a_word(url: str, loader: FakeLoader) -> None:
    async def run() -> float:
        async with open_client(url, timeout=30) as client:
            await warm_up(client, FIVE, 1.0, requests=2)
            return await probe(client, dataclasses.replace(FIVE, shared_prefix=99))

    assert asyncio.run(run()) == 1.0  # the fake's tokens are words
    asked = [len(prompt.split()) for prompt in loader.engines[0].prompts()]
    assert asked == [3, 3, 128]


def test_an_unknown_model_ends_the_test(url: str) -> None:
    async def run() -> None:
        async with open_client(url, timeout=30) as client:
            await probe(client, dataclasses.replace(FIVE, model="nobody"))

    with pytest.raises(ModelNotFound, match="model 'nobody' not found"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("model", "body", "error"),
    [
        (FakeModel(error="out of memory"), {}, "stream: out of memory"),
        (FakeModel(timeout_after=1), {}, "stream: the request's time ended"),
        (FakeModel(), {"options": {"num_predict": "x"}}, '500: option "num_predict" must be of type integer'),
    ],
)
def test_errors_are_told_apart(tmp_path: Path, model: FakeModel, body: dict[str, Any], error: str) -> None:
    models = FakeLoader(model).models(make_store(tmp_path))

    async def run(url: str) -> Exchange:
        async with open_client(url, timeout=30) as client:
            return await exchange(client, {**FIVE.body(0, 1.0), **body})

    with serving(create_app(models.settings, models)) as url:
        assert asyncio.run(run(url)).error == error


def test_a_server_that_is_not_there_is_an_error_of_the_request() -> None:
    (result,) = send("http://127.0.0.1:1", dataclasses.replace(FIVE, requests=1))
    assert result.error.startswith("connection: ")


@given(st.lists(st.integers(0, 400), max_size=12), st.integers(0, 5))
def test_lines_are_counted_however_they_are_cut(cuts: list[int], tokens: int) -> None:
    last = {"done": True, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": tokens}
    data = b"".join(json.dumps(line).encode() + b"\n" for line in [{"response": "x\n", "done": False}] * tokens + [last])
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges) if a < b]

    class Response:
        async def aiter_raw(self) -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

    result, response = Exchange(0.0), Response()
    asyncio.run(_follow(response, result))  # type: ignore[arg-type]
    assert (result.error, result.prompt_tokens, result.output_tokens, len(result.arrivals)) == ("", 7, tokens, tokens)


# what is concluded


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_a_report_is_arithmetic() -> None:
    results = [
        Exchange(sent=0.0, ended=1.0, arrivals=[0.2, 0.3, 0.5, 1.0], prompt_tokens=10, output_tokens=4),
        Exchange(sent=1.0, ended=4.0, arrivals=[2.0, 3.0], prompt_tokens=20, output_tokens=2),
        Exchange(sent=2.0, ended=2.1, error="503: busy"),
        Exchange(sent=2.0, ended=2.2, error="503: busy"),
    ]
    report = summarize(results, {"ttft": 500, "tpot": 300}).as_json()
    assert report["ttft_ms"] == {"mean": 600, "p50": 600, "p90": 920, "p99": 992, "max": 1000}
    assert report["itl_ms"] == {"mean": 450, "p50": 350, "p90": 850, "p99": 985, "max": 1000}  # gaps of 100, 200, 500 and 1000 ms
    assert report["tpot_ms"]["mean"] == pytest.approx((800 / 3 + 1000) / 2, abs=1e-3)
    assert report["e2e_ms"]["max"] == 3000
    assert (report["seconds"], report["completed"], report["failed"], report["errors"]) == (4, 2, 2, {"503: busy": 2})
    assert (report["requests_per_second"], report["output_tokens_per_second"], report["total_tokens_per_second"]) == (0.5, 1.5, 9)
    assert report["goodput_requests_per_second"] == 0.25


@pytest.mark.parametrize(("limits", "good"), [({"itl": 499}, 1), ({"itl": 489}, 0), ({"e2e": 1000}, 1), ({"e2e": 999}, 0)])
def test_goodput_counts_requests_within_every_limit(limits: dict[str, float], good: int) -> None:
    result = Exchange(sent=0.0, ended=1.0, arrivals=[0.2, 0.3, 0.5, 1.0], output_tokens=4)  # 99 % of the gaps are below 494 ms
    assert summarize([result], limits).good == good


def test_goodput_is_parsed_or_refused() -> None:
    assert parse_goodput("ttft:500, itl:99.5") == {"ttft": 500, "itl": 99.5}
    assert parse_goodput("") == {}
    for text in ("ttft", "ttft:x", "speed:3", "ttft:-1"):
        with pytest.raises(InvalidRequest, match="--goodput takes milliseconds"):
            parse_goodput(text)


def test_nothing_measured_is_no_division_by_zero() -> None:
    assert summarize([], {"ttft": 1}).as_json()["requests_per_second"] == 0


# the command


def test_the_command_prints_json(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", url)
    words = ["bench", "serve", "-m", "fake", "--requests", "6", "--clients", "2", "--goodput", "ttft:60000", "--warmup", "1", "--json"]
    result = CliRunner().invoke(make_app(), words)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["completed"], report["failed"], report["output_tokens"]) == (6, 0, 30)
    assert report["goodput_requests_per_second"] == report["requests_per_second"] > 0
    assert set(report["ttft_ms"]) == set(report["itl_ms"]) == {"mean", "p50", "p90", "p99", "max"}


def test_the_command_fails_when_nothing_was_answered(url: str, loader: FakeLoader) -> None:
    loader.model.timeout_after = 1
    result = CliRunner().invoke(make_app(), ["bench", "serve", "-m", "fake", "--host", url, "--requests", "2"])
    assert isinstance(result.exception, TarsError)
    assert str(result.exception) == "no request was answered: 2 x stream: the request's time ended"


def test_the_command_prints_a_table(url: str) -> None:
    result = CliRunner().invoke(make_app(), ["bench", "serve", "-m", "fake", "--host", url, "--requests", "2", "--output", "3"])
    assert result.exit_code == 0
    rows = {line.split("  ")[0].strip(): line.split()[-1] for line in result.stdout.splitlines() if line.strip()}
    assert (rows["requests completed"], rows["output tokens"]) == ("2", "6")
    assert float(rows["time to first token, ms"].replace(",", "")) > 0


def test_a_server_is_started_and_ended() -> None:
    with started_server() as url:
        assert httpx.get(url).headers["server"] == "tars"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tars_jax.cli.load_test._SERVE", "raise SystemExit('no such thing')")
    with pytest.raises(TarsError, match="the server did not start: no such thing"), started_server():
        pass
