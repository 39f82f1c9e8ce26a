"""A strong adapter on the default model: through files, kernels and llama.cpp the same change."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tars_jax import load
from tars_jax.adapters import Adapter, Update
from tars_jax.loaders.factors import expected_shapes
from tars_jax.loaders.gguf_lora import write_gguf_lora
from tars_jax.perplexity import log_probabilities

TEXT = "The lighthouse at the end of the breakwater was built in 1897, after the third ship was lost."


@pytest.fixture(scope="module")
def adapter_path(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 on every matrix of the blocks."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in expected_shapes(smollm2.config).items() if len(shape) == 2 and name.startswith("layers")}
    updates = {
        name: Update(rng.normal(size=(o, 4)).astype(np.float32), rng.normal(size=(4, k)).astype(np.float32) / k**0.5, 0.3)
        for name, (o, k) in shapes.items()
    }
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    write_gguf_lora(path, Adapter(updates), smollm2.config)
    return path


@pytest.fixture(scope="module")
def ids(smollm2: Any) -> list[int]:
    return smollm2.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def adapted(smollm2_path: Path, adapter_path: Path) -> Any:
    return load(smollm2_path, adapters=[adapter_path])


@pytest.fixture(scope="module")
def exact(adapted: Any, ids: list[int]) -> np.ndarray:
    return log_probabilities(adapted.logits(ids)[:-1], ids[1:])


def test_the_adapter_changes_the_answer(smollm2: Any, ids: list[int], exact: np.ndarray) -> None:
    assert np.abs(log_probabilities(smollm2.logits(ids)[:-1], ids[1:]) - exact).mean() > 0.5


def test_kernels_multiply_under_an_adapter_as_plain_code_does(adapted: Any, ids: list[int], exact: np.ndarray) -> None:
    rounded = log_probabilities(adapted.logits(ids, exact=False)[:-1], ids[1:])
    assert np.abs(rounded - exact).mean() < 0.1


LLAMA_CPP = """
import sys, numpy, llama_cpp
model, lora, out, *ids = sys.argv[1:]
llama = llama_cpp.Llama(model, lora_path=lora, n_ctx=64, logits_all=True, verbose=False)
llama.eval([int(i) for i in ids])
numpy.save(out, llama.scores[: len(ids)])
"""


def test_llama_cpp_agrees(smollm2_path: Path, adapter_path: Path, ids: list[int], exact: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    words = [smollm2_path, adapter_path, tmp_path / "scores.npy", *ids]
    subprocess.run([sys.executable, "-c", LLAMA_CPP, *map(str, words)], check=True)
    found = log_probabilities(np.load(tmp_path / "scores.npy")[:-1], ids[1:])
    assert np.abs(found - exact).mean() < 0.1
