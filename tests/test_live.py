"""A search beside serving: what is taken and when it ends, and that its batches have one shape."""

import dataclasses
from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars_jax.errors import InvalidRequest
from tars_jax.evolve.batches import score_batch, sizes_for
from tars_jax.evolve.data import Example, encode_examples
from tars_jax.evolve.evaluation import Evaluation
from tars_jax.evolve.evolution import Evolution, Metrics
from tars_jax.evolve.live import MAX_EXAMPLE_TOKENS, PATIENCE, Limits, Report, batch_size, check_lengths, compile_ahead, search
from tars_jax.evolve.settings import Settings
from tests.tiny import tiny_model


def found(score: float, general: float = 3.0, fitness: float = -1.0) -> Evaluation:
    return Evaluation(fitness, score, score, (0.0, 1.0), 1.0, general, 100)


class Scripted:
    """An evolution whose checks find what they are told; a generation has two slices. A vector is the number of its generation."""

    def __init__(self, *checks: Evaluation) -> None:
        self.checks = list(checks)

    def prepare(self) -> Iterator[None]:
        yield

    def holding_out(self, examples: Any) -> Generator[None, None, Any]:
        yield
        return "held out"

    def start(self) -> int:
        return 0

    def init(self) -> Any:
        return SimpleNamespace(generation=0, half=False)

    def step(self, state: Any) -> tuple[Any, Metrics | None]:
        if not state.half:
            return SimpleNamespace(generation=state.generation, half=True), None
        return SimpleNamespace(generation=state.generation + 1, half=False), Metrics(state.generation + 1, 0.0, 0.0, 0.1)

    def centre(self, state: Any) -> Any:
        return state.generation

    def evaluation(self, vector: Any, held_out: Any) -> Generator[None, None, Evaluation]:
        yield
        return self.checks.pop(0)


def reports(*checks: Evaluation, before: float = 0.0, clock: Any = lambda: 0.0, **limits: Any) -> list[Report]:
    evolution: Any = Scripted(found(before), *checks)
    slices = search(evolution, [], Limits(**{"check_every": 2, "target": 2.0, **limits}), lambda: False, clock)
    first, *others = [report for report in slices if report is not None]
    assert first.before == found(before)
    return others


def taken(*checks: Evaluation, **more: Any) -> list[Any]:
    """Generations whose update was taken."""
    return [report.improvement for report in reports(*checks, generations=2 * len(checks), **more) if report.improvement is not None]


def test_what_is_better_by_more_than_chance_is_taken_at_once() -> None:
    assert taken(found(0.2), found(0.21), found(0.5)) == [2, 6]


def test_what_is_a_little_better_waits_for_the_end() -> None:
    assert taken(found(0.52), found(0.53), found(0.51), before=0.5) == [4]
    assert taken(found(0.5), before=0.5) == []


def test_other_text_must_not_suffer() -> None:
    costly = found(0.9, general=3.0 * 1.021)
    assert taken(costly, found(0.4, general=3.0 * 1.019)) == [4]
    refused = reports(costly, generations=2)[-1]
    assert refused.improvement is None
    assert "2.1%, more than the 2% allowed" in str(refused.refused)


def test_loss_on_other_text_counts_from_the_file() -> None:
    assert taken(found(0.9, general=3.0), general_loss=2.9) == []
    assert taken(found(0.9, general=2.95), general_loss=2.9) == [2]


def test_a_search_that_costs_too_much_ends() -> None:
    checks = [found(0.9, general=9.0)] * 10
    assert sum(report.check is not None for report in reports(*checks)) == PATIENCE


def test_it_ends_at_the_target() -> None:
    assert [r.improvement for r in reports(found(0.3), found(1.0), found(1.0), target=1.0) if r.check] == [2, 4]


def test_it_ends_in_time_within_a_generation() -> None:
    ticks = iter(range(100))
    ended = reports(found(0.5), clock=lambda: float(next(ticks)), seconds=5, check_every=100)
    assert ended[-1].improvement == max(report.metrics.generation for report in ended if report.metrics)


@pytest.mark.parametrize("limits", [{"seconds": 0.0}, {"seconds": 90_000.0}, {"generations": 0}])
def test_limits_make_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Limits(**limits)


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=4, max_size=12)


@settings(deadline=None)
@given(lengths, st.randoms(use_true_random=False))
def test_all_batches_have_one_shape(lengths: list[tuple[int, int]], random: Any) -> None:
    examples = [Example(tuple(range(prompt)), tuple(range(completion))) for prompt, completion in lengths]
    sizes = sizes_for(examples, 3)
    batches = [score_batch(random.sample(examples, 3), sizes) for _ in range(4)]
    assert len({str(jax.tree.map(np.shape, batch)) for batch in batches}) == 1


def test_slices_stay_short() -> None:
    short, long = Example((1,) * 15, (1,)), Example((1,) * MAX_EXAMPLE_TOKENS, (1,))
    assert [batch_size([short]), batch_size([short, dataclasses.replace(short, prompt=(1,) * 60)]), batch_size([long])] == [6, 2, 1]
    with pytest.raises(InvalidRequest, match="data: item 2 has 513 tokens"):
        check_lengths([short, long], "data")


class Compilations:
    """What is compiled while it is listened to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("changes", [{}, {"strategy": "hybrid"}, {"fitness": "json"}], ids=["eggroll", "hybrid", "json"])
def test_a_rehearsed_search_compiles_nothing(changes: dict[str, Any]) -> None:
    model = tiny_model()
    examples = encode_examples([{"prompt": "say " + "x" * i, "completion": "yes"} for i in range(1, 14)], model)
    chosen = Settings(layers="last:1", population=8, batch=3, rank=2, max_new_tokens=4, **changes)
    evolution = Evolution(model, examples[:9], chosen, other="a word after the other " * 30, slice_tokens=64)
    compiled = Compilations()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        assert compile_ahead(evolution, examples[9:], lambda: False) is not None
        ahead = compiled.count
        reports = list(search(evolution, examples[9:], Limits(generations=3, check_every=2, target=2.0), lambda: False))
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    assert [r.metrics.generation for r in reports if r and r.metrics] == [1, 2, 3]
    assert compiled.count == ahead > 3


def test_a_rehearsal_runs_nothing_and_says_what_may_come() -> None:
    model = tiny_model()
    examples = encode_examples([{"prompt": "say", "completion": "yes"}] * 4, model)
    evolution = Evolution(model, examples, Settings(layers="last:1", population=8, rank=2), other="a word " * 99, slice_tokens=64)
    likely = compile_ahead(evolution, examples, lambda: False)
    found = evolution.adapter(evolution.start())
    assert likely is not None
    assert {n: (u.a.shape, u.b.shape) for n, u in likely.updates.items()} == {n: (u.a.shape, u.b.shape) for n, u in found.updates.items()}
    assert compile_ahead(evolution, examples, lambda: True) is None
