"""Adapters from files: the same logits as transformers with the merged weights, and refusals of what is not plain LoRA."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import kernels, ops
from tars_jax.adapters import Adapter, Update, apply_adapter
from tars_jax.cache import init_cache
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.loaders.gguf_lora import write_gguf_lora
from tars_jax.loaders.loaded import _score, _single_row
from tars_jax.loaders.opening import read_adapter
from tars_jax.loaders.peft import write_peft
from tars_jax.model import init
from tars_jax.quant import LowRank, dequantize, pack

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.numpy").save_file

from tests.test_loaders import gguf_name, interleave, load, numpy_of, tiny, write  # noqa: E402  # needs the packages above

IDS = np.random.default_rng(0).integers(1, 64, 20).astype(np.int32)
MODULES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
MODULES += ["model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "lm_head"]
CONFIG = ModelConfig("llama", 64, 32, 2, 4, 2, 8, 64, 64)
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none"}


def halves(hf_tensors: dict[str, np.ndarray], modules: list[str] = MODULES, rank: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """PEFT's A [r, K] and B [O, r] of each module, strong enough to matter."""
    rng = np.random.default_rng(5)
    shapes = {module: hf_tensors[f"{module}.weight"].shape for module in modules}
    return {
        module: (rng.normal(size=(rank, k)).astype(np.float32) * 0.3, rng.normal(size=(o, rank)).astype(np.float32) * 0.3)
        for module, (o, k) in shapes.items()
    }


def peft_folder(folder: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], **settings: Any) -> Path:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    return raw_folder(folder, tensors, **settings)


def raw_folder(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    return folder


def llama_cpp_file(path: Path, hf: Any, pairs: dict[str, tuple[np.ndarray, np.ndarray]], alpha: float = 12.0, kind: str = "llama") -> Path:
    """As llama.cpp's convert_lora_to_gguf.py writes it."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (a, b) in pairs.items():
        if kind == "llama" and (".q_proj" in module or ".k_proj" in module):
            b = interleave(b, hf.num_attention_heads if ".q_proj" in module else hf.num_key_value_heads)
        name = gguf_name(f"{module}.weight")
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def our_logits(config: ModelConfig, params: Any) -> np.ndarray:
    cache = init_cache(config, 6, 4, np.dtype("float32"))
    table = np.arange(1, 6, dtype=np.int32)[None]
    scores, _ = _score(params, cache, _single_row(IDS, 0, table), config=config, dtype="float32", context=20, exact=True)
    return np.asarray(scores)[:20]


def their_logits(model: Any, changes: dict[str, np.ndarray]) -> np.ndarray:
    """Of the transformers model with ``changes`` added to its weights."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in changes:
                value.add_(torch.from_numpy(changes[name]))
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()


def merged(pairs: dict[str, tuple[np.ndarray, np.ndarray]], scale: float) -> dict[str, np.ndarray]:
    return {f"{module}.weight": scale * b @ a for module, (a, b) in pairs.items()}


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_adapter_gives_the_merged_models_logits(kind: str, form: str, tmp_path: Path) -> None:
    hf, model = tiny(kind)
    config, params = load(write(tmp_path / "m.gguf", kind, hf, numpy_of(model)))
    pairs = halves(numpy_of(model))
    path = peft_folder(tmp_path / "a", pairs) if form == "peft" else llama_cpp_file(tmp_path / "a.gguf", hf, pairs, kind=kind)
    found = our_logits(config, apply_adapter(params, read_adapter(path, config)))
    before = our_logits(config, params)
    expected = their_logits(model, merged(pairs, 12 / 4))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_scales_of_rank_stabilised_adapters_and_single_modules(tmp_path: Path) -> None:
    pairs = halves(numpy_of(tiny("llama")[1]))
    path = peft_folder(tmp_path / "a", pairs, use_rslora=True, alpha_pattern={"0.self_attn.q_proj": 5, "down_proj": 7})
    scales = {leaf: update.scale for leaf, update in read_adapter(path, CONFIG).updates.items()}
    assert scales["layers.1.q"] == 12 / math.sqrt(4)
    assert scales["layers.0.q"] == 5 / math.sqrt(4)
    assert scales["layers.0.down"] == scales["layers.1.down"] == 7 / math.sqrt(4)


def test_bfloat16_adapters_are_read(tmp_path: Path) -> None:
    pairs = halves(numpy_of(tiny("llama")[1]), MODULES[:1])
    rounded = {module: tuple(jnp.asarray(half, jnp.bfloat16) for half in pair) for module, pair in pairs.items()}
    path = peft_folder(tmp_path / "a", jax.tree.map(np.asarray, rounded))
    update = read_adapter(path, CONFIG).updates["layers.0.q"]
    np.testing.assert_array_equal(update.b, np.asarray(rounded[MODULES[0]][0], np.float32))


def test_the_two_uses_of_a_tied_matrix_are_updated_apart(tmp_path: Path) -> None:
    hf, model = tiny("llama")
    tensors = {name: value for name, value in numpy_of(model).items() if name != "lm_head.weight"}
    config, params = load(write(tmp_path / "m.gguf", "llama", hf, tensors))
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = read_adapter(raw_folder(tmp_path / "a", {f"{prefix}A": a, f"{prefix}B": b}, lora_alpha=1), config)
    assert config.tie_embeddings
    expected = their_logits(model, {"model.embed_tokens.weight": 0.5 * (b @ a).T})
    np.testing.assert_allclose(our_logits(config, apply_adapter(params, adapter)), expected, atol=1e-4, rtol=0)


def random_adapter(names: dict[str, tuple[int, int, int]], seed: int = 3) -> Adapter:
    """Updates of outputs, inputs and rank for each name."""
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            name: Update(rng.normal(size=(o, r)).astype(np.float32), rng.normal(size=(r, k)).astype(np.float32), 6 / r)
            for name, (o, k, r) in names.items()
        }
    )


MIXED = {"layers.0.q": (32, 32, 4), "layers.1.k": (16, 32, 4), "layers.0.up": (64, 32, 2), "embed": (64, 32, 4), "lm_head": (64, 32, 3)}


@pytest.mark.parametrize("first", ["peft", "gguf"])
def test_what_is_written_is_read_again(first: str, tmp_path: Path) -> None:
    adapter = random_adapter(MIXED)
    write_peft(tmp_path / "peft", adapter, "some/model")
    write_gguf_lora(tmp_path / "lora.gguf", adapter, CONFIG)
    found = read_adapter(tmp_path / "peft" if first == "peft" else tmp_path / "lora.gguf", CONFIG)
    assert found.updates.keys() == adapter.updates.keys()
    for name, update in adapter.updates.items():
        again = found.updates[name]
        assert again.scale == pytest.approx(update.scale)
        np.testing.assert_allclose(again.a, update.a, rtol=1e-6)
        np.testing.assert_array_equal(again.b, update.b)


def test_unequal_scales_survive_a_file_with_one_alpha(tmp_path: Path) -> None:
    updates = dict(random_adapter(MIXED).updates)
    updates["layers.1.k"] = Update(updates["layers.1.k"].a, updates["layers.1.k"].b, 0.7)
    write_gguf_lora(tmp_path / "lora.gguf", Adapter(updates), CONFIG)
    for name, again in read_adapter(tmp_path / "lora.gguf", CONFIG).updates.items():
        np.testing.assert_allclose(again.scale * again.a, updates[name].scale * updates[name].a, rtol=1e-6)


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    adapter = random_adapter({"layers.0.q": (32, 32, 4), "layers.0.up": (64, 32, 4)})
    write_gguf_lora(tmp_path / "lora.gguf", adapter, CONFIG)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("adapter.lora.alpha").contents() == 6.0
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_a"], adapter.updates["layers.0.up"].b)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], interleave(adapter.updates["layers.0.q"].a, 4))


def bases() -> dict[str, Any]:
    matrix = jax.random.normal(jax.random.key(0), (32, 64))
    codes = np.clip(np.round(np.asarray(matrix) * 3), -8, 7).astype(np.int8)
    packed = pack(codes, np.full((32, 2), 1 / 3, np.float16), None, bits=4, group=32)
    forms = {"dense": matrix, "packed": jax.tree.map(jnp.asarray, packed)}
    return forms | ({"tiled": jax.tree.map(jnp.asarray, kernels.pack_tiles(packed))} if kernels.available() else {})


@pytest.mark.parametrize("form", bases())
def test_any_base_multiplies_with_its_updates(form: str) -> None:
    base = bases()[form]
    params = init(jax.random.key(1), ModelConfig("llama", 16, 64, 1, 2, 1, 16, 32, 64, gated_mlp=False))
    params = params.replace(layers=(params.layers[0].replace(up=base),))
    first, second = (random_adapter({"layers.0.up": (32, 64, rank)}, seed=rank) for rank in (2, 3))
    both = apply_adapter(apply_adapter(params, first), second, strength=0.5).layers[0].up
    dense = kernels.untile(base) if form == "tiled" else dequantize(base)
    parts = [(first.updates["layers.0.up"], 1.0), (second.updates["layers.0.up"], 0.5)]
    expected = np.asarray(dense) + sum(strength * u.scale * u.a @ u.b for u, strength in parts)
    x = jax.random.normal(jax.random.key(2), (3, 64))
    found = ops.matmul(x, both)
    assert isinstance(both, LowRank)
    # 8-bit activations on the kernels' base product
    np.testing.assert_allclose(found, np.asarray(x) @ expected.T, atol=0.5 if form == "tiled" else 1e-2, rtol=1e-3)


def test_an_adapter_of_another_model_is_refused_with_all_its_faults(tmp_path: Path) -> None:
    adapter = random_adapter({"layers.0.q": (32, 48, 4), "layers.7.q": (32, 32, 4), "layers.0.attention_norm": (32, 32, 1)})
    faults = ["layers.0.q is for a matrix of [32, 48], the model's has [32, 32]"]
    faults += ["the model has no matrix layers.7.q", "the model has no matrix layers.0.attention_norm"]
    with pytest.raises(InvalidRequest) as applied:
        apply_adapter(init(jax.random.key(0), CONFIG), adapter)
    write_peft(tmp_path / "peft", adapter)
    with pytest.raises(ModelFileError) as read:
        read_adapter(tmp_path / "peft", CONFIG)
    assert all(fault in str(error.value) for fault in faults for error in (applied, read))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', expected a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "regular expression"),
    ],
)
def test_more_than_plain_lora_is_refused(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = peft_folder(
        tmp_path / "a", {"model.layers.0.self_attn.q_proj": (np.ones((1, 32), np.float32), np.ones((32, 1), np.float32))}, **settings
    )
    with pytest.raises(ModelFileError, match=problem.replace("(", r"\(")):
        read_adapter(path, CONFIG)


def test_unknown_lonely_and_infinite_tensors_are_reported_together(tmp_path: Path) -> None:
    one = np.ones((1, 32), np.float32)
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    tensors = {name.format("q", "A"): one, name.format("k", "A"): one, name.format("k", "B"): np.full((16, 1), np.inf, np.float32)}
    with pytest.raises(ModelFileError, match=r"surprise.* belongs to no weight.*q_proj.* has no other half; layers\.0\.k holds numbers"):
        read_adapter(raw_folder(tmp_path / "a", tensors | {"base_model.model.surprise.weight": one}), CONFIG)


def test_pickled_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"adapter_config\.json"):
        read_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match="can run code"):
        read_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x20" + bytes(40))
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_adapter(tmp_path, CONFIG)
    with pytest.raises(ModelFileError, match="no such adapter"):
        read_adapter(tmp_path / "nothing.gguf", CONFIG)


def test_a_gguf_model_is_no_adapter(tmp_path: Path) -> None:
    hf, model = tiny("llama")
    with pytest.raises(ModelFileError, match=r"general\.type is None, expected 'adapter'"):
        read_adapter(write(tmp_path / "m.gguf", "llama", hf, numpy_of(model)), CONFIG)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    hf, model = tiny("qwen2")
    path = llama_cpp_file(tmp_path / "a.gguf", hf, halves(numpy_of(model)), kind="qwen2")
    with pytest.raises(ModelFileError, match=r"general\.architecture is 'qwen2', expected 'llama'"):
        read_adapter(path, CONFIG)
