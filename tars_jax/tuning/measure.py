"""What a setting is worth: the same requests, in this process, by an engine that has it."""

import contextlib
import dataclasses
import queue
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np

from tars_jax.config import EngineConfig, SamplingParams
from tars_jax.engine.engine import Engine
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.engine.step import buckets
from tars_jax.errors import TarsError
from tars_jax.load_test.workload import Lengths, Workload
from tars_jax.loaders.loaded import Model
from tars_jax.tuning.knobs import Value

INPUT, OUTPUT = Lengths("uniform", 32, 128), Lengths("uniform", 16, 48)
ENGINES = 2  # kept at once: the default and its rival


@dataclasses.dataclass(frozen=True)
class Measurement:
    """rate: tokens a second, prompts' and answers'. gap: seconds between two tokens of a stream that 95 % are below."""

    rate: float
    gap: float


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked: ``requests`` of random words, of which ``clients`` are under way together (as `tars bench serve` asks it)."""

    clients: int = 8
    requests: int = 12
    input: Lengths = INPUT
    output: Lengths = OUTPUT

    def prompts(self, model: Model, seed: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
        """Token ids and options of every request; another seed asks other things, so that no cache knows them."""
        workload = Workload(model.name, self.input, self.output, requests=self.requests, seed=seed)
        made = []
        for number in range(self.requests):
            body = workload.body(number, 1.0)
            ids = model.tokenizer.encode(body["prompt"], add_special=True)
            options = body["options"]
            params = SamplingParams(
                max_tokens=min(options["num_predict"], self.output.high),
                temperature=options["temperature"],
                ignore_eos=True,
                seed=abs(seed) * self.requests + number,
            )
            made.append((tuple(ids[: self.input.high]), params))
        return made


class Engines:
    """Engines of a model, by their settings, compiled and warm; the two used last are kept."""

    def __init__(self, model: Model, load: Load) -> None:
        self._model, self._load = model, load
        self._engines: OrderedDict[tuple[tuple[str, Value], ...], Engine] = OrderedDict()
        self._preparing = 0.0  # seconds that engines took to be compiled and warm

    def clock(self) -> float:
        """Seconds without those in which engines were made ready: what compiling takes is not held against anybody."""
        return time.monotonic() - self._preparing

    def measure(self, knobs: Mapping[str, Value], seed: int) -> Measurement:
        """The load of this seed under these settings. The engine's first use compiles it and serves the load once without being timed."""
        engine = self._engine(knobs)
        return run(engine, self._load, seed)

    @contextlib.contextmanager
    def closing(self) -> Iterator["Engines"]:
        """Close the engines at the end."""
        try:
            yield self
        finally:
            while self._engines:
                self._engines.popitem()[1].close()

    def _engine(self, knobs: Mapping[str, Value]) -> Engine:
        key = tuple(sorted(knobs.items()))
        if key not in self._engines:
            began = time.monotonic()
            while len(self._engines) >= ENGINES:  # the default, which is used most, stays
                oldest = next(other for other in self._engines if other)
                self._engines.pop(oldest).close()
            context = self._load.input.high + self._load.output.high + 2
            config = EngineConfig(max_context=context, **dict(knobs))  # type: ignore[arg-type]
            engine = Engine(self._model, config, warm_up=True)
            self._engines[key] = engine
            while len(engine.stats().compiled_steps) < len(buckets(engine.config)):
                time.sleep(0.05)
            run(engine, self._load, -1)
            self._preparing += time.monotonic() - began
        self._engines.move_to_end(key)
        return self._engines[key]


def run(engine: Engine, load: Load, seed: int) -> Measurement:
    """Serve a load and time it."""
    waiting = load.prompts(engine.model, seed)[::-1]
    arrivals: queue.SimpleQueue[tuple[int, float, Output]] = queue.SimpleQueue()
    times: dict[int, list[float]] = {}
    tokens = sum(len(ids) + (params.max_tokens or 0) for ids, params in waiting)

    def send() -> None:
        ids, params = waiting.pop()
        number = new_request_id()
        times[number] = []
        engine.submit(Request(number, ids, params, lambda output: arrivals.put((number, time.perf_counter(), output))))

    began = time.perf_counter()
    for _ in range(min(load.clients, len(waiting))):
        send()
    running = len(times)
    while running:
        number, at, output = arrivals.get()
        if output.error:
            raise TarsError(f"a request failed while the engine was measured: {output.error}")
        times[number] += [at] * len(output.token_ids)
        if output.finish_reason:
            running -= 1
            if waiting:
                send()
                running += 1
    seconds = time.perf_counter() - began
    gaps = np.concatenate([np.diff(stream) for stream in times.values()])
    return Measurement(tokens / seconds, float(np.quantile(gaps, 0.95)) if len(gaps) else 0.0)
