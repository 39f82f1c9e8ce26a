"""The response cache: what is kept, for whom and for how long; and that a repeated HTTP request gets the same pieces."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeLoader, FakeModel, make_store
from hypothesis import given
from hypothesis import strategies as st

from api.app import create_app
from api.models import Models
from api.repeats import Outputs, remembered
from api.settings import Settings
from tars_jax.config import SamplingParams
from tars_jax.engine.request import Output, TokenLogprob, Usage
from tars_jax.engine.responses import Key, ResponseCache, answer_nbytes, is_repeatable, make_key
from tars_jax.store import Store

GREEDY = SamplingParams(temperature=0)
END = Output(finish_reason="stop", usage=Usage(3, 2))


def key(prompt: int = 0, client: str = "", params: SamplingParams = GREEDY, context: int = 64) -> Key:
    return make_key(("digest", 1), client, (1, 2, prompt), params, context)


def answer(size: int = 1) -> list[Output]:
    return [Output(text="x" * size, token_ids=(7,), logprobs=(TokenLogprob(7, -0.5),)), END]


# the cache


def test_an_answer_comes_back_as_it_was() -> None:
    cache = ResponseCache(10_000, 60)
    cache.put(key(), answer())
    assert cache.get(key()) == tuple(answer())
    assert (cache.hits, cache.misses, len(cache)) == (1, 0, 1)


@pytest.mark.parametrize(
    "other", [key(1), key(client="b"), key(params=SamplingParams(temperature=0, max_tokens=3)), key(context=128), key(-1)]
)
def test_only_the_same_request_gets_it(other: Key) -> None:
    cache = ResponseCache(10_000, 60)
    cache.put(key(), answer())
    assert cache.get(other) is None
    assert cache.misses == 1


@pytest.mark.parametrize(
    ("params", "repeatable"),
    [(GREEDY, True), (SamplingParams(seed=0), True), (SamplingParams(), False), (SamplingParams(temperature=0, seed=3), True)],
)
def test_what_is_repeatable(params: SamplingParams, repeatable: bool) -> None:
    assert is_repeatable(params) == repeatable


@pytest.mark.parametrize("reason", ["cancelled", "error", None])
def test_unfinished_answers_are_not_kept(reason: Any) -> None:
    cache = ResponseCache(10_000, 60)
    cache.put(key(), [Output("x", (1,)), Output(finish_reason=reason)])
    cache.put(key(), [])
    assert len(cache) == cache.nbytes == 0


def test_answers_leave_after_their_time() -> None:
    now = [0.0]
    cache = ResponseCache(10_000, 60, clock=lambda: now[0])
    cache.put(key(), answer())
    now[0] = 59.9
    assert cache.get(key())
    now[0] = 60.0
    assert cache.get(key()) is None
    assert cache.nbytes == 0


def test_expired_answers_leave_when_others_come() -> None:
    now = [0.0]
    cache = ResponseCache(10_000, 60, clock=lambda: now[0])
    cache.put(key(1), answer())
    now[0] = 61.0
    cache.put(key(2), answer())
    assert len(cache) == 1


def test_the_one_unused_longest_leaves_first() -> None:
    size = answer_nbytes(key(), answer())
    cache = ResponseCache(2 * size + size // 2, 60)
    cache.put(key(1), answer())
    cache.put(key(2), answer())
    cache.get(key(1))
    cache.put(key(3), answer())
    assert [bool(cache.get(key(i))) for i in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize(("size", "ttl"), [(0, 60), (10_000, 0)])
def test_nothing_is_kept_when_it_is_off(size: int, ttl: float) -> None:
    cache = ResponseCache(size, ttl)
    cache.put(key(), answer())
    assert not cache.is_on
    assert len(cache) == 0


@given(
    st.integers(0, 6000),
    st.lists(st.tuples(st.sampled_from(["put", "get", "wait"]), st.integers(0, 5), st.integers(0, 3000)), max_size=40),
)
def test_bytes_never_exceed_the_budget(budget: int, operations: list[tuple[str, int, int]]) -> None:
    now, given_last = [0.0], dict[int, tuple[float, int]]()
    cache = ResponseCache(budget, 10, clock=lambda: now[0])
    for operation, name, size in operations:
        if operation == "put":
            cache.put(key(name), answer(size))
            given_last[name] = now[0], size
            assert (cache.get(key(name)) is not None) == (answer_nbytes(key(name), answer(size)) <= budget)
        elif operation == "wait":
            now[0] += size / 500
        elif (found := cache.get(key(name))) is not None:
            made, length = given_last[name]
            assert now[0] - made < 10
            assert found == tuple(answer(length))
        assert cache.nbytes == sum(answer_nbytes(k, entry.outputs) for k, entry in cache._entries.items()) <= budget
    cache.clear()
    assert cache.nbytes == len(cache) == 0


def test_the_size_counts_texts_and_prompts() -> None:
    small = answer_nbytes(key(), answer(0))
    assert answer_nbytes(key(), answer(1000)) - small == 1000
    longer = make_key(("digest", 1), "", tuple(range(1003)), GREEDY, 64)
    assert answer_nbytes(longer, answer(0)) - small == 4000  # int32 each


# over HTTP


class Server:
    """One app for several requests; bodies are those of /api/generate."""

    def __init__(self, store: Store, **settings: Any) -> None:
        self.loader = FakeLoader(FakeModel())
        self.settings = Settings(**settings)
        self.models = Models(store, self.settings, load=self.loader.load, make_engine=self.loader.make_engine)

    def run(self, *steps: Any) -> list[Any]:
        """Send bodies; call what is callable in between. Gives the parsed lines of each answer."""

        async def send() -> list[Any]:
            transport = httpx.ASGITransport(create_app(self.settings, self.models))
            answers = []
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for step in steps:
                    if callable(step):
                        step()
                        continue
                    response = await client.post("/api/generate", json={"model": "fake", "prompt": "hi", **step})
                    answers.append([json.loads(line) for line in response.text.splitlines()])
                self.metrics = (await client.get("/metrics")).text
            await self.models.close()
            return answers

        return asyncio.run(send())

    @property
    def computed(self) -> int:
        """Requests that reached an engine."""
        return sum(len(engine.requests) for engine in self.loader.engines)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path)


def ask(**fields: Any) -> dict[str, Any]:
    return {"options": {"temperature": 0}, **fields}


TIMES = {"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "cached", "prompt_cached_count"}


def without_times(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in chunk.items() if name not in TIMES} for chunk in chunks]


def test_a_repeated_request_streams_the_same_pieces(store: Store) -> None:
    server = Server(store)
    first, second = server.run(ask(logprobs=True), ask(logprobs=True))
    assert len(first) > 3
    assert without_times(first) == without_times(second)
    assert server.computed == 1
    assert "cached" not in first[-1]
    assert second[-1]["cached"] is True


def test_hits_and_misses_are_counted(store: Store) -> None:
    server = Server(store)
    server.run(ask(), ask(), ask(), {})
    assert 'tars_response_cache_hits_total{model_name="fake:latest"} 2.0' in server.metrics
    assert 'tars_response_cache_misses_total{model_name="fake:latest"} 1.0' in server.metrics
    assert f"tars_response_cache_bytes {float(server.models.responses.nbytes)}" in server.metrics
    assert 'vllm:request_success_total{finished_reason="stop",model_name="fake:latest"} 4.0' in server.metrics
    assert 'vllm:generation_tokens_total{model_name="fake:latest"} 10.0' in server.metrics  # computed ones only


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
def test_random_answers_are_computed_anew(store: Store, options: dict[str, Any]) -> None:
    server = Server(store)
    server.run(ask(options=options), ask(options=options))
    assert server.computed == 2


def test_a_seed_makes_an_answer_repeatable(store: Store) -> None:
    server = Server(store)
    server.run(ask(options={"seed": 1}), ask(options={"seed": 1}), ask(options={"seed": 2}))
    assert server.computed == 2


def test_the_cache_can_be_off(store: Store) -> None:
    server = Server(store, response_cache_bytes=0)
    server.run(ask(), ask())
    assert server.computed == 2


@pytest.mark.parametrize(("shared", "computed"), [(False, 2), (True, 1)])
def test_answers_are_for_the_client_they_were_made_for(store: Store, shared: bool, computed: int) -> None:
    server = Server(store, response_cache_shared=shared)
    count = 0

    async def compute() -> Outputs:
        nonlocal count
        count += 1
        for output in answer():
            yield output

    async def ask_as(*clients: str) -> None:
        async with server.models.use("fake") as loaded:
            for client in clients:
                assert [o.text async for o in remembered(server.models, loaded, (1, 2), GREEDY, client, compute)] == ["x", ""]
        await server.models.close()

    asyncio.run(ask_as("key:a", "key:b", "key:a"))
    assert count == computed


def test_new_weights_forget_old_answers(store: Store) -> None:
    server = Server(store)

    def swap() -> None:
        server.loader.engines[0].weights_version += 1

    server.run(ask(), swap, ask(), ask())
    assert server.computed == 2


def test_answers_outlive_a_reload_but_changed_weights_do_not(store: Store) -> None:
    server = Server(store)

    def swap() -> None:
        server.loader.engines[-1].weights_version = 2

    leave = {"keep_alive": 0, "prompt": ""}
    server.run(ask(), dict(leave), ask(), swap, ask(), dict(leave), {"prompt": ""}, swap, ask())
    assert len(server.loader.engines) == 3
    assert server.computed == 3  # once with the file's weights, and once after each change


def test_answers_made_while_weights_change_are_not_kept(store: Store) -> None:
    server = Server(store)
    server.loader.model.delay = 0.02

    async def both() -> None:
        transport = httpx.ASGITransport(create_app(server.settings, server.models))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            task = asyncio.create_task(client.post("/api/generate", json={"model": "fake", "prompt": "hi", **ask()}))
            while not (server.loader.engines and server.loader.engines[0].said):
                await asyncio.sleep(0.002)
            server.loader.engines[0].weights_version = 2
            await task
        await server.models.close()

    asyncio.run(both())
    assert len(server.models.responses) == 0
