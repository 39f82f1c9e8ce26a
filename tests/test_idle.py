"""Work in idle time takes no more from requests than its share."""

import threading
from typing import Any

import pytest

from tars_jax import Engine, SamplingParams
from tars_jax.engine.idle import IdleWork
from tests.test_engine import CONFIG, text
from tests.tiny import tiny_model


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sliced(share: float, clock: Clock) -> tuple[IdleWork, list[float]]:
    """Work whose slices take two seconds."""
    slices: list[float] = []

    def work() -> bool:
        slices.append(clock.now)
        clock.now += 2.0
        return len(slices) < 50

    return IdleWork(work, share, clock), slices


def test_idle_time_is_all_its_own() -> None:
    idle, slices = sliced(0.1, Clock())
    while idle.run(idle=True):
        pass
    assert len(slices) == 50


@pytest.mark.parametrize(("share", "expected"), [(0.125, 7), (0.5, 25), (0.0, 0)])
def test_beside_requests_it_gets_its_share(share: float, expected: int) -> None:
    clock = Clock()
    idle, slices = sliced(share, clock)
    for _ in range(100):  # steps of a second
        idle.serve(1.0)
        assert idle.run(idle=False) or len(slices) == 50
    assert len(slices) == expected  # one at once, since how long one takes is not known before, then two seconds for each 2 / share


def test_failing_work_ends(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bool:
        raise RuntimeError("broken work")

    assert not IdleWork(fail, 0.1).run(idle=True)
    assert "broken work" in caplog.text


def test_an_engine_works_when_nobody_asks_and_goes_on_serving() -> None:
    engine = Engine(tiny_model(), CONFIG)
    expected = text(engine, "hello")
    done, slices = threading.Event(), []

    def work() -> bool:
        slices.append(threading.current_thread().name)
        if len(slices) == 500:
            done.set()
        return len(slices) < 500

    engine.work_when_idle(work, share=0.1)
    assert text(engine, "hello") == expected
    assert done.wait(60)
    assert set(slices) == {"engine tiny"}
    assert text(engine, "hello") == expected
    engine.close()


def test_a_closing_engine_stops_its_work() -> None:
    engine = Engine(tiny_model(), CONFIG)
    engine.work_when_idle(lambda: True, share=0.1)
    text(engine, "hello", SamplingParams(max_tokens=2))
    engine.close()


def test_work_can_be_taken_back() -> None:
    engine = Engine(tiny_model(), CONFIG)
    calls: list[Any] = []
    engine.work_when_idle(lambda: bool(calls.append(1)) or True, share=0.1)
    engine.work_when_idle(None)
    count = len(calls)
    text(engine, "hello")
    assert len(calls) == count
    engine.close()
