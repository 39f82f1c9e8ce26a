"""Requests that were asked before: answered from the response cache, else computed and kept."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from api.models import Loaded, Models
from tars_jax.config import SamplingParams
from tars_jax.engine.request import Output, Usage
from tars_jax.engine.responses import Key, is_repeatable, make_key

Outputs = AsyncGenerator[Output, None]


def remembered(
    models: Models, loaded: Loaded, ids: tuple[int, ...], params: SamplingParams, client: str, compute: Callable[[], Outputs]
) -> Outputs:
    """The outputs of a request: those of an equal one before it, piece by piece as they were, or what ``compute`` gives."""
    if not models.responses.is_on or not is_repeatable(params):
        return compute()
    version = loaded.engine.stats().weights_version
    # Weights that were changed in memory are known by the stay they were changed in; those of the file by its digest alone.
    weights = (loaded.stored.digest, version, loaded.number if version > 1 else 0)
    client = "" if models.settings.response_cache_shared else client
    key = make_key(weights, client, ids, params, loaded.engine.config.max_context)
    known = models.responses.get(key)
    models.telemetry.response_cache(loaded.name, is_hit=known is not None)
    if known is None:
        return _keeping(compute(), lambda made: _keep(models, loaded, key, version, made))
    return _replaying(models, loaded, known)


async def _keeping(outputs: Outputs, keep: Callable[[list[Output]], None]) -> Outputs:
    """The outputs as they come; ``keep`` gets all of them before the last one goes out."""
    made: list[Output] = []
    async with contextlib.aclosing(outputs) as stream:
        async for output in stream:
            made.append(output)
            if output.finish_reason is not None:
                keep(made)
            yield output


def _keep(models: Models, loaded: Loaded, key: Key, version: int, made: list[Output]) -> None:
    if loaded.engine.stats().weights_version == version:  # else the answer is partly of other weights
        models.responses.put(key, made)


async def _replaying(models: Models, loaded: Loaded, known: Sequence[Output]) -> Outputs:
    started = time.monotonic()
    for output in known:
        await asyncio.sleep(0)  # other requests have their turn between the pieces of a long answer
        if output.finish_reason is not None:
            models.telemetry.finished(loaded.name, output.finish_reason)
        yield _replayed(output, time.monotonic() - started)


def _replayed(output: Output, seconds: float) -> Output:
    """A kept piece; its usage says that nothing was computed, and how long sending it took."""
    if output.usage is None:
        return output
    prompt, answer = output.usage.prompt_tokens, output.usage.output_tokens
    usage = Usage(prompt, answer, cached_tokens=prompt, decode_seconds=seconds, from_cache=True)
    return dataclasses.replace(output, usage=usage)
