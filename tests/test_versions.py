"""Versions of a model's weights: numbers, roll-backs, what is kept."""

from types import SimpleNamespace
from typing import Any

import pytest

from tars_jax.engine.versions import MOST, Version, Versions
from tars_jax.errors import InvalidRequest


class Swapped:
    """An engine that notes what it is given."""

    def __init__(self) -> None:
        self.model, self.swaps = SimpleNamespace(params="file"), list[tuple[Any, int]]()

    def swap(self, params: Any, version: int) -> int:
        self.swaps.append((params, version))
        return version


def grown(count: int) -> tuple[Versions, Any]:
    versions, engine = Versions(), Swapped()
    for i in range(count):
        versions.add(engine, Version(kind="optimized", job=f"job {i}"))
    return versions, engine


def numbers(versions: Versions) -> list[int]:
    return [version.number for version in versions.all()]


def test_a_model_begins_with_its_file() -> None:
    versions, engine = grown(0)
    versions.serve(engine)
    assert (versions.current.kind, numbers(versions), engine.swaps) == ("file", [1], [])


def test_what_is_added_is_served_under_the_next_number() -> None:
    versions, engine = grown(2)
    assert engine.swaps == [("file", 2), ("file", 3)]
    assert [(v.number, v.source, v.job) for v in versions.all()[1:]] == [(2, 1, "job 0"), (3, 2, "job 1")]


def test_going_back_makes_a_version_of_the_same_weights() -> None:
    versions, engine = grown(2)
    back = versions.roll_back(engine, 2)
    assert (back.number, back.kind, back.source, back.job) == (4, "rollback", 2, "job 0")
    assert versions.current is back
    assert engine.swaps[-1] == ("file", 4)


def test_without_a_number_it_is_the_one_before() -> None:
    versions, engine = grown(1)
    assert [versions.roll_back(engine).source for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(("count", "number", "message"), [(0, None, "no earlier version"), (1, 7, "no version 7 .* there are 1, 2")])
def test_what_is_not_there_cannot_be_gone_back_to(count: int, number: int | None, message: str) -> None:
    versions, engine = grown(count)
    with pytest.raises(InvalidRequest, match=message):
        versions.roll_back(engine, number)
    assert len(versions.all()) == count + 1


def test_the_file_and_the_latest_are_kept() -> None:
    versions, _ = grown(MOST + 5)
    assert numbers(versions) == [1, *range(8, MOST + 7)]


def test_a_new_engine_is_brought_up_to_date() -> None:
    versions, _ = grown(2)
    engine: Any = Swapped()
    versions.serve(engine)
    assert engine.swaps == [("file", 3)]
