"""The scheduler with a mock device: no jax, hand-checkable."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars_jax.config import SamplingParams
from tars_jax.engine.pages import OutOfPages, PageAllocator
from tars_jax.engine.request import Output, Request, TokenLogprob
from tars_jax.engine.scheduler import Plan, Scheduler
from tars_jax.engine.sequence import Sequence, StopStrings


class Letters:
    """A tokenizer whose token i is chr(i); token 0 ends."""

    eog_ids = control_ids = frozenset({0})
    strips_space = False

    def token_id(self, text: str) -> None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class Bench:
    """A scheduler with a device that answers every sample with the next letter of the request's script."""

    def __init__(self, *, pages: int = 64, page_size: int = 4, rows: int = 4, budget: int = 16, context: int = 64) -> None:
        self.pages = PageAllocator(pages, page_size)
        self.scheduler = Scheduler(self.pages, max_rows=rows, max_step_tokens=budget)
        self.context = context
        self.outputs: dict[int, list[Output]] = {}
        self.in_flight: Plan = ()
        self.plans: list[list[tuple[int, int, int]]] = []
        self.preempted = 0

    def add(self, prompt: int, max_tokens: int, **params: Any) -> Sequence:
        number = len(self.outputs)
        outputs = self.outputs[number] = []
        request = Request(number, tuple([65] * prompt), SamplingParams(max_tokens=max_tokens, **params), outputs.append)
        sequence = Sequence(request, Letters(), self.context)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        return sequence

    def step(self, token: int = 98) -> None:
        plan = self.scheduler.schedule()
        self.plans.append([(span.sequence.request.id, span.start, span.count) for span in plan])
        assert sum(span.count for span in plan) <= self.scheduler.max_step_tokens
        for span in self.in_flight:
            if span.samples:
                span.sequence.append(token, TokenLogprob(token, 0.0))
                if span.sequence.finish_reason:
                    self.scheduler.release(span.sequence)
        self.in_flight = plan

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.step()
        raise AssertionError("the scheduler never finished")

    def text(self, number: int) -> str:
        return "".join(output.text for output in self.outputs[number])


def test_a_prompt_is_read_in_chunks_and_then_decoded() -> None:
    bench = Bench(budget=4)
    bench.add(prompt=6, max_tokens=3)
    bench.drain()
    assert [plan for plan in bench.plans if plan] == [[(0, 0, 4)], [(0, 4, 2)], [(0, 6, 1)], [(0, 7, 1)]]
    assert bench.text(0) == "bbb"


def test_decodes_go_before_prompts() -> None:
    bench = Bench(budget=4)
    bench.add(prompt=2, max_tokens=9)
    bench.step()
    bench.add(prompt=9, max_tokens=1)
    bench.step()
    assert bench.plans[1] == [(0, 2, 1), (1, 0, 3)]


def test_rows_are_a_limit() -> None:
    bench = Bench(rows=2)
    for _ in range(3):
        bench.add(prompt=1, max_tokens=2)
    bench.step()
    assert [number for number, _, _ in bench.plans[0]] == [0, 1]
    bench.drain()
    assert bench.text(2) == "bb"


def test_preemption_recomputes_the_latest_and_loses_nothing() -> None:
    bench = Bench(pages=9, context=28)  # 8 pages of 4: two growing requests of 20 cannot both stay
    bench.add(prompt=4, max_tokens=16)
    bench.add(prompt=4, max_tokens=16)
    bench.drain()
    assert bench.scheduler.num_preemptions > 0
    assert [bench.text(0), bench.text(1)] == ["b" * 16, "b" * 16]
    assert bench.pages.num_free == 8


def test_the_context_ends_an_answer() -> None:
    bench = Bench(context=10)
    bench.add(prompt=7, max_tokens=99)
    bench.drain()
    assert bench.text(0) == "bbb"
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


def test_a_constrained_row_waits_for_its_token() -> None:
    bench = Bench()
    sequence = bench.add(prompt=3, max_tokens=4)

    class Anything:
        def fill(self, allowed: object) -> None: ...
        def consume(self, token_id: int) -> None: ...

    sequence.constraint = Anything()
    bench.drain()
    assert [len(plan) for plan in bench.plans[:4]] == [1, 0, 1, 0]
    assert bench.text(0) == "bbbb"


def test_pages_are_all_or_nothing() -> None:
    pages = PageAllocator(4, 16)
    with pytest.raises(OutOfPages):
        pages.allocate(4)
    taken = pages.allocate(3)
    assert sorted(taken) == [1, 2, 3]
    pages.free(taken)
    assert pages.num_free == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=8),
    st.integers(8, 20),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_every_request_ends_once_and_no_page_is_lost(arrivals: list[tuple[int, int, int]], pages: int, rows: int, budget: int) -> None:
    bench = Bench(pages=pages + 1, rows=rows, budget=budget, context=32)
    for prompt, max_tokens, pause in arrivals:
        bench.add(prompt, max_tokens)
        for _ in range(pause):
            bench.step()
    bench.drain()
    assert bench.pages.num_free == pages
    for number, (_, max_tokens, _) in enumerate(arrivals):
        assert bench.text(number) == "b" * max_tokens
        assert sum(output.finish_reason is not None for output in bench.outputs[number]) == 1


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
