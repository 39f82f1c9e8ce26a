"""Steering vectors on the default model: what llama.cpp computes with the same file as a control vector."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tars_jax.adapters import Adapter, apply_adapter
from tars_jax.loaders.gguf_adapter import write_gguf_adapter
from tars_jax.perplexity import log_probabilities

TEXT = "The lighthouse at the end of the breakwater was built in 1897, after the third ship was lost."
STRENGTH = 1.0
LLAMA_CPP = """
import ctypes, sys, gguf, llama_cpp, numpy
model, vectors, out, *ids = sys.argv[1:]
llama = llama_cpp.Llama(model, n_ctx=64, logits_all=True, verbose=False)
width, layers = llama.n_embd(), llama_cpp.llama_model_n_layer(llama.model)
data = numpy.zeros((layers, width), numpy.float32)  # from layer 1 on, as common/common.cpp fills it
for tensor in gguf.GGUFReader(vectors).tensors:
    data[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
assert llama_cpp.llama_set_adapter_cvec(llama.ctx, pointer, data.size, width, 1, layers) == 0
llama.eval([int(i) for i in ids])
numpy.save(out, llama.scores[: len(ids)])
"""


def test_llama_cpp_agrees(smollm2: Any, smollm2_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    config, ids, rng = smollm2.config, smollm2.tokenizer.encode(TEXT), np.random.default_rng(0)
    vectors = {layer: STRENGTH * rng.normal(size=config.hidden_size).astype(np.float32) for layer in (1, 14, config.num_layers - 2)}

    def found(steering: dict[int, np.ndarray], *, exact: bool = True) -> np.ndarray:
        model = dataclasses.replace(smollm2, params=apply_adapter(smollm2.params, Adapter({}, steering=steering)))
        return log_probabilities(model.logits(ids, exact=exact)[:-1], ids[1:])

    write_gguf_adapter(tmp_path / "steering.gguf", Adapter({}, steering=vectors), config)
    words = [smollm2_path, tmp_path / "steering.gguf", tmp_path / "scores.npy", *ids]
    subprocess.run([sys.executable, "-c", LLAMA_CPP, *map(str, words)], check=True)
    theirs = log_probabilities(np.load(tmp_path / "scores.npy")[:-1], ids[1:])
    ours = np.abs(found(vectors) - theirs).mean()
    assert ours < 0.1  # activations of 8 bits there
    assert np.abs(found(vectors, exact=False) - theirs).mean() < 0.1
    for others in ({}, {layer + 1: vector for layer, vector in vectors.items()}):
        assert np.abs(found(others) - theirs).mean() > 4 * ours
