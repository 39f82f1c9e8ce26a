"""Compiled steps: each bucket once, whoever asks."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import compile_cache, struct
from tars_jax.compile_cache import Recipe
from tars_jax.engine.programs import Programs


class Fake:
    """Stands for a recipe: making its program takes until the gate opens."""

    def __init__(self, bucket: int, compiled: list[int], gate: threading.Event) -> None:
        self.bucket, self.compiled, self.gate = bucket, compiled, gate

    def make(self) -> Any:
        assert self.gate.wait(10)
        self.compiled.append(self.bucket)
        return lambda: self.bucket


def test_a_bucket_is_compiled_once_for_all_who_ask() -> None:
    compiled: list[int] = []
    gate = threading.Event()
    programs = Programs(lambda bucket: Fake(bucket, compiled, gate))  # type: ignore[arg-type, return-value]
    programs.prepare([1, 2])
    answers: list[int] = []
    askers = [threading.Thread(target=lambda: answers.append(programs.get(2)())) for _ in range(3)]
    for asker in askers:
        asker.start()
    gate.set()
    for asker in askers:
        asker.join(10)
    assert programs.get(1)() == 1
    assert answers == [2, 2, 2]
    assert sorted(compiled) == [1, 2]


def test_a_failed_compilation_is_raised_and_tried_again() -> None:
    failures = [RuntimeError("out of memory")]

    def recipe(bucket: int) -> Any:
        if failures:
            raise failures.pop()
        gate = threading.Event()
        gate.set()
        return Fake(bucket, [], gate)

    programs = Programs(recipe)
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.get(4)
    assert programs.get(4)() == 4


def test_what_is_looked_for_is_made_in_the_background() -> None:
    compiled: list[int] = []
    gate = threading.Event()
    programs = Programs(lambda bucket: Fake(bucket, compiled, gate))  # type: ignore[arg-type, return-value]
    assert programs.find(2) is None
    assert programs.find(2) is None
    gate.set()
    programs.settle()
    found = programs.find(2)
    assert found is not None
    assert found() == 2
    assert compiled == [2]


def test_what_cannot_be_made_in_the_background_is_not_tried_for_ever() -> None:
    tried: list[int] = []

    def recipe(bucket: int) -> Any:
        tried.append(bucket)
        raise RuntimeError("out of memory")

    programs = Programs(recipe)
    for _ in range(3):
        assert programs.find(1) is None
        programs.settle()
    assert tried == [1]
    assert programs.compiled() == []


def test_rare_programs_are_only_kept_where_they_cannot_be_stored() -> None:
    class Stored(Fake):
        def store(self) -> Any:
            return None if self.bucket == 2 else self.make()

    compiled: list[int] = []
    gate = threading.Event()
    gate.set()
    programs = Programs(lambda bucket: Stored(bucket, compiled, gate))  # type: ignore[arg-type, return-value]
    programs.prepare([1], rare=[2, 3])
    programs.settle()
    assert compiled == [1, 3]
    assert programs.compiled() == [1, 3]
    assert programs.get(2)() == 2


def test_stop_ends_the_preparation() -> None:
    compiled: list[int] = []
    gate = threading.Event()
    programs = Programs(lambda bucket: Fake(bucket, compiled, gate))  # type: ignore[arg-type, return-value]
    programs.prepare([1, 2, 3])
    programs.stop()
    gate.set()
    assert programs.get(1)() == 1
    assert 3 not in compiled


def test_an_interpreter_that_ends_while_it_compiles_ends_well() -> None:
    code = (
        "from tests.tiny import tiny_model\n"
        "from tars_jax import Engine, EngineConfig\n"
        "Engine(tiny_model(), EngineConfig(max_context=64, max_rows=4), warm_up=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stderr) == (0, "")


# Kept on the disk.


@struct.dataclass
class Total:
    sum: jax.Array


@partial(jax.jit, static_argnames="factor", donate_argnames="total")
def add(total: Total, x: jax.Array, *, factor: int) -> tuple[Total, jax.Array]:
    return Total(total.sum + factor * x), x - 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setattr(compile_cache, "_FOUND_ELSEWHERE", set())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def recipe(factor: int = 3) -> Recipe:
    x = jax.ShapeDtypeStruct((4,), jnp.int32)
    return Recipe(add, (Total(x), np.zeros(4, np.int32)), {"factor": factor}, (Total(x), 0))


def check(program: Any, factor: int = 3) -> None:
    total = Total(jnp.ones(4, jnp.int32))
    after, rest = program(total, np.arange(4, dtype=np.int32))
    np.testing.assert_array_equal(after.sum, 1 + factor * np.arange(4))
    np.testing.assert_array_equal(rest, np.arange(4) - 1)
    assert total.sum.is_deleted()


def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "_compile", lambda self: pytest.fail("it was compiled again"))


def test_a_program_is_compiled_once_and_then_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(recipe().make())
    not_compiled(monkeypatch)
    check(recipe().make())


def test_a_stored_program_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe().store() is None
    not_compiled(monkeypatch)
    assert recipe().store() is None
    check(recipe().make())


def test_what_cannot_be_stored_is_handed_out(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    check(recipe().store())


def test_another_recipe_is_another_program(folder: Path) -> None:
    check(recipe().make())
    check(recipe(factor=5).make(), factor=5)
    assert len(list(folder.iterdir())) == 2


def test_a_program_of_other_sources_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(recipe().make())
    monkeypatch.setattr(compile_cache, "_sources", lambda: "changed")
    check(recipe().make())
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_program_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(recipe().make())
    (kept,) = folder.iterdir()
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    check(recipe().make())
    not_compiled(monkeypatch)
    check(recipe().make())


def test_the_oldest_programs_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "MOST_PROGRAMS", 2)
    for factor in (1, 2, 3):
        recipe(factor).make()
    assert len(list(folder.iterdir())) == 2


def test_what_came_from_jaxs_cache_is_not_kept(folder: Path) -> None:
    """It cannot be serialised again."""
    usual = jax.config.values[compile_cache.SECONDS]
    jax.config.update(compile_cache.SECONDS, 0.0)
    try:
        add.lower(*recipe(7).arguments, factor=7).compile()
    finally:
        jax.config.update(compile_cache.SECONDS, usual)
    jax.clear_caches()
    for _ in range(2):  # the second time from jax's memory
        check(recipe(7).make(), factor=7)
    assert not folder.exists()
    check(recipe(8).make(), factor=8)
    assert len(list(folder.iterdir())) == 1
    assert jax.config.values[compile_cache.SECONDS] == usual


def test_without_a_folder_nothing_is_kept(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    check(recipe().make())
    assert not folder.exists()
