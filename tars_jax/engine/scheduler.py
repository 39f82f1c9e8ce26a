"""Who is in the next step: plain Python over plain objects.

Every step takes one token of each sequence that decodes, then prompt chunks of those still being read, then new requests, until the
step's token budget is used. Among equals the client that has been served least comes first (`fairness`). When pages run out the
latest arrival is put back into the queue and later computed anew; the earliest therefore always advances. When another client uses
rows beyond its share, a client that has none takes one of them, and is read before the others go on.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable

from tars_jax.engine.fairness import FairQueue
from tars_jax.engine.pages import PageAllocator
from tars_jax.engine.sequence import Sequence
from tars_jax.engine.speculation import FROM_DEVICE

GUESS_STEP = 16  # tokens of a step up to which guesses are cheap: more cost as much as the decodes they may save


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of one sequence's tokens in a step."""

    sequence: Sequence
    start: int  # position of the first token
    count: int  # without guesses
    samples: bool  # whether the step ends in a new token for it
    guesses: tuple[int, ...] = ()  # tokens that may follow; each one's successor is sampled too
    steps: int = 0  # in one program with their sampling, each after the token of the one before (`decodes`); 0: a step of the usual kind

    @property
    def tokens(self) -> int:
        return self.count + len(self.guesses)

    @property
    def reads_prompt(self) -> bool:
        """Whether its tokens are a prompt's: none is of both kinds, and in a plan these come last (see `cache.RaggedBatch`)."""
        return self.start < self.sequence.prompt_length

    @property
    def is_plain_decode(self) -> bool:
        """Whether all that the host does for the next token can be done without it."""
        return self.samples and self.tokens == 1 and self.sequence.plain and not (self.reads_prompt or self.sequence.wants_prompt_logprobs)

    @property
    def drafts(self) -> bool:
        """Whether the guesses are still to be made, by a model on the device."""
        return FROM_DEVICE in self.guesses


Plan = tuple[Span, ...]


class Scheduler:
    """Queue, running sequences and their pages."""

    def __init__(self, pages: PageAllocator, *, max_rows: int, max_step_tokens: int, reuse: bool = True, window: int = 0) -> None:
        """``reuse``: begin with the pages of earlier requests where the tokens are the same. ``window``: tokens back that every layer
        of the model sees, 0 for all; what lies further back is given free."""
        self.pages = pages
        self.root: Hashable = 0  # what keys and values depend on beside the tokens: pages are shared within one root
        self.num_reused = self.num_missed = 0  # prompt tokens found and not found in kept pages
        self.num_preemptions = 0
        self.max_step_tokens = max_step_tokens
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # in the order in which they began
        self._reuse, self._window, self._max_rows = reuse, window, max_rows
        self._rows: Counter[str] = Counter()  # running sequences of each client
        self._free_slots = list(range(max_rows - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.enter(sequence)

    def schedule(self, budget: int | None = None) -> Plan:
        """Plan one step of at most ``budget`` tokens, or of as many as a step may have; empty when nobody can advance now."""
        self._budget = min(budget or self.max_step_tokens, self.max_step_tokens)
        self._spans: dict[Sequence, Span] = {}
        for sequence in [s for s in self.running if s.must_shift]:
            self._put_back(sequence)
        self._make_room()
        for sequence in self._turns():
            if sequence.slot >= 0:  # not preempted meanwhile by an earlier one
                self._plan(sequence)
        while self.waiting and self._budget and self._free_slots and self._admit(self.waiting.first()):
            pass
        return tuple(sorted(self._spans.values(), key=lambda span: span.reads_prompt))

    def prolong(self, plan: Plan, most: int) -> Plan:
        """The plan just made, as one of 1 to ``most`` decodes in one program if nothing else runs and nobody waits; else as it is."""
        if not plan or self.waiting or len(plan) < len(self.running) or not all(span.is_plain_decode for span in plan):
            return plan
        if any(span.sequence.speculation and span.sequence.speculation.propose(span.sequence.tokens, 1) for span in plan):
            return plan  # there is something to guess as soon as the tokens under way are known
        more = min(most - 1, *(span.sequence.room for span in plan))
        missing = [self.pages.pages_for(span.sequence.computed + more) - len(span.sequence.pages) for span in plan]
        if sum(missing) > self.pages.num_free:
            return plan
        for span, pages in zip(plan, missing, strict=True):
            span.sequence.pages += self.pages.allocate(max(pages, 0))
            self.waiting.charge(span.sequence, more)
            for _ in range(more):
                span.sequence.advance(1)
        return tuple(dataclasses.replace(span, steps=1 + more) for span in plan)

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence, wherever it is. Steps already under way may still write its pages: the device runs
        steps in order, so a later owner's writes win."""
        if sequence.slot >= 0:
            self._vacate(sequence)
        else:
            self.waiting.remove(sequence)
        self.waiting.leave(sequence)

    def _turns(self) -> Iterable[Sequence]:
        """The running sequences that can advance, in the order in which the step's tokens are given out."""
        ready = [s for s in self.running if s.ready]
        decodes, prompts = [s for s in ready if s.remaining == 1], [s for s in ready if s.remaining > 1]
        prompts.sort(key=self.waiting.rank)
        self._room_for_guesses = min(GUESS_STEP, self._max_rows) - len(decodes) if not prompts and not self.waiting else 0
        newcomer = self._newcomer(prompts)
        if newcomer is None:
            return decodes + prompts
        share = 2 * max(self._rows[newcomer.request.client], 1)
        behind = [s for s in ready if self._rows[s.request.client] > share and not s.yielded]
        for sequence in ready:
            sequence.yielded = sequence in behind
        turns = [s for s in decodes + prompts if not s.yielded]
        if behind:  # nothing else makes the newcomer's step longer; it may be twice as long, as they have more than their share
            others = sum(s.remaining == 1 for s in turns)
            self._budget = min(2 * self._budget, newcomer.remaining + others, self.max_step_tokens)
        return turns

    def _newcomer(self, prompts: list[Sequence]) -> Sequence | None:
        """The sequence that waits for its first token and whose turn it is."""
        candidates = [s for s in prompts[:1] if not s.first_token]
        if self.waiting and self._free_slots:
            candidates.append(self.waiting.first())
        return min(candidates, key=self.waiting.rank, default=None)

    def _make_room(self) -> None:
        """Take a row from the client with the most when there is none for a client that has none."""
        if self._free_slots or not self.waiting:
            return
        first = self.waiting.first()
        client, rows = self._rows.most_common(1)[0]
        if rows > 1 and not self._rows[first.request.client] and not first.pending:
            latest = max((s for s in self.running if s.request.client == client), key=lambda s: s.order)
            if latest.request.priority >= first.request.priority:
                self._preempt(latest)

    def _plan(self, sequence: Sequence) -> bool:
        self._drop(sequence)
        count = min(sequence.to_read, self._budget)
        guesses = self._guesses(sequence)
        if not count or not self._grow(sequence, sequence.computed + count + len(guesses)):
            return False
        start = sequence.computed
        self.waiting.charge(sequence, count)
        samples = sequence.advance(count, len(guesses))
        self._spans[sequence] = Span(sequence, start, count, samples, guesses)
        self._budget -= count + len(guesses)
        self._share(sequence)
        return True

    def _guesses(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens to try after a decode's own. If that one is being sampled it is guessed too, and what follows it goes into the step."""
        if sequence.speculation is None or sequence.in_prompt or sequence.remaining != 1 or sequence.pending > 1:
            return ()
        left = min(sequence.max_tokens + sequence.prompt_length, sequence.max_context) - sequence.length - 1
        room = min(self._room_for_guesses, self._budget - 1, left)
        if room <= 0:
            return ()
        guesses = sequence.speculation.propose(sequence.tokens, room + sequence.pending)[sequence.pending :]
        self._room_for_guesses -= len(guesses)
        return guesses

    def _share(self, sequence: Sequence) -> None:
        """Let others use the pages that are full of known tokens once this step has run."""
        size = self.pages.page_size
        if not self._reuse:
            return
        for page in range(sequence.shared, min(sequence.computed, len(sequence.tokens)) // size):
            tokens = tuple(sequence.tokens[page * size : (page + 1) * size])
            sequence.node = self.pages.share(sequence.node, tokens, sequence.pages[page])
            sequence.shared = page + 1

    def _drop(self, sequence: Sequence) -> None:
        """Let pages go that no later token of the sequence can see."""
        unseen = min((sequence.computed - self._window + 1) // self.pages.page_size, len(sequence.pages)) if self._window else 0
        if unseen > sequence.dropped:
            self.pages.free(sequence.pages[sequence.dropped : unseen])
            sequence.pages[sequence.dropped : unseen] = [0] * (unseen - sequence.dropped)
            sequence.dropped = unseen

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if its first chunk finds pages; never at a running one's cost."""
        if sequence.must_shift:
            sequence.shift()
        if sequence.pending or not sequence.ready:
            return False
        self._begin(sequence)
        needed = self.pages.pages_for(sequence.computed + min(sequence.to_read, self._budget)) - len(sequence.pages)
        if needed > self.pages.num_free:
            self.pages.free(sequence.pages)
            sequence.restart()
            return False
        self.waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        self._rows[sequence.request.client] += 1
        if not sequence.started:
            sequence.reused = sequence.cached
            self.num_reused += sequence.cached
            self.num_missed += sequence.remaining
        return self._plan(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """Give a sequence the pages that earlier ones have filled with the same tokens."""
        pages: list[int] = []
        if self._reuse and not sequence.wants_prompt_logprobs:
            root = (self.root, sequence.adapters) if sequence.adapters else self.root
            pages, sequence.node = self.pages.match(sequence.tokens, root)
        sequence.pages, sequence.shared = pages, len(pages)
        sequence.computed = sequence.cached = len(pages) * self.pages.page_size

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence pages for ``tokens`` tokens, preempting later arrivals that are not in this step yet."""
        missing = self.pages.pages_for(tokens) - len(sequence.pages)
        while missing > self.pages.num_free:
            later = [s for s in self.running if s.order > sequence.order and s not in self._spans]
            if not later:
                return False
            self._preempt(max(later, key=lambda s: s.order))
        sequence.pages += self.pages.allocate(max(missing, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        self.waiting.put_back(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rows[sequence.request.client] -= 1
        self.pages.free(sequence.pages[sequence.dropped :])
        self._free_slots.append(sequence.slot)
        sequence.restart()
