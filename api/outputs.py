"""An engine's outputs as an async generator that cancels its request when it is closed."""

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING

from api.callers import Terms
from api.models import Loaded, Models
from api.prompts import Prompt
from api.relay import Inbox
from api.repeats import Outputs, remembered
from tars_jax.config import SamplingParams
from tars_jax.engine.request import Output, Request, Usage, new_request_id
from tars_jax.errors import DeadlineExceeded, TarsError

if TYPE_CHECKING:
    from tars_jax.engine.engine import Engine


class CancelledByEngineError(TarsError):
    """The engine was closed under a request."""

    status = 499


def outputs(models: Models, loaded: Loaded, prompt: Prompt, params: SamplingParams, terms: Terms) -> Outputs:
    """The outputs of an answer. A model that thinks first does so freely: a grammar holds for what it says afterwards.

    Raises while iterating:
        ContextOverflow, InvalidRequest, ServerBusy: the engine refuses the prompt.
        DeadlineExceeded: its time ended before the first token.
        TarsError: the engine failed.
    """
    if params.grammar and prompt.opens_thinking:
        return _thinking_first(models, loaded, prompt.ids, params, terms)
    return _run(models, loaded, prompt.ids, params, terms)


async def _thinking_first(models: Models, loaded: Loaded, ids: tuple[int, ...], params: SamplingParams, terms: Terms) -> Outputs:
    """Two requests: the trace without the grammar, then the answer after it with the grammar."""
    tokenizer, trace = loaded.model.tokenizer, list[int]()
    free = dataclasses.replace(params, grammar=None, stop=("</think>",))
    async with contextlib.aclosing(_run(models, loaded, ids, free, terms)) as thinking:
        async for first in thinking:
            trace += first.token_ids
            if first.finish_reason != "stop":
                yield first
    if first.finish_reason != "stop":
        return
    end = [] if "</think>" in tokenizer.decode(trace) else tokenizer.encode("</think>", parse_special=True)
    yield Output(text=first.text + "</think>", token_ids=tuple(end))
    rest = None if params.max_tokens is None else max(0, params.max_tokens - len(trace))
    answer = _run(models, loaded, (*ids, *trace, *end), dataclasses.replace(params, max_tokens=rest), terms)
    async with contextlib.aclosing(answer) as answering:
        async for output in answering:
            yield dataclasses.replace(output, usage=_sum(first.usage, output.usage))


def _sum(first: Usage | None, second: Usage | None) -> Usage | None:
    """What both requests of an answer cost; reading the trace again is no part of the prompt."""
    if first is None or second is None:
        return None
    return dataclasses.replace(
        first,
        output_tokens=first.output_tokens + second.output_tokens,
        from_cache=first.from_cache and second.from_cache,
        decode_seconds=first.decode_seconds + second.queue_seconds + second.prefill_seconds + second.decode_seconds,
    )


def _run(models: Models, loaded: Loaded, ids: tuple[int, ...], params: SamplingParams, terms: Terms) -> Outputs:
    """The outputs of one request, computed or known."""
    return remembered(models, loaded, ids, params, terms.client, lambda: _computed(models, loaded, ids, params, terms))


async def _computed(models: Models, loaded: Loaded, ids: tuple[int, ...], params: SamplingParams, terms: Terms) -> Outputs:
    """The outputs of one request, from the engine."""
    relay, inbox = models.relay(), Inbox()
    recorder = models.telemetry.recorder(loaded.name)

    def sink(output: Output) -> None:
        recorder.output(output)
        relay.send(inbox, output)

    request = Request(new_request_id(), ids, params, sink, client=terms.client, priority=terms.priority, deadline=terms.deadline)
    engine, has_begun = loaded.engine, False
    # In a thread: compiling a grammar takes its time. Shielded: a request must not slip in after it was cancelled.
    submitted = asyncio.ensure_future(asyncio.to_thread(engine.submit, request))
    try:
        await asyncio.shield(submitted)
        while True:
            output = await inbox.get()
            if output.finish_reason == "error":
                raise TarsError(output.error or "the engine failed")
            if output.finish_reason == "cancelled":
                raise CancelledByEngineError("request canceled")
            if output.finish_reason == "timeout" and not has_begun:
                raise DeadlineExceeded(
                    "the request's time ended before its answer began; give it more, or try when the server is less busy"
                )
            has_begun = True
            yield output
            if output.finish_reason is not None:
                return
    finally:
        if submitted.done():
            engine.cancel(request.id)  # no effect on one that has ended
        else:
            submitted.add_done_callback(lambda task: _cancel(task, engine, request.id))


def _cancel(submitted: "asyncio.Task[None]", engine: "Engine", request_id: int) -> None:
    if submitted.exception() is None:
        engine.cancel(request_id)
