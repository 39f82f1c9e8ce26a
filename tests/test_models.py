"""The manager of loaded models: sharing, keep_alive, eviction, reload, shutdown."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fakes import FakeLoader, make_store

from api.models import Models
from tars_jax.errors import ModelFileError, ModelNotFound, ServerBusy
from tars_jax.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path, "a", "b", "c")


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def names(models: Models) -> list[str]:
    return [entry.name for entry in models.loaded()]


def run(models: Models, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, then shut down."""

    async def whole() -> None:
        try:
            await test()
        finally:
            await models.close()

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def touch(models: Models, name: str, num_ctx: int | None = None, keep_alive: float | None = None) -> None:
    async with models.use(name, num_ctx=num_ctx, keep_alive=keep_alive):
        pass


def test_concurrent_requests_share_one_load(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await asyncio.gather(*(touch(models, name) for name in ("a", "A:latest", "a")))
        await touch(models, "a")
        assert loader.loads == 1

    run(models, test)


def test_the_engine_gets_the_settings(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store, num_parallel=3, max_queue=7, context_length=1000)

    async def test() -> None:
        await touch(models, "a")
        config = loader.engines[0].config
        assert (config.max_context, config.max_rows, config.max_queue) == (1000, 3, 7)

    run(models, test)


def test_an_idle_model_leaves_after_its_keep_alive(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await touch(models, "a", keep_alive=0.05)
        assert names(models) == ["a:latest"]
        await until(lambda: not names(models))
        assert loader.engines[0].is_closed

    run(models, test)


def test_the_timer_restarts_with_every_request(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await touch(models, "a", keep_alive=0.15)
        for _ in range(4):
            await asyncio.sleep(0.06)
            await touch(models, "a")  # keeps the value it has
        assert loader.loads == 1

    run(models, test)


def test_keep_alive_zero_unloads_after_the_request(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        async with models.use("a", keep_alive=0):
            assert names(models) == ["a:latest"]
        await until(lambda: not names(models))

    run(models, test)


def test_forever_has_no_timer(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await touch(models, "a", keep_alive=math.inf)
        assert models.loaded()[0].timer is None

    run(models, test)


def test_unload_waits_for_the_last_request(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        async with models.use("a"):
            await models.unload("a")
            assert not loader.engines[0].is_closed
        await until(lambda: not names(models))
        await models.unload("a")  # nothing there: nothing happens

    run(models, test)


def test_the_least_recently_used_makes_room(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store, max_loaded_models=2)

    async def test() -> None:
        for name in ("a", "b", "a", "c"):
            await touch(models, name)
        assert sorted(names(models)) == ["a:latest", "c:latest"]

    run(models, test)


def test_a_busy_model_is_waited_for(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store, max_loaded_models=1)

    async def test() -> None:
        async with models.use("a"):
            waiting = asyncio.create_task(touch(models, "b"))
            await asyncio.sleep(0.02)
            assert loader.loads == 1
            assert models.waiting() == 1
        await waiting
        assert names(models) == ["b:latest"]

    run(models, test)


def test_another_context_reloads(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        for num_ctx in (512, 512, 1024):
            await touch(models, "a", num_ctx=num_ctx)
        assert [engine.config.max_context for engine in loader.engines] == [512, 1024]
        assert loader.engines[0].is_closed

    run(models, test)


def test_contexts_beyond_the_model_are_the_same(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        for num_ctx in (10_000, 20_000, 8192):
            await touch(models, "a", num_ctx=num_ctx)
        assert [engine.config.max_context for engine in loader.engines] == [8192]

    run(models, test)


def test_a_changed_model_is_loaded_again(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await touch(models, "a")
        store.write_manifest("a", {"model_format": "changed"}, store.find("a").layers)
        await touch(models, "a")
        assert loader.loads == 2

    run(models, test)


def test_a_failed_load_reaches_everybody_and_can_be_tried_again(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        loader.error = ModelFileError("broken")
        results = await asyncio.gather(touch(models, "a"), touch(models, "a"), return_exceptions=True)
        assert [str(result) for result in results] == ["broken", "broken"]
        loader.error = None
        await touch(models, "a")

    run(models, test)


def test_a_load_goes_on_when_who_asked_for_it_leaves(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        loader.gate.clear()
        asking = asyncio.create_task(touch(models, "a"))
        await asyncio.sleep(0.02)
        asking.cancel()
        loader.gate.set()
        await until(lambda: names(models) == ["a:latest"])
        assert models.loaded()[0].timer is not None

    run(models, test)


def test_nobody_waiting_means_no_load(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        loader.gate.clear()
        first, second = asyncio.create_task(touch(models, "a")), asyncio.create_task(touch(models, "b"))
        await asyncio.sleep(0.02)
        second.cancel()
        loader.gate.set()
        await first
        await asyncio.sleep(0.02)
        assert names(models) == ["a:latest"]
        assert loader.loads == 1

    run(models, test)


def test_a_full_queue_is_busy(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store, max_queue=1)

    async def test() -> None:
        loader.gate.clear()
        first = asyncio.create_task(touch(models, "a"))
        await asyncio.sleep(0.02)
        with pytest.raises(ServerBusy, match=r"server busy, please try again\.  maximum pending requests exceeded"):
            await touch(models, "b")
        loader.gate.set()
        await first

    run(models, test)


def test_unknown_models(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        with pytest.raises(ModelNotFound, match="model 'Nobody' not found"):
            await touch(models, "Nobody")

    run(models, test)


def test_close_ends_everything(store: Store, loader: FakeLoader) -> None:
    models = loader.models(store)

    async def test() -> None:
        await touch(models, "a", keep_alive=0.01)
        async with models.use("b"):
            await models.close()
        assert all(engine.is_closed for engine in loader.engines)
        with pytest.raises(ServerBusy):
            await touch(models, "a")

    run(models, test)
