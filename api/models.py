"""The models in memory: who loads them, who holds them, when they leave.

A model's stay: `Models.use` finds it in the store and joins the entry that is loaded or loading with the same context, or
makes a new one; the entry loads in a worker thread, one at a time, after making room; whoever uses it holds it; when the last
holder leaves, its keep_alive runs; then, or when room is needed, or when another context is asked for, it is unloaded.
Everything here runs on one event loop; only loading and closing happen in threads.
"""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from api.relay import Relay
from api.settings import Settings
from api.telemetry import Telemetry
from tars_jax.config import EngineConfig
from tars_jax.engine.responses import ResponseCache
from tars_jax.engine.versions import Versions
from tars_jax.errors import ServerBusy
from tars_jax.store import ModelName, Store, StoredModel

if TYPE_CHECKING:
    from tars_jax.engine.engine import Engine
    from tars_jax.loaders.loaded import Model

log = logging.getLogger(__name__)

Load = Callable[[StoredModel, Store, EngineConfig], "Model"]
MakeEngine = Callable[["Model", EngineConfig], "Engine"]


def load_model(
    stored: StoredModel,
    store: Store,
    engine: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
    adapters: Sequence[Path] = (),
) -> "Model":
    """The real loader; ``progress`` hears bytes done and in all. A model that does not fit with such an engine is refused before it
    is read. JAX is imported here, when the first model is wanted."""
    from tars_jax.loaders.opening import load

    # By path: a file in this folder that happens to be called like the model must not win.
    return load(stored.model_path, adapters=[*stored.adapter_paths, *adapters], store=store, engine=engine, progress=progress)


def make_engine(model: "Model", config: EngineConfig) -> "Engine":
    """The real engine of a server: it compiles in the background what later requests will need."""
    from tars_jax.engine.engine import Engine

    return Engine(model, config, warm_up=True)


@dataclasses.dataclass(eq=False)
class Loaded:
    """A model in memory, or on its way there. ``model`` and ``engine`` are set for whoever got it from `Models.use`."""

    stored: StoredModel
    num_ctx: int  # tokens asked for
    keep_alive: float  # seconds
    versions: Versions
    model: "Model" = dataclasses.field(init=False)
    engine: "Engine" = dataclasses.field(init=False)
    is_ready: bool = False
    is_closing: bool = False  # takes no new holders
    holders: int = 0
    idle: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    idle_since: float = 0.0  # monotonic; also the order of eviction
    loading: "asyncio.Task[None] | None" = None
    unloading: "asyncio.Task[None] | None" = None
    timer: asyncio.TimerHandle | None = None
    number: int = dataclasses.field(default_factory=itertools.count(1).__next__)  # no other stay of this process has it

    @property
    def name(self) -> str:
        return self.stored.name.short()

    def fits(self, stored: StoredModel, num_ctx: int) -> bool:
        """Whether it can serve a request for that model and context: same file, and same context after clamping."""
        if self.is_closing or (self.stored.name, self.stored.digest) != (stored.name, stored.digest):
            return False
        if self.is_ready:
            return bool(min(num_ctx, self.model.config.context_length) == self.engine.config.max_context)
        return num_ctx == self.num_ctx

    def seconds_left(self) -> float:
        """Seconds until it is unloaded if nobody comes."""
        return self.keep_alive if self.holders else max(0.0, self.keep_alive - (time.monotonic() - self.idle_since))


class Models:
    """The manager of loaded models. ``load`` and ``make_engine`` are replaced in tests."""

    def __init__(
        self,
        store: Store,
        settings: Settings | None = None,
        *,
        load: Load = load_model,
        make_engine: MakeEngine = make_engine,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.store = store
        self.settings = settings or Settings()
        self.telemetry = telemetry or Telemetry()
        self.responses = ResponseCache(self.settings.response_cache_bytes, self.settings.response_cache_ttl)
        self._load, self._make_engine = load, make_engine
        self._entries: list[Loaded] = []
        self._versions: dict[tuple[ModelName, str], Versions] = {}  # they outlive a stay in memory
        self._one_load = asyncio.Lock()
        self._relay: Relay | None = None
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def use(self, name: str, *, num_ctx: int | None = None, keep_alive: float | None = None) -> AsyncIterator[Loaded]:
        """Hold a model, loading it first if need be.

        Raises:
            ModelNotFound, InvalidRequest: no such model, ill-formed name.
            ServerBusy: too many requests wait for a load.
            ModelFileError, NotEnoughMemory: the model cannot be loaded.
        """
        entry = self._entry(self.store.find(name), self._context(num_ctx))
        if keep_alive is not None:
            entry.keep_alive = keep_alive
        self._hold(entry)
        try:
            if entry.loading is not None:
                await asyncio.shield(entry.loading)  # others may wait for the same load
            yield entry
        finally:
            self._release(entry)

    def relay(self) -> Relay:
        """What brings outputs to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._relay is None or self._relay.loop is not loop:
            self._relay = Relay(loop)
        return self._relay

    def loaded(self) -> list[Loaded]:
        """Models in memory, longest remaining time first."""
        return sorted((entry for entry in self._entries if entry.is_ready), key=Loaded.seconds_left, reverse=True)

    def versions(self, stored: StoredModel) -> Versions:
        """The weights this model has been served with, by this server."""
        return self._versions.setdefault((stored.name, stored.digest), Versions())

    def context_of(self, name: str) -> int | None:
        """The context with which a model is in memory, or coming there: whoever asks for the same disturbs nobody. None: it is not."""
        stored = self.store.find(name)
        entries = [entry for entry in self._entries if entry.stored.name == stored.name and not entry.is_closing]
        return entries[0].num_ctx if entries else None

    def waiting(self) -> int:
        """Requests that wait for a load."""
        return sum(entry.holders for entry in self._entries if not entry.is_ready)

    async def unload(self, name: str) -> None:
        """Unload a model: now if it is idle, else when its last request ends. Nothing happens when it is not loaded."""
        stored = self.store.find(name)
        for entry in [entry for entry in self._entries if entry.stored.name == stored.name]:
            entry.keep_alive = 0.0
            if entry.is_ready and not entry.holders:
                await self._unload(entry)

    async def close(self) -> None:
        """Unload everything; requests that still run are cancelled by their engines."""
        self._is_closed = True
        for entry in list(self._entries):
            if entry.loading is not None:
                await asyncio.wait([entry.loading])
            if entry in self._entries:
                entry.idle.set()
                await self._unload(entry)

    # holding

    def _context(self, num_ctx: int | None) -> int:
        return self.settings.context_length if num_ctx is None else num_ctx

    def _entry(self, stored: StoredModel, num_ctx: int) -> Loaded:
        if self._is_closed:
            raise ServerBusy("the server is shutting down")
        entry = next((entry for entry in self._entries if entry.fits(stored, num_ctx)), None)
        if (entry is None or not entry.is_ready) and self.waiting() >= self.settings.max_queue:
            raise ServerBusy("server busy, please try again.  maximum pending requests exceeded")
        if entry is None:
            for other in self._entries:
                if other.stored.name == stored.name:
                    other.is_closing = True  # the new one takes its place
            entry = Loaded(stored, num_ctx, self.settings.keep_alive, self.versions(stored))
            self._entries.append(entry)
            entry.loading = asyncio.create_task(self._bring_in(entry))
            entry.loading.add_done_callback(_retrieve)
        return entry

    def _hold(self, entry: Loaded) -> None:
        entry.holders += 1
        entry.idle.clear()
        if entry.timer is not None:
            entry.timer.cancel()

    def _release(self, entry: Loaded) -> None:
        entry.holders -= 1
        if entry.holders:
            return
        entry.idle.set()
        entry.idle_since = time.monotonic()
        if not entry.is_ready or entry.is_closing or self._is_closed:
            return
        if entry.keep_alive <= 0:
            self._start_unloading(entry)
        elif entry.seconds_left() < 1e9:  # beyond 30 years no timer is needed, and event loops overflow
            entry.timer = asyncio.get_running_loop().call_later(entry.keep_alive, self._start_unloading, entry)

    # coming and going

    async def _bring_in(self, entry: Loaded) -> None:
        """Load an entry, after those it replaces have left and there is room."""
        try:
            async with self._one_load:
                if not entry.holders:  # everybody who waited has gone
                    raise asyncio.CancelledError
                if self._is_closed:
                    raise ServerBusy("the server is shutting down")
                await self._make_room(entry)
                started = time.monotonic()
                entry.model, entry.engine = await asyncio.to_thread(self._load_in_thread, entry)
                self.telemetry.model_loaded(entry.name, time.monotonic() - started)
                log.info("loaded %s in %.2f s", entry.name, time.monotonic() - started)
        except BaseException:
            entry.is_closing = True
            self._entries.remove(entry)
            raise
        entry.is_ready, entry.loading = True, None
        if not entry.holders:  # they left during the load: the timer starts as if they had used it
            self._hold(entry)
            self._release(entry)

    def _load_in_thread(self, entry: Loaded) -> "tuple[Model, Engine]":
        config = self.settings.engine(entry.num_ctx)
        model = self._load(entry.stored, self.store, config)
        context = min(entry.num_ctx, model.config.context_length)
        engine = self._make_engine(model, dataclasses.replace(config, max_context=context))
        entry.versions.serve(engine)
        gc.freeze()  # what is there now stays: a collection that looks at all of it stops every stream for 60 ms
        return model, engine

    async def _make_room(self, newcomer: Loaded) -> None:
        for other in [other for other in self._entries if other.is_ready and other.stored.name == newcomer.stored.name]:
            await self._unload(other)
        while len(ready := [other for other in self._entries if other.is_ready]) >= self.settings.max_loaded_models:
            # Least recently used first; a busy one is waited for, and only when none is idle.
            await self._unload(min(ready, key=lambda other: (other.holders > 0, other.idle_since)))

    def _start_unloading(self, entry: Loaded) -> "asyncio.Task[None]":
        if entry.unloading is None:
            entry.is_closing = True
            if entry.timer is not None:
                entry.timer.cancel()
            entry.unloading = asyncio.create_task(self._take_out(entry))
        return entry.unloading

    async def _unload(self, entry: Loaded) -> None:
        await asyncio.shield(self._start_unloading(entry))

    async def _take_out(self, entry: Loaded) -> None:
        if not self._is_closed:
            await entry.idle.wait()
        try:
            await asyncio.to_thread(entry.engine.close)
        finally:
            self._entries.remove(entry)
            if not entry.holders:
                del entry.model, entry.engine
                gc.unfreeze()
                gc.collect()  # cycles must not keep gigabytes until the next collection
                gc.freeze()
        log.info("unloaded %s", entry.name)


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Take the error of a load that nobody waits for any more, else asyncio reports it as lost."""
    if not task.cancelled():
        task.exception()
