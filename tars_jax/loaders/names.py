"""Tensor names of each file format, as tables onto the canonical names of `model.spec`, and the refusals around them."""

import re
from collections.abc import Iterable, Mapping

from tars_jax import errors
from tars_jax.errors import ModelFileError

_LAYER_PARTS = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_output.weight": "o",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_output.bias": "o_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
    "ffn_gate.bias": "gate_bias",
    "ffn_up.bias": "up_bias",
    "ffn_down.bias": "down_bias",
}
GGUF = {
    r"token_embd\.weight": "embed",
    r"output_norm\.weight": "norm",
    r"output\.weight": "lm_head",
    **{rf"blk\.(\d+)\.{re.escape(part)}": f"layers.{{}}.{leaf}" for part, leaf in _LAYER_PARTS.items()},
}

_HF_PARTS = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    **{f"self_attn.{p}_proj.weight": p for p in "qkvo"},
    **{f"self_attn.{p}_proj.bias": f"{p}_bias" for p in "qkvo"},
    **{f"self_attn.{p}_norm.weight": f"{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj.weight": p for p in ("gate", "up", "down")},
    **{f"mlp.{p}_proj.bias": f"{p}_bias" for p in ("gate", "up", "down")},
}
HUGGING_FACE = {
    r"model\.embed_tokens\.weight": "embed",
    r"model\.norm\.weight": "norm",
    r"lm_head\.weight": "lm_head",
    **{rf"model\.layers\.(\d+)\.{re.escape(part)}": f"layers.{{}}.{leaf}" for part, leaf in _HF_PARTS.items()},
}

# Tensors that carry no parameters of their own: rotary tables, which the configuration already describes.
IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.rotary_emb\.inv_freq|.*\.attn_rot_embd\.weight")


def canonical(names: Iterable[str], table: Mapping[str, str], expected: Mapping[str, tuple[int, ...]], source: str) -> dict[str, str]:
    """Canonical name -> file's name, for every parameter of ``expected`` (canonical name -> shape).

    Raises ModelFileError that lists all missing, unknown and doubled tensors together. A tied model's own copy of
    ``lm_head`` is passed over.
    """
    found: dict[str, str] = {}
    faults = []
    for name in names:
        target = translate(name, table)
        if target is None or target not in expected:
            if not IGNORED.fullmatch(name) and target != "lm_head":
                faults.append(f"unknown tensor {name}")
        elif target in found:
            faults.append(f"{name} and {found[target]} are the same parameter")
        else:
            found[target] = name
    faults += [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    refuse(faults, source)
    return found


def refuse(faults: list[str], source: str) -> None:
    """Raise one ModelFileError for all faults, if there are any."""
    errors.refuse(faults, f"{source} does not hold the model its metadata describes", ModelFileError)


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """Canonical name of a file's tensor, None for one that the table does not know."""
    for pattern, target in table.items():
        if match := re.fullmatch(pattern, name):
            return target.format(*match.groups())
    return None


def name_in_file(leaf: str, table: Mapping[str, str]) -> str:
    """The inverse of `translate`. Raises KeyError for a leaf that the table does not know."""
    layer = next((part for part in leaf.split(".") if part.isdigit()), "")
    patterns = {target: pattern for pattern, target in table.items()}
    pattern = patterns[leaf.replace(f".{layer}.", ".{}.") if layer else leaf]
    return pattern.replace(r"(\d+)", layer).replace("\\", "")
