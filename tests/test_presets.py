"""Presets: shapes as specified and as published, random models of them, and `tars plan`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import kernels, load, planning
from tars_jax.cli.plan import plan
from tars_jax.errors import InvalidRequest, ModelNotFound, NotEnoughMemory
from tars_jax.loaders.random_weights import random_model
from tars_jax.presets import find_preset, load_presets, parse_presets

TINY = """[presets.t]
title = "T"
architecture = "llama"
vocab_size = 300
hidden_size = 64
num_layers = 1
num_heads = 4
intermediate_size = 64
context_length = 128
"""


@pytest.mark.parametrize(
    ("name", "shape", "context"),
    [
        ("tiny", (768, 12, 12, 3072), 2048),
        ("small", (1024, 24, 16, 4096), 4096),
        ("medium", (2048, 32, 32, 8192), 4096),
        ("large", (2560, 40, 40, 10240), 4096),
        ("xlarge", (4096, 60, 64, 16384), 4096),
        ("xxlarge", (8192, 80, 128, 32768), 4096),
    ],
)
def test_the_systems_sizes(name: str, shape: tuple[int, ...], context: int) -> None:
    c = find_preset(name).config
    assert (c.hidden_size, c.num_layers, c.num_heads, c.intermediate_size) == shape
    assert (c.vocab_size, c.context_length, c.num_kv_heads * c.head_dim) == (32_000, context, c.hidden_size)


@pytest.mark.parametrize(
    ("name", "parameters"),  # as their model cards count them
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama2-7b", 6_738_415_616),
        ("mistral-7b", 7_248_023_552),
        ("llama2-13b", 13_015_864_320),
        ("qwen3-32b", 32_762_123_264),
        ("llama3-70b", 70_553_706_496),
    ],
)
def test_published_models_have_their_published_size(name: str, parameters: int) -> None:
    assert planning.num_parameters(find_preset(name).config) == parameters


def test_the_size_of_tiny_by_hand() -> None:
    block = 4 * 768 * 768 + 3 * 768 * 3072 + 2 * 768
    assert planning.num_parameters(find_preset("tiny").config) == 2 * 32_000 * 768 + 12 * block + 768


def test_unknown_presets_are_named_with_those_there_are() -> None:
    with pytest.raises(ModelNotFound, match=r"no preset 'huge'; there are tiny, small"):
        load("preset:huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[presets", "presets: "),
        ("", "presets: 'presets'"),
        (TINY.replace('title = "T"', ""), "presets: 'title'"),
        (TINY + "surprise = 1", "unexpected keyword argument 'surprise'"),
        (TINY.replace("num_layers = 1", "num_layers = 0"), "num_layers must be positive"),
    ],
)
def test_bad_tables_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_presets(text)


@pytest.mark.parametrize(
    "form", [pytest.param("tiled", marks=pytest.mark.skipif(not kernels.available(), reason="no CPU kernels")), "dense"]
)
def test_a_random_model_runs(form: Any) -> None:
    preset = parse_presets(TINY)["t"]
    model = random_model(preset, form=form, dtype="float32")
    assert model.name == "preset:t"
    logits = model.logits(model.tokenizer.encode("héllo"), exact=False)
    assert logits.shape == (6, 300)
    assert 0.5 < logits.std() < 2  # as 1 / sqrt(inputs) makes it


def test_a_random_model_spells_bytes() -> None:
    tokenizer = random_model(parse_presets(TINY)["t"], form="dense", dtype="float32").tokenizer
    assert tokenizer.encode("é!") == list("é!".encode())
    assert tokenizer.decode([*"é!".encode(), 299]) == "é!"  # ids beyond the bytes stand for nothing
    assert tokenizer.eog_ids == {256}


def test_random_weights_depend_on_the_seed_alone() -> None:
    preset = parse_presets(TINY)["t"]
    one, two, other = (random_model(preset, form="dense", dtype="float32", seed=seed).params for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one, two))
    assert not np.array_equal(one.embed, other.embed)


def test_a_preset_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_device_bytes", lambda devices=1: 10**9)
    with pytest.raises(NotEnoughMemory, match=r"weights 131\.4 GiB"):
        load("preset:llama3-70b", weights="dense" if not kernels.available() else "tiled")


# tars plan


def planned(capsys: pytest.CaptureFixture[str], **options: Any) -> Any:
    plan(**{"as_json": True, "devices": None, "context": 0, "rows": 16, "weights": "BF16", "cache_dtype": "float16", **options})
    return json.loads(capsys.readouterr().out)


def test_plan_lists_the_presets_with_their_true_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    listed = planned(capsys, model="")
    assert [entry["name"] for entry in listed] == list(load_presets())
    assert {entry["name"]: entry["parameters"] for entry in listed}["tiny"] == 162_417_408
    assert listed[0]["weights_bytes"]["BF16"] == 2 * 162_417_408 + 2 * 25 * 768  # vectors are float32


def test_plan_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, model="llama3-70b", devices=4, context=8192, rows=10)
    assert list(report["devices"]) == ["4"]
    assert report["cache_bytes_per_token"] == 2 * 80 * 8 * 128 * 2
    device = report["devices"]["4"]
    # Two embeddings are whole on every device, the blocks' matrices are split.
    vectors, embeddings = 161 * 8192, 2 * 128_256 * 8192
    assert device["weights_bytes"] == 2 * ((70_553_706_496 - embeddings - vectors) // 4 + embeddings) + 4 * vectors
    token = 2 * 80 * 2 * 128 * 2
    rest = device["needed_bytes"] - 10 * 8192 * token
    assert device["requests"] == {str(gb): max(0, (int(gb * 0.9e9) - rest) // token // 8192) for gb in (24, 40, 80, 141)}


def test_plan_says_what_cannot_be_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert "num_heads of 12 cannot be split over 8" in planned(capsys, model="tiny")["devices"]["8"]["error"]


def test_plan_of_a_file(capsys: pytest.CaptureFixture[str], smollm2: Any) -> None:
    report = planned(capsys, model=str(smollm2.path))
    assert report["parameters"] == 134_515_008
    assert report["machine"]["weights_bytes"] == smollm2.nbytes


def test_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    plan("preset:mistral-7b", None, 0, 16, "Q4_0", "float16", False)
    out = capsys.readouterr().out
    assert "7,248,023,552" in out
    assert "4.1 GB (Q4_0)" in out
    assert "fit at once on 24 GB" in out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "nope"}, ModelNotFound, "model 'nope' not found; nor is there a preset"),
        ({"model": "preset:nope"}, ModelNotFound, "no preset 'nope'"),
        ({"model": "tiny", "weights": "Q9"}, InvalidRequest, "--type takes a GGUF tensor type"),
        ({"model": "tiny", "cache_dtype": "int3"}, InvalidRequest, "--cache takes float16"),
    ],
)
def test_plan_refuses(
    options: Any, error: type[Exception], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    with pytest.raises(error, match=message):
        planned(capsys, **options)
