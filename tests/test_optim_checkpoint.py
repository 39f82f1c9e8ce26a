"""A search saved, loaded by another process and continued gives the bits of one that was never stopped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax.errors import CheckpointError
from tars_jax.optim import CMAES, Budget, GeneticAlgorithm, checkpoint, minimize

ROOT = Path(__file__).parents[1]
RUN = """
import sys
import jax.numpy as jnp
from tars_jax.optim import *
optimizer = {"genetic": GeneticAlgorithm(pop_size=8), "hybrid": HybridOptimization(pop_size=8)}[sys.argv[1]]
half = (lambda generation, row: generation >= 20) if sys.argv[2] == "half" else None
path = None if sys.argv[2] == "whole" else sys.argv[3]
result = minimize(
    lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(5), optimizer, budget=Budget(generations=40), callback=half, checkpoint=path, every=5, key=3
)
print(result.generations, result.x.tobytes().hex(), result.history.tobytes().hex())
"""


def run(programs: Path, *arguments: str) -> str:
    """What a process prints; the processes of a test share their compiled programs."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("optimizer", ["genetic", "hybrid"])
def test_two_halves_in_two_processes_are_one_run_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    path, programs = str(tmp_path / "search.npz"), tmp_path / "programs"
    whole = run(programs, optimizer, "whole")
    assert run(programs, optimizer, "half", path).startswith("20 ")
    assert run(programs, optimizer, "resume", path) == whole


def test_keys_and_every_dtype_come_back(tmp_path: Path) -> None:
    tree = {"key": jax.random.key(3), "half": jnp.arange(3, dtype=jnp.bfloat16), "n": jnp.int32(4), "x": jnp.eye(2)}
    checkpoint.save(tmp_path / "c.npz", tree, {"rows": np.arange(4)}, generation=7)
    back, arrays, manifest = checkpoint.load(tmp_path / "c.npz", tree)
    assert jax.random.key_data(back.pop("key")).tolist() == jax.random.key_data(tree.pop("key")).tolist()
    assert jax.tree.map(lambda a, b: (a.dtype == b.dtype, a.tolist() == b.tolist()), tree, back) == dict.fromkeys(tree, (True, True))
    assert (arrays["rows"].tolist(), manifest["generation"]) == ([0, 1, 2, 3], 7)


def test_a_larger_budget_goes_on_from_a_finished_run(tmp_path: Path) -> None:
    def search(generations: int, path: Path | None) -> Any:
        budget = Budget(generations=generations)
        return minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(5), GeneticAlgorithm(pop_size=8), budget=budget, checkpoint=path)

    search(20, tmp_path / "c.npz")
    continued = search(40, tmp_path / "c.npz")
    assert (continued.generations, continued.fun) == (40, search(40, None).fun)


def test_another_searchs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    minimize(lambda x: jnp.sum(x**2), jnp.ones(3), GeneticAlgorithm(pop_size=8), budget=Budget(generations=5), checkpoint=path)
    with pytest.raises(CheckpointError, match="another search"):
        minimize(lambda x: jnp.sum(x**2), jnp.ones(3), CMAES(pop_size=8), budget=Budget(generations=5), checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "c.npz", jnp.zeros(2))


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", manifest=np.array([{"format": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "c.npz", jnp.zeros(2))
