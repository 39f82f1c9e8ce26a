"""Answers kept for exact repetitions of their requests.

An answer is kept only when asking again would give it again: greedy, or with a seed. What it depends on is its key (`make_key`), so
an answer never becomes wrong; the time to live lets go of a user's text. Two equal requests at the same time are
both computed: they share their prompt's pages, and neither waits for a stream it does not control. Used from one thread.
"""

import dataclasses
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from tars_jax.config import SamplingParams
from tars_jax.engine.request import Output

Key = tuple[Hashable, ...]


def is_repeatable(params: SamplingParams) -> bool:
    """Whether a request so sampled has the same answer each time."""
    return params.temperature == 0 or params.seed is not None


def make_key(model: Hashable, client: str, prompt_ids: Sequence[int], params: SamplingParams, max_context: int) -> Key:
    """What the answer to a repeatable request depends on. model: the file's digest, the weights' version, adapters; client: who may
    be given the answer."""
    return model, client, array("i", prompt_ids).tobytes(), params, max_context


@dataclasses.dataclass
class _Entry:
    outputs: tuple[Output, ...]
    nbytes: int
    expires: float  # time.monotonic()


class ResponseCache:
    """Answers by key, the one unused longest leaving first when their bytes would exceed ``max_bytes``; none is given ``ttl`` seconds
    after it was made. Where either is 0 nothing is kept."""

    def __init__(self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self.ttl = max_bytes, ttl
        self.nbytes = 0
        self.hits = self.misses = 0
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_on(self) -> bool:
        return self.max_bytes > 0 and self.ttl > 0

    def get(self, key: Key) -> tuple[Output, ...] | None:
        """The pieces of an answer as they were streamed; counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is not None and entry.expires <= self._clock():
            self._remove(key)
            entry = None
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, key: Key, outputs: Sequence[Output]) -> None:
        """Keep a whole answer, whose last piece says why it ended. One that alone exceeds the bytes is not kept, nor one that failed."""
        if not outputs or outputs[-1].finish_reason not in ("stop", "length"):
            return
        self._remove(key)
        nbytes = answer_nbytes(key, outputs)
        if nbytes > self.max_bytes or self.ttl <= 0:
            return
        now = self._clock()
        while self._entries and (self.nbytes + nbytes > self.max_bytes or self._oldest.expires <= now):
            self._remove(next(iter(self._entries)))
        self._entries[key] = _Entry(tuple(outputs), nbytes, now + self.ttl)
        self.nbytes += nbytes

    def clear(self) -> None:
        """Forget all answers."""
        self._entries.clear()
        self.nbytes = 0

    @property
    def _oldest(self) -> _Entry:
        """The one unused longest."""
        return next(iter(self._entries.values()))

    def _remove(self, key: Key) -> None:
        if entry := self._entries.pop(key, None):
            self.nbytes -= entry.nbytes


def answer_nbytes(key: Key, outputs: Sequence[Output]) -> int:
    """Bytes that an answer and its key take: an estimate from above, quickly made (`tracemalloc` found 85 to 92 % of it)."""
    return 512 + _size(key) + sum(map(_output_nbytes, outputs))  # 512: the entry and its place in the table


def _output_nbytes(output: Output) -> int:
    logprobs = sum(280 + 115 * len(entry.top) for entry in (*output.logprobs, *output.prompt_logprobs))
    return 224 + sys.getsizeof(output.text) + 36 * len(output.token_ids) + logprobs


def _size(value: Any) -> int:
    if isinstance(value, tuple):
        return sys.getsizeof(value) + sum(map(_size, value))
    if dataclasses.is_dataclass(value):
        values = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return 64 + 16 * len(values) + sum(map(_size, values))
    return sys.getsizeof(value)
