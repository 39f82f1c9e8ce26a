"""The transformer against Hugging Face's, on tiny random models."""

from typing import Any

import jax
import numpy as np
import pytest

from tars_jax.cache import init_cache
from tars_jax.config import ModelConfig, RopeScaling
from tars_jax.loaders.loaded import _score, _single_row
from tars_jax.loaders.names import HUGGING_FACE
from tars_jax.loaders.params import build_params
from tars_jax.model import init, leaf_name, spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
TINY |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "pad_token_id": 0}


def config_of(hf: Any, **changes: Any) -> ModelConfig:
    fields = {
        "architecture": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "intermediate_size": hf.intermediate_size,
        "context_length": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "tie_embeddings": hf.tie_word_embeddings,
    }
    return ModelConfig(**(fields | changes))


def params_of(model: Any, config: ModelConfig) -> Any:
    tensors = {name: value.float().numpy() for name, value in model.state_dict().items()}
    sizes = {name: value.nbytes for name, value in tensors.items()}
    return build_params(config, HUGGING_FACE, sizes, lambda name, _: tensors[name], source="torch", form="dense", dtype="float32")


def our_logits(model: Any, config: ModelConfig, ids: np.ndarray, page: int = 4) -> np.ndarray:
    pages = -(-len(ids) // page)
    cache = init_cache(config, pages + 1, page, np.dtype("float32"))
    table = np.arange(1, pages + 1, dtype=np.int32)[None]
    batch = _single_row(ids, 0, table)
    scores, _ = _score(params_of(model, config), cache, batch, config=config, dtype="float32", context=len(ids), exact=True)
    return np.asarray(scores)[: len(ids)]


def compare(hf: Any, length: int = 40, **changes: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():  # the library starts biases at 0 and norms at 1: make them count
            if name.endswith("bias") or "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
        ids = np.random.default_rng(0).integers(1, hf.vocab_size, length).astype(np.int32)
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(our_logits(model, config_of(hf, **changes), ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_equals_transformers(kv_heads: int, tied: bool) -> None:
    compare(transformers.LlamaConfig(**TINY, num_key_value_heads=kv_heads, tie_word_embeddings=tied))


@pytest.mark.parametrize(("name", "ours"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")])
def test_activation_equals_transformers(name: str, ours: str) -> None:
    compare(transformers.LlamaConfig(**TINY, num_key_value_heads=2, hidden_act=name), activation=ours)


def test_biases_equal_transformers() -> None:
    hf = transformers.LlamaConfig(**TINY, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    compare(hf, qkv_bias=True, out_bias=True, mlp_bias=True)


def test_qwen2_equals_transformers() -> None:
    compare(transformers.Qwen2Config(**TINY, num_key_value_heads=2), qkv_bias=True)


def test_qwen3_equals_transformers() -> None:
    compare(transformers.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=16), qk_norm=True)


def test_smollm3_equals_transformers() -> None:
    hf = transformers.SmolLM3Config(**TINY | {"num_hidden_layers": 4}, num_key_value_heads=2, no_rope_layer_interval=4, rope_theta=10_000.0)
    compare(hf, no_rope_interval=4)


def test_sliding_window_equals_transformers() -> None:
    compare(transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=7), sliding_window=7)


ROPES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", factor=4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", factor=2.0)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        RopeScaling("llama3", factor=8.0, original_context=16),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        RopeScaling("yarn", factor=4.0, original_context=16),
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.5, 3.0, 4.0],
            "original_max_position_embeddings": 16,
        },
        RopeScaling("longrope", factor=4.0, original_context=16, short_factors=(1.0, 1.1, 1.2, 1.3), long_factors=(1.5, 2.5, 3.0, 4.0)),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [12, 60])
def test_rope_scaling_equals_transformers(kind: str, length: int) -> None:
    theirs, ours = ROPES[kind]
    hf = transformers.LlamaConfig(**TINY, num_key_value_heads=2, rope_parameters={"rope_theta": 10_000.0, **theirs})
    compare(hf, length, rope_scaling=ours)


def test_init_follows_the_spec() -> None:
    config = ModelConfig("llama", 11, 8, 2, 2, 1, 4, 12, 32, qkv_bias=True)
    params = init(jax.random.key(0), config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, spec(config))


def test_init_gives_every_matrix_other_numbers() -> None:
    params = init(jax.random.key(0), ModelConfig("llama", 11, 8, 3, 2, 2, 4, 8, 32))
    matrices = [np.asarray(leaf).reshape(-1)[:8] for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def test_leaf_names_are_dotted_paths() -> None:
    config = ModelConfig("llama", 11, 8, 2, 2, 1, 4, 12, 32)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(spec(config))[0]]
    assert {"embed", "layers.1.q", "norm", "lm_head"} <= set(names)
