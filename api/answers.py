"""Generation without a transport: requests in, Ollama-shaped dictionaries out. HTTP and the command line both use these.

An answer's life: the request is checked against its model's options; the model is held (loaded first if need be); the prompt is
rendered and tokenised in a thread; the engine's outputs come through a queue, are split into text, thinking and tool calls, and
leave as chunks; the last chunk has the measures. Closing the generator cancels the request in the engine.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from api.callers import Terms
from api.durations import nanoseconds, timestamp
from api.models import Loaded, Models
from api.options import check_top_logprobs, merge_options
from api.outputs import outputs
from api.prompts import Prompt, chat_prompt, generate_prompt, without_middle
from api.schema import ChatRequest, GenerateRequest, grammar
from api.splitting import Piece, Splitter
from tars_jax.chat import ToolCall
from tars_jax.config import SamplingParams
from tars_jax.engine.request import Output, TokenLogprob, Usage
from tars_jax.errors import DeadlineExceeded, InvalidRequest, ModelNotFound

Chunk = dict[str, Any]
AnyRequest = GenerateRequest | ChatRequest
T = TypeVar("T")
R = TypeVar("R", GenerateRequest, ChatRequest)


async def generate_chunks(models: Models, request: GenerateRequest, client: str = "") -> AsyncGenerator[Chunk, None]:
    """POST /api/generate, of one of the clients that share the engine. Errors before the first chunk are raised with their HTTP
    status, as those after it."""
    check_top_logprobs(request.top_logprobs)
    if not request.model:
        raise ModelNotFound("model '' not found")
    if request.raw and (request.template or request.system or request.context):
        raise InvalidRequest("raw mode does not support template, system, or context")
    async with contextlib.aclosing(_chunks(models, request, client, not request.prompt, generate_prompt)) as chunks:
        async for chunk in chunks:
            yield chunk


async def chat_chunks(models: Models, request: ChatRequest, client: str = "") -> AsyncGenerator[Chunk, None]:
    """POST /api/chat. Clients and errors as with `generate_chunks`."""
    check_top_logprobs(request.top_logprobs)
    if not request.model:
        raise InvalidRequest("model is required")
    async with contextlib.aclosing(_chunks(models, request, client, not request.messages, chat_prompt)) as chunks:
        async for chunk in chunks:
            yield chunk


async def collect(chunks: AsyncGenerator[Chunk, None]) -> Chunk:
    """All chunks of an answer as the one object of ``stream: false``."""
    whole: Chunk = {}
    async for chunk in chunks:
        whole = _joined(whole, chunk)
    return whole


def _joined(whole: Chunk, chunk: Chunk) -> Chunk:
    """Texts and lists are joined, everything else is the newer one's."""
    joined = {**whole, **chunk}
    for key in ("response", "thinking", "content"):
        if key in whole:
            joined[key] = whole[key] + chunk.get(key, "")
    for key in ("tool_calls", "logprobs"):
        if key in whole:
            joined[key] = [*whole[key], *chunk.get(key, [])]
    if "message" in whole:
        joined["message"] = _joined(whole["message"], chunk["message"])
    return joined


async def _chunks(
    models: Models, request: R, client: str, is_empty: bool, make_prompt: Callable[[Loaded, R], Prompt]
) -> AsyncGenerator[Chunk, None]:
    """What both endpoints do; an empty request only loads, or unloads, the model."""
    started = time.monotonic()
    stored = models.store.find(request.model)
    if is_empty and request.keep_alive == 0:
        await models.unload(request.model)
        yield _chunk(request, Piece(), done=True, done_reason="unload")
        return
    _check_support(request, str(stored.name))
    options = merge_options(
        request.options,
        stored.params,
        grammar=grammar(request.format),
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        shift=request.shift,
    )
    terms = Terms(client, options.priority, None if options.timeout is None else started + options.timeout)
    async with contextlib.AsyncExitStack() as stack:
        use = models.use(request.model, num_ctx=options.num_ctx, keep_alive=request.keep_alive)
        loaded = await _before(terms.deadline, stack.enter_async_context(use))
        load_seconds = time.monotonic() - started
        if is_empty:
            yield _chunk(request, Piece(), done=True, done_reason="load")
            return
        prompt = await asyncio.to_thread(make_prompt, loaded, request)
        if request.shift:
            prompt = without_middle(prompt, loaded, options.sampling.num_keep)
        if request.debug_render_only:
            yield {"model": request.model, "created_at": timestamp(), "_debug_info": {"rendered_template": prompt.text, "image_count": 0}}
            return
        answer = _Answer(request, loaded, prompt, started, load_seconds)
        async with contextlib.aclosing(answer.chunks(models, options.sampling, terms)) as chunks:
            async for chunk in chunks:
                yield chunk


async def _before(deadline: float | None, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled at the deadline (`time.monotonic`): then `DeadlineExceeded`."""
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise DeadlineExceeded("the request's time ended while its model was loading; give it more, or load the model first") from None


def _check_support(request: AnyRequest, full_name: str) -> None:
    if isinstance(request, GenerateRequest):
        if request.suffix:
            raise InvalidRequest(f"{full_name} does not support insert")
        has_images = bool(request.images)
    else:
        has_images = any(message.images for message in request.messages)
    if has_images:
        raise InvalidRequest(f"{full_name} does not support images")


def _call(index: int, call: ToolCall) -> Chunk:
    return {"id": f"call_{secrets.token_hex(4)}", "function": {"index": index, "name": call.name, "arguments": call.arguments}}


def _chunk(request: AnyRequest, piece: Piece, calls: Sequence[Chunk] = (), **fields: Any) -> Chunk:
    """A chunk in the shape of the request's endpoint."""
    extras: Chunk = {"thinking": piece.thinking} if piece.thinking else {}
    if calls:
        extras["tool_calls"] = list(calls)
    shaped: Chunk
    if isinstance(request, ChatRequest):
        shaped = {"message": {"role": "assistant", "content": piece.text, **extras}}
    else:
        shaped = {"response": piece.text, **extras}
    return {"model": request.model, "created_at": timestamp(), **shaped, "done": False, **fields}


class _Answer:
    """One answer on its way out."""

    def __init__(self, request: AnyRequest, loaded: Loaded, prompt: Prompt, started: float, load_seconds: float) -> None:
        self._request, self._loaded, self._prompt = request, loaded, prompt
        self._started, self._load_seconds = started, load_seconds
        self._splitter = Splitter(prompt)
        self._ids: list[int] = []
        self._calls = 0

    async def chunks(self, models: Models, sampling: SamplingParams, terms: Terms) -> AsyncGenerator[Chunk, None]:
        pending: list[Chunk] = []  # logprobs of tokens whose text is still held back
        async with contextlib.aclosing(outputs(models, self._loaded, self._prompt, sampling, terms)) as stream:
            async for output in stream:
                self._ids += output.token_ids
                pending += map(self._logprob, output.logprobs)
                piece = self._splitter.push(output.text)
                if output.finish_reason is not None:
                    piece += self._splitter.flush()
                if piece or (pending and output.finish_reason is not None):
                    yield self._chunk(piece, pending)
                    pending = []
                if output.finish_reason is not None:
                    yield self._last(output)

    def _chunk(self, piece: Piece, logprobs: list[Chunk]) -> Chunk:
        calls = [_call(self._calls + i, call) for i, call in enumerate(piece.tool_calls)]
        self._calls += len(calls)
        return _chunk(self._request, piece, calls, **({"logprobs": logprobs} if logprobs else {}))

    def _last(self, output: Output) -> Chunk:
        measures: Chunk = {
            "total_duration": nanoseconds(time.monotonic() - self._started),
            "load_duration": nanoseconds(self._load_seconds),
        }
        if output.usage is not None:
            measures |= _usage(output.usage)
        fields = {key: value for key, value in measures.items() if value}
        if isinstance(self._request, GenerateRequest) and not self._request.raw:
            fields["context"] = [*self._prompt.ids, *self._ids]
        return _chunk(self._request, Piece(), done=True, done_reason=output.finish_reason, **fields)

    def _logprob(self, entry: TokenLogprob) -> Chunk:
        shown = self._token(entry.token_id, entry.logprob)
        if self._request.top_logprobs:
            shown["top_logprobs"] = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return shown

    def _token(self, token_id: int, logprob: float) -> Chunk:
        data = self._loaded.model.tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": min(logprob, 0.0), "bytes": list(data)}


def _usage(usage: Usage) -> Chunk:
    return {
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_cached_count": usage.cached_tokens,
        "prompt_eval_duration": nanoseconds(usage.prefill_seconds),
        "eval_count": usage.output_tokens,
        "eval_duration": nanoseconds(usage.decode_seconds),
        "cached": usage.from_cache,
    }
