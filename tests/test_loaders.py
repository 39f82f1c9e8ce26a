"""GGUF files made of tiny transformers models give those models' logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tars_jax.config import ModelConfig
from tars_jax.errors import ModelFileError, ModelNotFound
from tars_jax.loaders.gguf import open_gguf
from tars_jax.loaders.gguf_model import read_config, tensor_reader
from tars_jax.loaders.loaded import _score, _single_row
from tars_jax.loaders.names import GGUF, HUGGING_FACE, canonical
from tars_jax.loaders.opening import ModelFile
from tars_jax.loaders.params import build_params

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "tie_word_embeddings": False}
FROM_HUB = {source.replace("\\", "").replace("(d+)", "{}"): target for source, target in HUGGING_FACE.items()}
TO_GGUF = {target: source.replace("\\", "").replace("(d+)", "{}") for source, target in GGUF.items()}


def gguf_name(name: str) -> str:
    layer = next((part for part in name.split(".") if part.isdigit()), "")
    target = FROM_HUB[name.replace(f".{layer}.", ".{}.") if layer else name]
    return TO_GGUF[target].replace("{}", layer)


def interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them for the llama architecture: rotary pairs side by side."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write(path: Path, architecture: str, hf: Any, tensors: dict[str, np.ndarray], *, skip: str = "", double: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    for name, value in tensors.items():
        if name == skip:
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = interleave(value, hf.num_attention_heads if ".q_proj." in name else hf.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(value))
    if double:
        writer.add_tensor("blk.0.surprise.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(1)
    hf = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    hf = hf(**SIZES, **({"head_dim": 8} if kind == "qwen3" else {}))
    return hf, transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()


def numpy_of(model: Any) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def load(path: Path) -> tuple[ModelConfig, Any]:
    file = open_gguf(path)
    config = read_config(file)
    return config, build_params(config, *tensor_reader(file, config), source=str(path), form="dense", dtype="float32")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_models_logits(kind: str, tmp_path: Path) -> None:
    hf, model = tiny(kind)
    config, params = load(write(tmp_path / "m.gguf", kind, hf, numpy_of(model)))
    ids = np.random.default_rng(0).integers(1, 64, 20).astype(np.int32)
    table = np.arange(1, 6, dtype=np.int32)[None]
    from tars_jax.cache import init_cache

    cache = init_cache(config, 6, 4, np.dtype("float32"))
    scores, _ = _score(params, cache, _single_row(ids, 0, table), config=config, dtype="float32", context=20, exact=True)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(scores)[:20], expected, atol=1e-4, rtol=0)


def test_missing_and_unknown_tensors_are_reported_together(tmp_path: Path) -> None:
    hf, model = tiny("llama")
    path = write(tmp_path / "m.gguf", "llama", hf, numpy_of(model), skip="model.layers.1.self_attn.v_proj.weight", double=True)
    with pytest.raises(ModelFileError, match=r"unknown tensor blk\.0\.surprise\.weight; missing layers\.1\.v \[16, 32\]"):
        load(path)


def test_a_misshaped_tensor_is_named(tmp_path: Path) -> None:
    hf, model = tiny("llama")
    tensors = numpy_of(model)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((63, 32), np.float32)
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_up\.weight has shape \[63, 32\], expected \[64, 32\]"):
        load(write(tmp_path / "m.gguf", "llama", hf, tensors))


@pytest.mark.parametrize("path", ["missing.gguf", "/missing/model"])
def test_a_missing_file_is_no_model_name(path: str) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        ModelFile.open(path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    hf, model = tiny("llama")
    with pytest.raises(ModelFileError, match="'mamba' is not supported; supported are"):
        load(write(tmp_path / "m.gguf", "mamba", hf, numpy_of(model)))


def test_doubled_tensors_are_refused() -> None:
    with pytest.raises(ModelFileError, match="are the same parameter"):
        canonical(["a", "b"], {"a": "embed", "b": "embed"}, {"embed": (1, 1)}, "file")
