"""Measuring a model on this machine: prefill, decode at several batch sizes, start-up and memory; then where the time goes.

Rates are measured through the engine, as a user meets it: random prompt tokens, distinct between repetitions so that no cache can
help, and no guessing, which would measure how often the model repeats itself. Stages and limits are measured on the functions themselves.
"""

import dataclasses
import itertools
import math
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import ops
from tars_jax.cache import KVCache, RaggedBatch, init_cache
from tars_jax.config import EngineConfig, SamplingParams
from tars_jax.engine.engine import Engine
from tars_jax.engine.request import Output, Request, new_request_id
from tars_jax.engine.sizing import cache_dtype_of
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder, forward, logits
from tars_jax.rows import pack_row
from tars_jax.sample_rows import no_extras, unpack_rows
from tars_jax.sampling import sample

PAGE = 16
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


Stages = dict[str, float]  # milliseconds of each stage of a request's way


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What the machine could do, and the share of it that is reached.

    A decode step must read every weight once; a prefill must multiply by every weight once per token.
    """

    bandwidth_gb: float  # GB/s, measured by reading memory with all cores
    bytes_per_token: float  # of weights, by one stream
    decode_share: float  # of the bandwidth, by one stream
    gmacs: float  # 10^9 multiply-adds a second, measured on the model's largest block matrix at this many rows
    macs_per_token: float  # by the blocks' matrices
    prefill_share: float  # of that rate


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured. decode: total over the streams, by batch size."""

    prompt_tokens: int
    new_tokens: int
    prefill: Rate
    decode: dict[int, Rate]
    startup_seconds: float
    peak_rss_mb: float
    stages: dict[str, Stages]  # "prefill" and "decode"
    roofline: Roofline

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
            "stages_ms": {name: {stage: round(ms, 4) for stage, ms in stages.items()} for name, stages in self.stages.items()},
            "roofline": {field: round(value, 3) for field, value in dataclasses.asdict(self.roofline).items()},
        }


def measure(
    model: Model, *, prompt_tokens: int, new_tokens: int, batches: Sequence[int], repetitions: int, progress: Progress = lambda _: None
) -> Report:
    """Run the benchmark. Every shape is run once before it is timed; ``progress`` hears what is being measured."""
    context = max(prompt_tokens + 2, DECODE_PROMPT + new_tokens + 2)
    tokens = max(batches) * (DECODE_PROMPT + new_tokens + 2)
    config = EngineConfig(max_context=context, max_rows=max(batches), cache_tokens=max(tokens, context), prompt_lookup=False)
    engine = Engine(model, config)
    random = np.random.default_rng(0)
    try:
        progress(f"prefill of {prompt_tokens} tokens")
        prefill = [_prefill(engine, random, prompt_tokens) for _ in range(repetitions + 1)][1:]
        decode = {}
        for batch in batches:
            progress(f"decode, {batch} at once")
            _decode(engine, random, batch, new_tokens)
            engine.settle()
            decode[batch] = Rate(tuple(_decode(engine, random, batch, new_tokens) for _ in range(repetitions)))
    finally:
        engine.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    progress("stages")
    stages = {"prefill": measure_stages(model, prompt_tokens, repetitions), "decode": measure_stages(model, 1, 4 * repetitions)}
    roofline = measure_roofline(model, prompt_tokens, Rate(tuple(prefill)).median, stages["decode"])
    progress("start-up")
    return Report(prompt_tokens, new_tokens, Rate(tuple(prefill)), decode, startup(str(model.path)), peak, stages, roofline)


def measure_stages(model: Model, count: int, repetitions: int) -> Stages:
    """Milliseconds (medians) of the stages of ``count`` tokens, each as a program of its own.

    The blocks of one token attend to `DECODE_PROMPT` others. Tokenising is that of a text of so many tokens, detokenising its way back.
    """
    config, dtype, random = model.config, jnp.dtype(model.dtype), np.random.default_rng(0)
    cached = 0 if count > 1 else DECODE_PROMPT
    pages = -(-(cached + count) // PAGE)
    cache = init_cache(config, pages + 1, PAGE, jnp.dtype(cache_dtype_of(EngineConfig())))
    ids = random.integers(0, config.vocab_size, count).tolist()
    text = model.tokenizer.decode(ids)
    batch = RaggedBatch(
        tokens=jnp.asarray(ids, jnp.int32),
        positions=jnp.arange(cached, cached + count, dtype=jnp.int32),
        query_starts=jnp.array([0, count], jnp.int32),
        kv_lengths=jnp.array([cached + count], jnp.int32),
        page_tables=jnp.arange(1, pages + 1, dtype=jnp.int32)[None],
        prompts_at=jnp.zeros(1, jnp.int32) if count > 1 else None,
    )
    rows = unpack_rows(jnp.asarray(pack_row(length=cached + count)[None]), no_extras(1, config.vocab_size))
    table, mu = jnp.zeros((1, cached + count), jnp.int32), jnp.zeros(1, jnp.float32)

    @jax.jit
    def embed(params: Decoder) -> jax.Array:
        return ops.take(params.embed, batch.tokens, dtype)

    @jax.jit
    def blocks(params: Decoder, cache: KVCache) -> jax.Array:
        return forward(params, config, batch, cache, context=cached + count, dtype=dtype)[0][-1:]

    @jax.jit
    def head(params: Decoder, hidden: jax.Array) -> jax.Array:
        return sample(logits(params, config, hidden), rows, table, mu).tokens

    def time_of(work: Callable[[], Any]) -> float:
        return 1e3 * statistics.median(_times(work, max(repetitions, 3)))

    hidden = blocks(model.params, cache)
    embedding = time_of(lambda: embed(model.params))
    return {
        "tokenise": time_of(lambda: model.tokenizer.encode(text)),
        "embed": embedding,
        "blocks": max(time_of(lambda: blocks(model.params, cache)) - embedding, 0.0),
        "output head and sampling": time_of(lambda: head(model.params, hidden)),
        "detokenise": time_of(lambda: model.tokenizer.decode(ids)),
    }


def measure_roofline(model: Model, count: int, prefill: float, decode: Stages) -> Roofline:
    """Limits of this machine and the shares of them that ``prefill`` tokens per second and the stages of a decode reach."""
    weights = [leaf for leaf in jax.tree.leaves(model.params, is_leaf=_is_weight) if len(leaf.shape) == 2]
    in_blocks = [leaf for leaf in jax.tree.leaves(model.params.layers, is_leaf=_is_weight) if len(leaf.shape) == 2]
    tied = model.params.lm_head is None
    bytes_per_token = sum(w.nbytes for w in weights) - (0 if tied else model.params.embed.nbytes)
    largest = max(in_blocks, key=lambda w: math.prod(w.shape))
    x = jnp.ones((count, largest.shape[1]), jnp.dtype(model.dtype))
    multiply, prompts_at = jax.jit(ops.matmul), jnp.zeros(1, jnp.int32)

    bandwidth = measure_bandwidth()
    gmacs = count * math.prod(largest.shape) / min(_times(lambda: multiply(x, largest, prompts_at), 10)) / 1e9
    macs = sum(math.prod(w.shape) for w in in_blocks)
    seconds = (decode["blocks"] + decode["output head and sampling"]) / 1e3
    return Roofline(
        bandwidth_gb=bandwidth,
        bytes_per_token=bytes_per_token,
        decode_share=bytes_per_token / seconds / 1e9 / bandwidth,
        gmacs=gmacs,
        macs_per_token=macs,
        prefill_share=prefill * macs / 1e9 / gmacs,
    )


def measure_bandwidth(megabytes: int = 256) -> float:
    """GB/s at which all cores together read memory that no cache holds."""
    parts = np.array_split(np.ones(megabytes * 2**17, np.int64), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:  # numpy lets go of the interpreter's lock
        return megabytes * 2**20 / min(_times(lambda: list(pool.map(np.max, parts)), 8)) / 1e9


def _times(work: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of each run, after one that does not count."""
    jax.block_until_ready(work())
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begin)
    return times


def _is_weight(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


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
    streams = [[at for at, output in stream for _ in output.token_ids] for stream in _run(engine, random, batch, DECODE_PROMPT, count)]
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(begin < at <= end for times in streams for at in times) / (end - begin)


def _run(engine: Engine, random: np.random.Generator, batch: int, prompt: int, count: int) -> list[list[tuple[float, Output]]]:
    """Outputs of ``batch`` concurrent requests with their arrival times, taken down on the engine's thread: waking this one for each
    would cost as much as the engine's own part of a step."""
    streams: list[list[tuple[float, Output]]] = [[] for _ in range(batch)]
    left, done = itertools.count(batch - 1, -1), threading.Event()

    def take(stream: list[tuple[float, Output]], output: Output) -> None:
        stream.append((time.perf_counter(), output))
        if output.finish_reason and next(left) == 0:
            done.set()

    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    for stream in streams:
        ids = tuple(random.integers(0, engine.model.config.vocab_size, prompt).tolist())
        engine.submit(Request(new_request_id(), ids, params, partial(take, stream)))
    done.wait()
    for output in (stream[-1][1] for stream in streams):
        if output.error:
            raise RuntimeError(output.error)
    return streams
