"""A request on its way through the engine: its tokens, its place on the device, and the text it has produced."""

import time
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from tars_jax.chat.splitters import MARKERS
from tars_jax.engine.masks import Mask, ends_of
from tars_jax.engine.request import FinishReason, Output, Request, TokenLogprob, Usage
from tars_jax.engine.speculation import Speculation
from tars_jax.rows import FIELDS, is_plain, pack_biases, pack_row
from tars_jax.tokenizer import TextStream, Tokenizer

MAX_SHIFTED = 10  # contexts an answer may fill by shifting, as in Ollama
MOST_ENDS = 8  # tokens that end a row which a program looks at: with more of them it may only go on for nothing


class Share(NamedTuple):
    """An adapter's part in a sequence (see `engine.adapters`): its number, its ranks from .. to in every update, and their strength."""

    id: int
    start: int
    stop: int
    strength: float


class StopStrings:
    """Cuts text at the first stop string, and holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str, *, stops: bool = True) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was found (the rest is then dropped). ``stops``: look for one."""
        if not (self._stops and stops):
            return self.flush() + text, False
        text, self._held = self._held + text, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        hold = max(self._overlap(text, stop) for stop in self._stops)
        if hold:
            text, self._held = text[:-hold], text[-hold:]
        return text, False

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class Sequence:
    """What the engine knows of a request.

    ``tokens`` are the known ones: prompt and answer. ``length`` counts also those sampled on the device and not read yet,
    ``computed`` those that were sent to be written to the cache. A sequence can go into a step while computed < length.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, max_context: int, *, mask: Mask | None = None, index: int = 0) -> None:
        self.request, self.params, self.index = request, request.params, index
        self.tokens = list(request.prompt_ids)
        self.prompt_length = self.length = len(self.tokens)
        self.computed = 0
        self.guessed = 0  # tokens guessed in the step that is under way: how many it makes is not known before it is read
        self.slot = -1  # row of the device's token table; -1: not running
        self.pages: list[int] = []
        self.shared = 0  # pages, the first ones, that others may use too
        self.node = 0  # the last of these in the page allocator
        self.dropped = 0  # pages, the first ones, that were given back because no later token sees them
        self.cached = 0  # tokens whose pages were there before, when it last started
        self.reused = 0  # prompt tokens that never had to be computed
        self.charged = 0  # tokens its client has paid for
        self.yielded = False  # whether it let others go first in the last step
        self.speculation: Speculation | None = None
        self.adapters: tuple[Share, ...] = ()
        self.mask = mask
        self.breakers: np.ndarray | None = None  # tokens that end DRY's repetitions, as bits
        self.biases = pack_biases(self.params.logit_bias) if self.params.logit_bias else None
        self.mu = 2 * self.params.mirostat_tau  # bits: where mirostat stands after the tokens read
        self.finish_reason: FinishReason | None = None
        self.max_context = max_context
        bos = bool(getattr(tokenizer, "add_bos", False))
        self._num_keep = self.prompt_length if self.params.num_keep < 0 else self.params.num_keep + bos
        room = MAX_SHIFTED * max_context if self.params.shift else max_context - self.prompt_length
        self.max_tokens = room if self.params.max_tokens is None else min(self.params.max_tokens, room)
        self._prompt_logprobs: list[TokenLogprob] = []
        seed = self.params.seed if self.params.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
        self.seed = seed + index
        self.numbers = self._numbers(max_context)  # int32, how its tokens are sampled
        self._plain = is_plain(self.numbers)
        self._ends = ends_of(self.params, tokenizer)
        self.ends = np.full(MOST_ENDS, -1, np.int32)  # as far as a program looks at them
        self.ends[: len(self._ends)] = sorted(self._ends)[:MOST_ENDS]
        self._text = TextStream(tokenizer, continues=True, keep=MARKERS)
        self._stops = StopStrings(self.params.stop)
        self.started = self.first_token = 0.0  # seconds, time.monotonic()

    def _numbers(self, max_context: int) -> np.ndarray:
        p = self.params
        same = {name: getattr(p, name) for name in FIELDS if hasattr(p, name)}
        other = {
            "window": max_context if p.repeat_last_n < 0 else p.repeat_last_n,
            "dry_window": max_context if p.dry_penalty_last_n < 0 else p.dry_penalty_last_n,
            "seed": self.seed & 0xFFFFFFFF,
            "top_logprobs": p.top_logprobs if p.logprobs else -1,
            "biased": self.biases is not None,
        }
        return pack_row(**{**same, **other})

    @property
    def plain(self) -> bool:
        """Whether the smaller sampler does for it."""
        return self._plain and self.mask is None

    @property
    def order(self) -> tuple[int, int]:
        """Earlier requests go first within a priority."""
        return self.request.priority, self.request.id

    @property
    def produced(self) -> int:
        """Tokens of the answer that were read."""
        return len(self.tokens) - self.prompt_length

    @property
    def awaits_mask(self) -> bool:
        """Whether its token under way must be read before the next one can be sampled."""
        return self.mask is not None and self.mask.depends and self.pending > 1

    @property
    def pending(self) -> int:
        """Tokens sampled on the device and not read yet."""
        return self.length - len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens still to be sent to the device."""
        return self.length - self.computed

    @property
    def in_prompt(self) -> bool:
        """Whether the next token to be sent is the prompt's."""
        return self.computed < self.prompt_length

    @property
    def to_read(self) -> int:
        """Tokens that may be sent to the device together: the prompt's, or those after it."""
        return (self.prompt_length if self.in_prompt else self.length) - self.computed

    @property
    def room(self) -> int:
        """Tokens that may still be sampled, beside those under way."""
        return min(self.max_tokens + self.prompt_length, self.max_context) - self.length

    @property
    def ready(self) -> bool:
        """Whether the next step may include this sequence."""
        exhausted = self.room <= 0
        must_be_read = self.guessed > 0 and self.pending > 0
        return self.finish_reason is None and not exhausted and not must_be_read

    def advance(self, count: int, guessed: int = 0) -> bool:
        """Note that ``count`` tokens, and guesses at what follows them, go into a step; True if the step samples the next token."""
        self.started = self.started or time.monotonic()
        self.computed += count
        self.guessed = guessed
        if self.computed < self.length:
            return False
        self.length += 1
        return True

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt is still to be scored: then no part of it may come from the cache."""
        return self.params.prompt_logprobs is not None and len(self._prompt_logprobs) < len(self.request.prompt_ids) - 1

    def score(self, start: int, scored: SequenceOf[TokenLogprob]) -> None:
        """Take the log-probabilities of the prompt's tokens from position ``start`` on; when they are complete they go to the sink."""
        self._prompt_logprobs += scored[len(self._prompt_logprobs) + 1 - start :]
        if not self.wants_prompt_logprobs and self.finish_reason is None:
            self.request.sink(Output(index=self.index, prompt_logprobs=tuple(self._prompt_logprobs)))

    @property
    def must_shift(self) -> bool:
        """Whether it can only go on in a window that has moved."""
        return self.params.shift and self.finish_reason is None and not self.pending and len(self.tokens) >= self.max_context

    def shift(self) -> None:
        """Forget half of the tokens after those to keep; everything left is to be computed anew. ``prompt_length`` stays where the
        answer began, now perhaps before the window."""
        keep = min(self._num_keep, self.max_context - 2)
        discard = max((len(self.tokens) - keep) // 2, 1)
        del self.tokens[keep : keep + discard]
        self.length -= discard
        self.prompt_length -= discard
        self.speculation = None  # it counts the tokens
        self.seed += 0x9E3779B9  # positions come again: their noise must not
        self.numbers = self._numbers(self.max_context)

    def restart(self, *, unread_lost: bool = False) -> None:
        """Forget what is on the device: pages and row were given away. ``unread_lost``: tokens not read yet will never be."""
        self.computed, self.slot, self.pages, self.shared, self.dropped = 0, -1, [], 0, 0
        if unread_lost:
            self.length, self.guessed = len(self.tokens), 0

    def accept(self, sampled: SequenceOf[TokenLogprob], guesses: SequenceOf[int]) -> int:
        """Take the tokens a step has sampled, up to the first that was not guessed; how many of the guesses came true.

        Only the first was counted on: the others are as if the step had computed their guesses as known tokens.
        """
        true = next((i for i, guess in enumerate(guesses) if sampled[i].token_id != guess), len(guesses))
        accepted = max(self._take(sampled[: true + 1]) - 1, 0)
        self.length += accepted
        if guesses:
            self.guessed = 0
        if self.slot >= 0:  # else it was preempted meanwhile
            self.computed += accepted
        if self.speculation is not None:
            self.speculation.judge(len(guesses), accepted)
        return accepted

    def take(self, sampled: SequenceOf[TokenLogprob]) -> int:
        """Take the tokens of several steps, up to its end; how many there were."""
        taken = self._take(sampled)
        if self.speculation is not None:
            for _ in range(taken):
                self.speculation.judge(0, 0)
        return taken

    def _take(self, sampled: SequenceOf[TokenLogprob]) -> int:
        """Take sampled tokens, up to its end; their text goes to the sink in one piece. How many there were."""
        if self.finish_reason is not None:
            return 0
        self.first_token = self.first_token or time.monotonic()
        text, shown, flush = "", list[TokenLogprob](), True
        reason: FinishReason | None = None
        before = len(self.tokens)
        for token in sampled:
            self.tokens.append(token.token_id)
            if token.token_id in self._ends:
                reason = "stop"
                break
            shown.append(token)
            if self.mask is not None and self.mask.constraint is not None:
                self.mask.constraint.consume(token.token_id)
            piece, stopped = self._stops.push(self._text.push(token.token_id), stops=self.produced >= self.params.min_tokens)
            text += piece
            if stopped:
                reason, flush = "stop", False
                break
            if self.produced >= self.max_tokens:
                reason = "length"
                break
        if shown:
            logprobs = tuple(shown) if self.params.logprobs else ()
            self.request.sink(Output(index=self.index, text=text, token_ids=tuple(token.token_id for token in shown), logprobs=logprobs))
        taken = len(self.tokens) - before
        if reason is not None:
            self.finish(reason, flush=flush)
        return taken

    def finish(self, reason: FinishReason, *, flush: bool = True, error: str | None = None) -> None:
        """End the request, once: the last output carries the reason and the usage."""
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        text = self._rest() if flush else ""
        self.request.sink(Output(index=self.index, text=text, finish_reason=reason, error=error, usage=self._usage()))

    def _rest(self) -> str:
        text, stopped = self._stops.push(self._text.flush())
        return text if stopped else text + self._stops.flush()

    def _usage(self) -> Usage:
        now = time.monotonic()
        started = self.started or now
        first = self.first_token or now
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=self.produced,
            cached_tokens=self.reused,
            queue_seconds=started - self.request.created,
            prefill_seconds=first - started,
            decode_seconds=now - first,
        )
