"""Models that are another model and adapters: kept in the store, shown, run."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api import catalog
from tars_jax.adapters import Adapter, Update
from tars_jax.cli.store import describe
from tars_jax.config import EngineConfig, ModelConfig
from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.loaders.adapted import save_adapted, save_with_params
from tars_jax.loaders.gguf_adapter import write_gguf_adapter
from tars_jax.loaders.gguf_lora import write_gguf_lora
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.opening import read_adapter
from tars_jax.loaders.peft import write_peft
from tars_jax.store import Store

CONFIG = ModelConfig("llama", 64, 32, 2, 4, 2, 8, 64, 64)
METADATA: dict[str, str | int | float] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def adapter(rank: int = 3, width: int = 32) -> Adapter:
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(32, rank)).astype(np.float32), rng.normal(size=(rank, width)).astype(np.float32)
    return Adapter({f"layers.{i}.q": Update(a, b, 2.0) for i in range(2)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With a model "base" of which only the header counts here."""
    store = Store(tmp_path / "models")
    tensors = {"token_embd.weight": np.zeros((64, 32), np.float32), "blk.0.ffn_gate.weight": np.zeros((64, 32), np.float32)}
    write_gguf(tmp_path / "base.gguf", METADATA, tensors)
    with (tmp_path / "base.gguf").open("rb") as file:
        layer = store.add_layer("model", file)
    store.write_manifest("base", {"model_format": "gguf", "model_family": "llama"}, [layer, store.add_layer("system", "Be brief.")])
    return store


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_saved_model_is_its_base_and_an_adapter_layer(store: Store, form: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    write_peft(path, adapter()) if form == "peft" else write_gguf_lora(path, adapter(), CONFIG)
    base, saved = store.find("base"), save_adapted(store, "base", [path], "tuned")
    assert saved == store.find("tuned")
    assert [layer.kind for layer in saved.layers] == ["model", "system", "adapter"]
    assert saved.layers[-1].media_type == "application/vnd.ollama.image.adapter"
    assert [layer.digest for layer in saved.layers[:2]] == [layer.digest for layer in base.layers]
    found = read_adapter(saved.adapter_paths[0], CONFIG).updates
    for name, update in adapter().updates.items():
        np.testing.assert_allclose(found[name].scale * found[name].a, update.scale * update.a, rtol=1e-6)
        np.testing.assert_array_equal(found[name].b, update.b)


def test_several_adapters_are_kept_in_their_order(store: Store, tmp_path: Path) -> None:
    for rank in (2, 5):
        write_gguf_lora(tmp_path / f"{rank}.gguf", adapter(rank), CONFIG)
    save_adapted(store, "base", [tmp_path / "2.gguf"], "tuned")
    saved = save_adapted(store, "tuned", [tmp_path / "5.gguf"], "tuned")
    assert [read_adapter(path, CONFIG).rank for path in saved.adapter_paths] == [2, 5]


def test_norms_and_steering_vectors_are_kept_as_they_are(store: Store, tmp_path: Path) -> None:
    vector = np.arange(32, dtype=np.float32)
    write_peft(tmp_path / "norms", Adapter({}, norms={"norm": vector}))
    write_gguf_adapter(tmp_path / "steering.gguf", Adapter({}, steering={1: vector}), CONFIG)
    saved = save_adapted(store, "base", [tmp_path / "norms", tmp_path / "steering.gguf"], "tuned")
    norms, steering = (read_adapter(path, CONFIG) for path in saved.adapter_paths)
    np.testing.assert_array_equal(norms.norms["norm"], vector)
    np.testing.assert_array_equal(steering.steering[1], vector)
    shown = catalog.show(store, "tuned")
    assert [(a["type"], a["rank"], a["weights"]) for a in shown["adapters"]] == [("lora", 0, 1), ("controlvector", 0, 1)]
    assert "controlvector, 1 weights" in describe(shown)


def test_sampler_settings_are_kept_in_one_params_layer(store: Store) -> None:
    save_with_params(store, "base", {"temperature": 0.2}, "cool")
    saved = save_with_params(store, "cool", {"top_k": 5, "temperature": 0.1}, "cool")
    assert [layer.kind for layer in saved.layers] == ["model", "system", "params"]
    assert saved.params == {"temperature": 0.1, "top_k": 5}


def test_an_adapter_that_does_not_fit_leaves_the_store_alone(store: Store, tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter(width=48))
    with pytest.raises(ModelFileError, match="does not fit this model"):
        save_adapted(store, "base", [tmp_path / "adapter"], "tuned")
    assert [str(model.name.short()) for model in store.models()] == ["base:latest"]


def test_an_ill_formed_name_is_refused(store: Store, tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    with pytest.raises(InvalidRequest):
        save_adapted(store, "base", [tmp_path / "adapter"], "not a name")


def test_show_tells_of_the_adapter(store: Store, tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    saved = save_adapted(store, "base", [tmp_path / "adapter"], "tuned")
    answer = catalog.show(store, "tuned")
    size = saved.adapter_paths[0].stat().st_size
    assert answer["adapters"] == [{"type": "lora", "rank": 3, "weights": 2, "alpha": 6.0, "size": size}]
    assert answer["details"]["parent_model"] == "base:latest"
    assert f"ADAPTER {saved.adapter_paths[0]}" in answer["modelfile"]
    assert "Adapters\n    lora, rank 3, 2 weights" in describe(answer)
    assert "adapters" not in catalog.show(store, "base")


def test_the_server_loads_a_model_with_its_adapters(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from api.models import load_model

    write_peft(tmp_path / "adapter", adapter())
    saved = save_adapted(store, "base", [tmp_path / "adapter"], "tuned")
    given: dict[str, Any] = {}
    monkeypatch.setattr("tars_jax.loaders.opening.load", lambda path, **options: given.update(options, path=path))
    load_model(saved, store, EngineConfig(), adapters=[tmp_path / "more"])
    assert given["path"] == saved.model_path
    assert given["adapters"] == [saved.adapter_paths[0], tmp_path / "more"]


def test_a_layer_without_its_file_is_an_error_that_names_it(store: Store, tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", adapter())
    saved = save_adapted(store, "base", [tmp_path / "adapter"], "tuned")
    saved.adapter_paths[0].unlink()
    with pytest.raises(ModelFileError, match=r"sha256-.*: no such file"):
        catalog.show(store, "tuned")


def test_a_damaged_layer_is_refused(store: Store, tmp_path: Path) -> None:
    write_gguf_lora(tmp_path / "adapter.gguf", adapter(), dataclasses.replace(CONFIG, architecture="qwen2"))
    with pytest.raises(ModelFileError, match=r"general\.architecture is 'qwen2'"):
        save_adapted(store, "base", [tmp_path / "adapter.gguf"], "tuned")
