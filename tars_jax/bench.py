"""Measuring a model on this machine: prefill, decode at several batch sizes, start-up and memory.

All through the engine, as a user meets it: random prompt tokens, distinct between repetitions so that no cache can help.
"""

import dataclasses
import queue
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from tars_jax.config import EngineConfig, SamplingParams
from tars_jax.engine.engine import Engine
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.loaders.loaded import Model

DECODE_PROMPT = 16  # tokens before the decodes that are timed
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second of several repetitions."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """Half the range, in tokens per second."""
        return (max(self.runs) - min(self.runs)) / 2


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured. decode: total over the streams, by batch size."""

    prompt_tokens: int
    new_tokens: int
    prefill: Rate
    decode: dict[int, Rate]
    startup_seconds: float
    peak_rss_mb: float

    def as_json(self) -> dict[str, object]:
        """The report with the names of the command's contract."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": round(self.prefill.median, 2),
            "prefill_spread": round(self.prefill.spread, 2),
            "decode_tokens_per_second": {str(batch): round(rate.median, 2) for batch, rate in self.decode.items()},
            "decode_spread": {str(batch): round(rate.spread, 2) for batch, rate in self.decode.items()},
            "startup_seconds": round(self.startup_seconds, 3),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
        }


def measure(
    model: Model, *, prompt_tokens: int, new_tokens: int, batches: Sequence[int], repetitions: int, progress: Progress = lambda _: None
) -> Report:
    """Run the benchmark. Every shape is run once before it is timed; ``progress`` hears what is being measured."""
    context = max(prompt_tokens + 2, DECODE_PROMPT + new_tokens + 2)
    tokens = max(batches) * (DECODE_PROMPT + new_tokens + 2)
    engine = Engine(model, EngineConfig(max_context=context, max_rows=max(batches), cache_tokens=max(tokens, context)))
    random = np.random.default_rng(0)
    try:
        progress(f"prefill of {prompt_tokens} tokens")
        prefill = [_prefill(engine, random, prompt_tokens) for _ in range(repetitions + 1)][1:]
        decode = {}
        for batch in batches:
            progress(f"decode, {batch} at once")
            decode[batch] = Rate(tuple([_decode(engine, random, batch, new_tokens) for _ in range(repetitions + 1)][1:]))
    finally:
        engine.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    progress("start-up")
    return Report(prompt_tokens, new_tokens, Rate(tuple(prefill)), decode, startup(str(model.path)), peak)


def startup(path: str) -> float:
    """Seconds from the start of a process to its first token, second of two runs: the first fills the compilation cache."""
    program = (
        "import sys, tars_jax; from tars_jax import *\n"
        "engine = Engine(load(sys.argv[1]), EngineConfig())\n"
        "print(next(engine.generate('Hello', SamplingParams(max_tokens=4, temperature=0))))\n"
    )
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.perf_counter() - start
            process.kill()
    return seconds


def _prefill(engine: Engine, random: np.random.Generator, count: int) -> float:
    last = _run(engine, random, 1, count, 1)[0][-1][1]
    assert last.usage is not None
    return count / last.usage.prefill_seconds


def _decode(engine: Engine, random: np.random.Generator, batch: int, count: int) -> float:
    """Total tokens per second while all ``batch`` streams are decoding: from the last one's first token to the first one's last."""
    streams = [[at for at, output in stream if output.token_ids] for stream in _run(engine, random, batch, DECODE_PROMPT, count)]
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(begin < at <= end for times in streams for at in times) / (end - begin)


def _run(engine: Engine, random: np.random.Generator, batch: int, prompt: int, count: int) -> list[list[tuple[float, Output]]]:
    """Outputs of ``batch`` concurrent requests with their arrival times."""
    arrivals: queue.SimpleQueue[tuple[int, float, Output]] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    for i in range(batch):
        ids = tuple(random.integers(0, engine.model.config.vocab_size, prompt).tolist())
        engine.submit(Request(new_request_id(), ids, params, lambda output, i=i: arrivals.put((i, time.perf_counter(), output))))  # type: ignore[misc]
    streams: list[list[tuple[float, Output]]] = [[] for _ in range(batch)]
    while not all(stream and stream[-1][1].finish_reason for stream in streams):
        i, at, output = arrivals.get()
        if output.error:
            raise RuntimeError(output.error)
        streams[i].append((at, output))
    return streams
