"""Compiled steps: each bucket once, whoever asks."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tars_jax.engine.programs import Programs


class Fake:
    """Stands for something lowered: compiling takes until the gate opens."""

    def __init__(self, bucket: int, compiled: list[int], gate: threading.Event) -> None:
        self.bucket, self.compiled, self.gate = bucket, compiled, gate

    def compile(self) -> Any:
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

    def lower(bucket: int) -> Any:
        if failures:
            raise failures.pop()
        gate = threading.Event()
        gate.set()
        return Fake(bucket, [], gate)

    programs = Programs(lower)
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.get(4)
    assert programs.get(4)() == 4


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
