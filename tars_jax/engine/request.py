"""A request from its prompt to its last token: what the user asked, what the engine knows, what goes back.

A request's life: ``Engine.submit`` checks it and puts a `Sequence` into the queue; the scheduler gives it a row and pages
and feeds its prompt in chunks; every sampled token passes through `Sequence.append`, which turns tokens into text, looks
for stop strings and decides when it ends; each `Output` goes to the request's sink, the last one with a finish reason.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Literal

from tars_jax.config import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]

_numbers = itertools.count(1)


def new_request_id() -> int:
    """A number no other request of this process has."""
    return next(_numbers)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a sampled token under the model (before penalties, filters and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a finished request cost. Times in seconds."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0  # prompt tokens whose KV pages were reused
    queue_seconds: float = 0.0  # submit to first step
    prefill_seconds: float = 0.0  # first step to first token
    decode_seconds: float = 0.0  # first token to last
    from_cache: bool = False  # the whole answer came from the response cache: nothing was computed


@dataclasses.dataclass(frozen=True)
class Output:
    """A piece of an answer. The last piece of every answer has a ``finish_reason`` and a ``usage``."""

    index: int = 0  # of the answer, in a request for several
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt's tokens but the first; before the first piece of text
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error"
    usage: Usage | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asked of an engine. ``sink`` is called from the engine's thread and must not block."""

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sink: Callable[[Output], None]
    client: str = ""  # whose request it is: the fair queue shares the engine between clients
    priority: int = 0  # lower goes first
    deadline: float | None = None  # seconds, time.monotonic(): the request ends with "timeout" when it has not finished by then
    adapters: tuple[tuple[str, float], ...] = ()  # names of `Engine.add_adapter` and their strengths
    created: float = dataclasses.field(default_factory=time.monotonic)
