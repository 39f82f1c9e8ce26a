"""Who is in the next step: plain Python over plain objects.

Every step takes one token of each sequence that decodes, then prompt chunks of those still being read, then new requests,
first come first served, until the step's token budget is used. When pages run out the latest arrival is put back into the
queue and later computed anew; the earliest therefore always advances.
"""

import dataclasses
from collections import deque
from collections.abc import Hashable

from tars_jax.engine.pages import PageAllocator
from tars_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of one sequence's tokens in a step."""

    sequence: Sequence
    start: int  # position of the first token
    count: int
    samples: bool  # whether the step ends in a new token for it


Plan = tuple[Span, ...]


class Scheduler:
    """Queue, running sequences and their pages."""

    def __init__(self, pages: PageAllocator, *, max_rows: int, max_step_tokens: int, reuse: bool = True) -> None:
        """``reuse``: begin with the pages of earlier requests where the tokens are the same."""
        self.pages = pages
        self.root: Hashable = 0  # what keys and values depend on beside the tokens: pages are shared within one root
        self.num_reused = self.num_missed = 0  # tokens, at admission
        self._reuse = reuse
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self._free_slots = list(range(max_rows - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """Plan one step; empty when nobody can advance now."""
        self._budget = self.max_step_tokens
        self._spans: dict[Sequence, Span] = {}
        ready = [s for s in self.running if s.ready]
        for sequence in sorted(ready, key=lambda s: s.remaining > 1):  # stable: decodes first, then by arrival
            if sequence.slot >= 0:  # not preempted meanwhile by an earlier one
                self._plan(sequence)
        while self.waiting and self._budget and self._free_slots and self._admit(self.waiting[0]):
            self.waiting.popleft()
        return tuple(self._spans.values())

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence, wherever it is. Steps already under way may still write its pages: the device runs
        steps in order, so a later owner's writes win."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _plan(self, sequence: Sequence) -> bool:
        count = min(sequence.remaining, self._budget)
        if not count or not self._grow(sequence, sequence.computed + count):
            return False
        start = sequence.computed
        self._spans[sequence] = Span(sequence, start, count, samples=sequence.advance(count))
        self._budget -= count
        self._share(sequence)
        return True

    def _share(self, sequence: Sequence) -> None:
        """Let others use the pages that are full of known tokens once this step has run."""
        size = self.pages.page_size
        if not self._reuse:
            return
        for page in range(sequence.shared, min(sequence.computed, len(sequence.tokens)) // size):
            tokens = tuple(sequence.tokens[page * size : (page + 1) * size])
            sequence.node = self.pages.share(sequence.node, tokens, sequence.pages[page])
            sequence.shared = page + 1

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if its first chunk finds pages; never at a running one's cost."""
        if sequence.pending or not sequence.ready:
            return False
        self._begin(sequence)
        needed = self.pages.pages_for(sequence.computed + min(sequence.remaining, self._budget)) - len(sequence.pages)
        if needed > self.pages.num_free:
            self.pages.free(sequence.pages)
            sequence.restart()
            return False
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        self.num_reused += sequence.cached
        self.num_missed += sequence.remaining
        if not sequence.started:
            sequence.reused = sequence.cached
        return self._plan(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """Give a sequence the pages that earlier ones have filled with the same tokens."""
        pages, node = self.pages.match(sequence.tokens, self.root) if self._reuse else ([], None)
        sequence.pages, sequence.shared = pages, len(pages)
        sequence.node = self.root if node is None else node
        sequence.computed = sequence.cached = len(pages) * self.pages.page_size

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence pages for ``tokens`` tokens, preempting later arrivals that are not in this step yet."""
        missing = self.pages.pages_for(tokens) - len(sequence.pages)
        while missing > self.pages.num_free:
            later = self.running[self.running.index(sequence) + 1 :]
            victim = next((s for s in reversed(later) if s not in self._spans), None)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.pages += self.pages.allocate(max(missing, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._vacate(sequence)
        self.waiting.appendleft(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.restart()
