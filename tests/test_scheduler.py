"""The scheduler with a mock device: no jax, hand-checkable."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tars_jax.config import SamplingParams
from tars_jax.engine.pages import OutOfPages, PageAllocator
from tars_jax.engine.request import Output, Request, TokenLogprob
from tars_jax.engine.scheduler import Plan, Scheduler, Span
from tars_jax.engine.sequence import Sequence, StopStrings
from tars_jax.engine.speculation import PromptLookup, Speculation


class Letters:
    """A tokenizer whose token i is chr(i); token 0 ends."""

    eog_ids = control_ids = frozenset({0})
    strips_space = False

    def token_id(self, text: str) -> None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


def answer(tokens: list[int], count: int, window: int = 0) -> str:
    """What the mock model says after these tokens."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(successor(tokens, window))
    return "".join(map(chr, tokens[len(tokens) - count :]))


def successor(tokens: list[int], window: int = 0) -> int:
    """A letter out of four that depends on every token seen."""
    total = 0
    for token in tokens[-window:] if window else tokens:
        total = (total * 31 + token) % 997
    return 97 + total % 4


def _single(span: Span) -> list[Span]:
    return [dataclasses.replace(span, start=span.start + i, steps=0) for i in range(max(span.steps, 1))]


class Device:
    """What a device does with a plan, one token after the other: it writes each token to its page, and reads the pages of all
    before it. A page that was given away too early, or shared wrongly, makes a wrong letter."""

    def __init__(self, page_size: int, window: int) -> None:
        self.page_size, self.window = page_size, window
        self.slots: dict[int, int] = {}  # the token written to page * page_size + offset
        self.table: dict[tuple[int, int], int] = {}  # of (slot, position): known and sampled tokens

    def run(self, plan: Plan) -> list[list[int]]:
        written, sampled = self.slots, []
        for span in [single for several in plan for single in _single(several)]:
            sequence, found = span.sequence, []
            inputs = [*sequence.tokens[span.start : span.start + span.count]]
            inputs += [-1] * (span.count - len(inputs)) + list(span.guesses)
            pages = sequence.pages
            for position, token in enumerate(inputs, span.start):
                token = self.table[sequence.slot, position] if token < 0 else token
                self.table[sequence.slot, position] = token
                written[self._at(pages, position)] = token
                if span.samples and position >= span.start + span.count - 1:
                    first = max(position + 1 - self.window, 0) if self.window else 0
                    seen = [written[self._at(pages, p)] for p in range(first, position + 1)]
                    found.append(successor(seen, self.window))
            for offset, token in enumerate(found, span.start + span.count):
                self.table[sequence.slot, offset] = token
            sampled.append(found)
        steps = iter(sampled)
        return [[token for _ in range(max(span.steps, 1)) for token in next(steps)] for span in plan]

    def _at(self, pages: list[int], position: int) -> int:
        page = pages[position // self.page_size]
        assert page > 0, "a page that was given back is read"
        return page * self.page_size + position % self.page_size


class Bench:
    """A scheduler with a mock device whose results are read one step late."""

    def __init__(
        self,
        *,
        pages: int = 64,
        page_size: int = 4,
        rows: int = 4,
        budget: int = 16,
        context: int = 64,
        window: int = 0,
        reuse: bool = False,
        lookup: bool = False,
        most: int = 0,
    ) -> None:
        self.pages = PageAllocator(pages, page_size)
        self.scheduler = Scheduler(self.pages, max_rows=rows, max_step_tokens=budget, reuse=reuse, window=window)
        self.device = Device(page_size, window)
        self.rows, self.context, self.lookup, self.window = rows, context, lookup, window
        self.most, self.longest = most, 0  # steps at once
        self.sequences: list[Sequence] = []
        self.outputs: dict[int, list[Output]] = {}
        self.in_flight: list[tuple[Span, list[int]]] = []
        self.plans: list[list[tuple[int, int, int]]] = []

    def add(
        self, prompt: int | list[int], max_tokens: int, client: str = "", priority: int = 0, speculation: Any = None, **params: Any
    ) -> Sequence:
        number = len(self.outputs)
        outputs = self.outputs[number] = []
        ids = tuple([65] * prompt if isinstance(prompt, int) else prompt)
        request = Request(number, ids, SamplingParams(max_tokens=max_tokens, **params), outputs.append, client, priority)
        sequence = Sequence(request, Letters(), self.context)  # type: ignore[arg-type]
        sequence.speculation = speculation or (Speculation(PromptLookup()) if self.lookup else None)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self, token: int | None = None) -> None:
        """Plan and send a step, read the one before. ``token``: what the device answers instead of the model's."""
        plan = self.scheduler.schedule()
        plan = self.scheduler.prolong(plan, self.most) if self.most else plan
        self.longest = max(self.longest, *(span.steps for span in plan), 0)
        self.plans.append([(span.sequence.request.id, span.start, span.count) for span in plan])
        assert sum(span.tokens for span in plan) <= self.scheduler.max_step_tokens
        assert len(plan) <= self.rows
        for span in plan:  # a prompt's tokens are computed otherwise than those after it
            prompt, end = span.sequence.prompt_length, span.start + span.tokens
            assert end <= prompt if span.reads_prompt else span.start >= prompt
        assert sorted(plan, key=lambda span: span.reads_prompt) == list(plan)
        assert sum(1 + len(span.guesses) for span in plan if span.samples) <= self.rows
        read, self.in_flight = self.in_flight, list(zip(plan, self.device.run(plan), strict=True))
        for span, sampled in read:
            if span.samples:
                tokens = sampled if token is None else [token]
                if span.steps:
                    span.sequence.take([TokenLogprob(t, 0.0) for t in tokens])
                else:
                    span.sequence.accept([TokenLogprob(t, 0.0) for t in tokens], span.guesses)
                if span.sequence.finish_reason and span.sequence in self.present():
                    self.scheduler.release(span.sequence)

    def cancel(self, sequence: Sequence) -> None:
        sequence.finish("cancelled")
        self.scheduler.release(sequence)

    def present(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.step()
        raise AssertionError("the scheduler never finished")

    def text(self, number: int) -> str:
        return "".join(output.text for output in self.outputs[number])

    def expected(self, number: int) -> str:
        sequence = self.sequences[number]
        return answer(list(sequence.request.prompt_ids), sequence.max_tokens, self.window)


def test_a_prompt_is_read_in_chunks_and_then_decoded() -> None:
    bench = Bench(budget=4)
    bench.add(prompt=6, max_tokens=3)
    bench.drain()
    assert [plan for plan in bench.plans if plan] == [[(0, 0, 4)], [(0, 4, 2)], [(0, 6, 1)], [(0, 7, 1)]]
    assert bench.text(0) == bench.expected(0)


def test_decodes_go_before_prompts() -> None:
    bench = Bench(budget=4)
    bench.add(prompt=2, max_tokens=9)
    bench.step()
    bench.add(prompt=9, max_tokens=1)
    bench.step()
    assert bench.plans[1] == [(0, 2, 1), (1, 0, 3)]


def test_a_prompt_found_but_for_its_last_token_is_still_a_prompt() -> None:
    bench = Bench(reuse=True, rows=8)
    bench.add(prompt=9, max_tokens=2)
    bench.drain()
    bench.add(prompt=9, max_tokens=9, speculation=Oracle())
    plan = bench.scheduler.schedule()
    assert [(span.start, span.count, span.guesses, span.reads_prompt, span.is_plain_decode) for span in plan] == [(8, 1, (), True, False)]


def test_decodes_are_prolonged_as_far_as_the_shortest_goes() -> None:
    bench = Bench(most=8)
    first, second = bench.add(prompt=4, max_tokens=4), bench.add(prompt=4, max_tokens=9)
    bench.step()
    assert [span.steps for span in bench.scheduler.prolong(bench.scheduler.schedule(), 8)] == [3, 3]  # of four tokens one is there
    assert (first.length, first.computed, first.room, second.room) == (8, 7, 0, 5)
    assert all(len(sequence.pages) == bench.pages.pages_for(sequence.computed) for sequence in (first, second))


@pytest.mark.parametrize("rows", [2, 1], ids=["reads a prompt", "waits"])
def test_nothing_is_prolonged_while_somebody(rows: int) -> None:
    bench = Bench(rows=rows)
    bench.add(prompt=4, max_tokens=9)
    bench.step()
    bench.add(prompt=4, max_tokens=9)
    plan = bench.scheduler.schedule()
    assert len(plan) == rows
    assert bench.scheduler.prolong(plan, 8) == plan


def test_nothing_is_prolonged_without_pages() -> None:
    bench = Bench(pages=3)  # one is nobody's
    bench.add(prompt=4, max_tokens=20)
    bench.step()
    plan = bench.scheduler.schedule()
    assert bench.scheduler.prolong(plan, 8) == plan
    assert bench.scheduler.prolong(plan, 4)[0].steps == 4  # as far as the page goes


@pytest.mark.parametrize("most", [1, 2, 8])
def test_several_decodes_at_once_say_the_same(most: int) -> None:
    bench = Bench(most=most, pages=12)
    for number in range(3):
        bench.add(prompt=3 + number, max_tokens=11 - number)
    bench.drain()
    assert [bench.text(number) for number in range(3)] == [bench.expected(number) for number in range(3)]
    assert bench.longest == most


def test_rows_are_a_limit() -> None:
    bench = Bench(rows=2)
    for _ in range(3):
        bench.add(prompt=1, max_tokens=2)
    bench.step()
    assert [number for number, _, _ in bench.plans[0]] == [0, 1]
    bench.drain()
    assert bench.text(2) == bench.expected(2)


def test_preemption_recomputes_the_latest_and_loses_nothing() -> None:
    bench = Bench(pages=9, context=28)  # 8 pages of 4: two growing requests of 20 cannot both stay
    bench.add(prompt=4, max_tokens=16)
    bench.add(prompt=4, max_tokens=16)
    bench.drain()
    assert bench.scheduler.num_preemptions > 0
    assert [bench.text(0), bench.text(1)] == [bench.expected(0), bench.expected(1)]
    assert bench.pages.num_free == 8


def test_the_context_ends_an_answer() -> None:
    bench = Bench(context=10)
    bench.add(prompt=7, max_tokens=99)
    bench.drain()
    assert bench.text(0) == bench.expected(0)
    assert bench.outputs[0][-1].finish_reason == "length"


def test_an_end_token_stops_and_is_counted_but_not_shown() -> None:
    bench = Bench()
    bench.add(prompt=3, max_tokens=9)
    bench.step()
    bench.step(token=97)
    bench.step(token=0)
    last = bench.outputs[0][-1]
    assert (bench.text(0), last.finish_reason) == ("a", "stop")
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.output_tokens) == (3, 2)


def test_pages_are_all_or_nothing() -> None:
    pages = PageAllocator(4, 16)
    with pytest.raises(OutOfPages):
        pages.allocate(4)
    taken = pages.allocate(3)
    assert sorted(taken) == [1, 2, 3]
    pages.free(taken)
    assert pages.num_free == 3


def test_a_finished_request_leaves_its_pages_to_the_next() -> None:
    bench = Bench(reuse=True)
    bench.add(prompt=[*b"0123456789"], max_tokens=3)
    bench.drain()
    again = bench.add(prompt=[*b"0123456789"], max_tokens=3)
    bench.drain()
    assert bench.plans[-4] == [(1, 8, 2)]  # two pages of four are there
    assert again.reused == bench.scheduler.num_reused == 8
    assert bench.text(1) == bench.text(0) == bench.expected(0)


def test_requests_at_once_share_a_prefix() -> None:
    bench = Bench(reuse=True, budget=64)
    for last in (1, 2, 3):
        bench.add(prompt=[*b"0123456789", last], max_tokens=2)
    bench.step()
    assert bench.plans[0] == [(0, 0, 11), (1, 8, 3), (2, 8, 3)]
    bench.drain()
    assert [bench.text(i) for i in range(3)] == [bench.expected(i) for i in range(3)]


def test_a_page_in_use_is_never_given_away_and_kept_ones_go_the_oldest_first() -> None:
    pages = PageAllocator(4, 2)
    held = pages.allocate(2)
    node = pages.share(pages.match([], 0)[1], (1, 2), held[0])
    pages.share(node, (3, 4), held[1])
    pages.free(held)
    assert (pages.num_free, pages.num_kept) == (3, 2)
    assert pages.match([1, 2, 3], 0) == ([held[0]], node)
    assert pages.allocate(2)
    with pytest.raises(OutOfPages):
        pages.allocate(1)
    assert pages.num_evictions == 1
    pages.free([held[0]])
    assert pages.match([1, 2, 3, 4, 5], 0)[0] == [held[0]]  # its successor was evicted


def test_a_root_is_no_node() -> None:
    pages = PageAllocator(8, 2)
    held = pages.allocate(1)
    node = pages.share(pages.match([], "a")[1], (1, 2), held[0])
    assert pages.match([1, 2, 3], node) == ([], pages.match([], node)[1])
    assert pages.match([], node)[1] != node


def test_other_weights_do_not_reuse() -> None:
    bench = Bench(reuse=True)
    bench.add(prompt=[*b"0123456789"], max_tokens=1)
    bench.drain()
    bench.scheduler.root = 2
    assert bench.add(prompt=[*b"0123456789"], max_tokens=1).reused == 0
    bench.drain()
    assert bench.scheduler.num_reused == 0


def test_pages_behind_the_window_are_given_back() -> None:
    bench = Bench(pages=6, context=64, window=6)  # 5 pages of 4 serve 40 tokens
    bench.add(prompt=10, max_tokens=30)
    bench.drain()
    assert bench.text(0) == bench.expected(0)
    assert bench.pages.num_free == 5
    assert bench.scheduler.num_preemptions == 0


class Oracle:
    """Guesses that are right, or wrong from a given one on."""

    def __init__(self, wrong_at: int | None = None) -> None:
        self.wrong_at = wrong_at
        self.judged: list[tuple[int, int]] = []

    def propose(self, tokens: list[int], count: int) -> tuple[int, ...]:
        guesses = [ord(letter) for letter in answer(tokens, count)]
        return tuple(0 if i == self.wrong_at else guess for i, guess in enumerate(guesses))

    def judge(self, drafted: int, accepted: int) -> None:
        self.judged.append((drafted, accepted))


def test_right_guesses_make_several_tokens_a_step() -> None:
    bench = Bench(rows=4)
    bench.add(prompt=3, max_tokens=9, speculation=(oracle := Oracle()))
    bench.drain()
    assert bench.text(0) == bench.expected(0)
    assert oracle.judged == [(0, 0), (3, 3), (3, 3)]  # 1 + 4 + 4


def test_wrong_guesses_cost_no_token() -> None:
    bench = Bench(rows=4)
    bench.add(prompt=3, max_tokens=9, speculation=(oracle := Oracle(wrong_at=1)))
    bench.drain()
    assert bench.text(0) == bench.expected(0)
    assert max(accepted for _, accepted in oracle.judged) == 1


def test_guesses_give_way_to_other_rows() -> None:
    bench = Bench(rows=4)
    for _ in range(4):
        bench.add(prompt=3, max_tokens=9, speculation=Oracle())
    bench.drain()
    assert [bench.text(i) for i in range(4)] == [bench.expected(i) for i in range(4)]


def test_a_client_without_a_row_gets_one_of_the_greedy() -> None:
    bench = Bench(rows=3)
    for _ in range(5):
        bench.add(prompt=2, max_tokens=20, client="greedy")
    for _ in range(4):
        bench.step()
    light = bench.add(prompt=2, max_tokens=3, client="light")
    bench.step()
    assert light.slot >= 0
    bench.drain()
    assert [bench.text(i) for i in range(6)] == [bench.expected(i) for i in range(6)]


def test_the_greedy_let_a_newcomer_read_first_but_not_twice() -> None:
    bench = Bench(rows=4, budget=8)
    for _ in range(3):
        bench.add(prompt=2, max_tokens=20, client="greedy")
    bench.step()
    bench.step()
    bench.add(prompt=16, max_tokens=2, client="light")
    bench.step()
    bench.step()
    assert bench.plans[2] == [(3, 0, 8)]
    assert [number for number, _, _ in bench.plans[3]] == [0, 1, 2, 3]


def test_waiting_clients_take_turns() -> None:
    bench = Bench(rows=1)
    for client in ("a", "a", "a", "b", "b"):
        bench.add(prompt=2, max_tokens=2, client=client)
    bench.drain()
    order = list(dict.fromkeys(number for plan in bench.plans for number, _, _ in plan))
    assert order == [3, 0, 4, 1, 2]  # of clients served the same the one with fewer requests goes first


def test_priority_comes_before_fairness() -> None:
    bench = Bench(rows=1)
    bench.add(prompt=2, max_tokens=2)
    bench.add(prompt=2, max_tokens=2, client="other")
    bench.add(prompt=2, max_tokens=2, priority=-1)
    bench.drain()
    order = list(dict.fromkeys(number for plan in bench.plans for number, _, _ in plan))
    assert order == [2, 1, 0]  # the first client has paid for the request that went first


def test_idling_earns_no_credit() -> None:
    bench = Bench(rows=1)
    bench.add(prompt=30, max_tokens=1, client="a")
    bench.add(prompt=30, max_tokens=1, client="a")
    bench.step()
    bench.add(prompt=2, max_tokens=1, client="late")
    bench.add(prompt=2, max_tokens=1, client="a")
    bench.drain()
    order = list(dict.fromkeys(number for plan in bench.plans for number, _, _ in plan))
    assert order == [0, 2, 1, 3]


PREFIXES = ([*b"the quick "], [*b"the quick brown "], [*b"abababab"], [*b"x"])


class Life(RuleBasedStateMachine):
    """Any sequence of arrivals, steps and cancellations: every answer is the model's, every request ends once, no page is lost."""

    @initialize(
        pages=st.integers(9, 24),
        rows=st.integers(1, 4),
        budget=st.integers(4, 20),
        window=st.sampled_from([0, 0, 7]),
        reuse=st.booleans(),
        lookup=st.booleans(),
        most=st.sampled_from([0, 1, 3, 8]),
    )
    def begin(self, pages: int, rows: int, budget: int, window: int, reuse: bool, lookup: bool, most: int) -> None:
        self.bench = Bench(pages=pages + 1, rows=rows, budget=budget, context=32, window=window, reuse=reuse, lookup=lookup, most=most)
        self.num_pages = pages
        self.cancelled: set[int] = set()

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.integers(0, 3),
        tokens=st.integers(1, 12),
        client=st.sampled_from("abc"),
        first=st.booleans(),
    )
    def arrive(self, prefix: list[int], rest: int, tokens: int, client: str, first: bool) -> None:
        self.bench.add([*prefix, *range(rest)], tokens, client, priority=-int(first))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    @precondition(lambda self: self.bench.present())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.bench.present(), key=lambda s: s.order)))
        self.cancelled.add(sequence.request.id)
        self.bench.cancel(sequence)

    @invariant()
    def every_page_is_held_as_often_as_it_is_listed(self) -> None:
        if not hasattr(self, "bench"):
            return
        pages, listed = self.bench.pages, Counter(p for s in self.bench.scheduler.running for p in s.pages if p)
        held = {page: count for page, count in enumerate(pages._holders) if count}
        assert held == dict(listed)
        assert pages.num_free == self.num_pages - len(listed)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain()
        assert self.bench.pages.num_free == self.num_pages
        for number, outputs in self.bench.outputs.items():
            assert [bool(output.finish_reason) for output in outputs] == [False] * (len(outputs) - 1) + [True]
            expected = self.bench.expected(number)
            assert expected.startswith(self.bench.text(number)) if number in self.cancelled else expected == self.bench.text(number)


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)
TestLife = Life.TestCase


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_stop_strings_cut_at_the_first_however_the_text_is_split(text: str, stops: list[str], sizes: list[int]) -> None:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    filtered, shown, at, stopped = StopStrings(tuple(stops)), "", 0, False
    for size in sizes * 20:
        piece, at = text[at : at + size], at + size
        new, stopped = filtered.push(piece)
        shown += new
        if stopped or at >= len(text):
            break
    shown += "" if stopped else filtered.flush()
    first_end = min((text.find(s) + len(s) for s in stops if s in text), default=0)
    assert stopped == bool(found)
    assert shown == text if not found else text.startswith(shown) and len(shown) <= first_end and not any(s in shown for s in stops)
