"""Adapters in PEFT's form: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, of LoRA or of tuned norms (LN Tuning,
Zhao et al. 2023, arXiv 2312.11420).

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint, and peft/tuners/{lora,ln_tuning}/config.py for the fields.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy then knows bfloat16, which safetensors asks it for
import numpy as np

from tars_jax.adapters import Adapter
from tars_jax.config import ModelConfig
from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.loaders.factors import Factor, assemble, common_alpha, norm_factor
from tars_jax.loaders.names import HUGGING_FACE, name_in_file, translate

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_NORM = re.compile(r"(?P<module>.*?)(\.ln_tuning_layers)?(\.default)?\.weight")
_HALF = re.compile(r"(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.default)?(\.weight)?")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base weights as they are


def read_peft(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter for a model of this configuration. Raises ModelFileError for what is missing, malformed, or more than
    LoRA or norms."""
    settings = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "it has an adapter_model.bin, which can run code: save it again as safetensors" if pickled else "the adapter is incomplete"
        raise ModelFileError(f"{folder}: no {WEIGHTS_FILE}; {remedy}")
    _refuse_extras(settings, folder)
    return assemble(_factors(path), config, _Scales(settings, folder), str(folder))


def write_peft(folder: Path, adapter: Adapter, base_model: str = "") -> None:
    """Write an adapter so that ``PeftModel.from_pretrained`` reads it, float32; ``base_model`` is the name or path it belongs to.

    Raises InvalidRequest for steering vectors, and for updates and norms together: PEFT has no form for them.
    """
    from safetensors.numpy import save_file

    if adapter.steering or bool(adapter.updates) == bool(adapter.norms):
        raise InvalidRequest(
            f"{adapter.source} cannot be a PEFT adapter, which is either low-rank updates or norms; write it as a GGUF file"
        )
    settings, tensors = _tuned_norms(adapter) if adapter.norms else _lora(adapter)
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _tuned_norms(adapter: Adapter) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of PEFT's LN Tuning."""
    modules = {name_in_file(leaf, HUGGING_FACE).removesuffix(".weight"): norm for leaf, norm in adapter.norms.items()}
    tensors = {f"{_PREFIX}{module}.ln_tuning_layers.weight": norm for module, norm in modules.items()}
    return {"peft_type": "LN_TUNING", "target_modules": list(modules)}, tensors


def _lora(adapter: Adapter) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of PEFT's LoRA."""
    alpha, scaled = common_alpha(adapter)
    modules = {leaf: name_in_file(leaf, HUGGING_FACE).removesuffix(".weight") for leaf in adapter.updates}
    ranks = {modules[leaf]: update.rank for leaf, update in adapter.updates.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    settings = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    tensors: dict[str, np.ndarray] = {}
    for leaf, update in adapter.updates.items():
        name = _PREFIX + modules[leaf]
        if leaf == "embed":  # PEFT's halves make the transpose of the table
            halves = {f"{name}.lora_embedding_A": scaled[leaf].T, f"{name}.lora_embedding_B": update.b.T}
        else:
            halves = {f"{name}.lora_A.weight": update.b, f"{name}.lora_B.weight": scaled[leaf]}
        tensors |= halves
    return settings, tensors


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelFileError(f"{path}: too large for an adapter's configuration")
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}; a PEFT adapter is a folder with {CONFIG_FILE}") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path}: not JSON") from None
    if not isinstance(settings, dict):
        raise ModelFileError(f"{path}: expected a JSON object")
    return settings


def _refuse_extras(settings: Mapping[str, Any], folder: Path) -> None:
    """Whatever would make the adapter mean more than ``alpha / r * B @ A``."""
    kind = str(settings.get("peft_type", "LORA"))
    start = settings.get("init_lora_weights")
    extras = {
        f"peft_type {kind}": kind.upper() not in ("LORA", "LN_TUNING"),
        "use_dora (DoRA)": bool(settings.get("use_dora")),
        f"bias {settings.get('bias')!r}": settings.get("bias", "none") not in ("none", None),
        "lora_bias": bool(settings.get("lora_bias")),
        f"modules_to_save {settings.get('modules_to_save')}": bool(settings.get("modules_to_save")),
        "layer_replication": bool(settings.get("layer_replication")),
        "alora_invocation_tokens (activated LoRA)": bool(settings.get("alora_invocation_tokens")),
        f"init_lora_weights {start!r}, which changes the base weights": start not in _PLAIN_STARTS,
    }
    if found := [name for name, there in extras.items() if there]:
        raise ModelFileError(
            f"{folder}: only plain LoRA and tuned norms are supported, this one has {', '.join(found)}; merge it into its model"
        )


class _Scales:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732), with the alphas of single modules."""

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        self._alpha = _number(settings.get("lora_alpha", 8), "lora_alpha", folder)
        self._stable = bool(settings.get("use_rslora"))
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ModelFileError(f"{folder}: alpha_pattern is no JSON object")
        self._alphas = {_literal(key, folder): _number(value, f"alpha_pattern {key}", folder) for key, value in patterns.items()}

    def __call__(self, leaf: str, rank: int) -> float:
        module = "." + name_in_file(leaf, HUGGING_FACE).removesuffix(".weight")
        alpha = next((value for key, value in self._alphas.items() if module.endswith("." + key)), self._alpha)
        return alpha / (math.sqrt(rank) if self._stable else rank)


def _number(value: Any, name: str, folder: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFileError(f"{folder}: {name} is {value!r}, expected a number")
    return float(value)


def _literal(pattern: str, folder: Path) -> str:
    """A key of alpha_pattern: the end of a module's path. PEFT takes a regular expression; from a file that could run for ever."""
    text = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", text):
        raise ModelFileError(f"{folder}: the alpha_pattern {pattern!r} is a regular expression; only names of modules are supported")
    return text


def _factors(path: Path) -> Iterator[Factor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                yield _factor(name, file.get_tensor(name))
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the last two: a type numpy does not know
        raise ModelFileError(f"{path}: cannot be read: {error}") from None


def _factor(name: str, value: np.ndarray) -> Factor:
    """PEFT's A [r, K] is our b, its B [O, r] our a; an embedding's are A [r, V] and B [D, r] of the transposed table."""
    bare = name.removeprefix(_PREFIX)
    match = _HALF.fullmatch(bare)
    if match is None:
        norm = _NORM.fullmatch(bare)
        return norm_factor(name, translate(norm["module"] + ".weight", HUGGING_FACE) if norm else None, value)
    leaf = translate(match["module"] + ".weight", HUGGING_FACE)
    if match["embedding"]:
        return Factor(name, leaf if leaf == "embed" else None, "a" if match["half"] == "A" else "b", value.T)
    return Factor(name, None if leaf == "embed" else leaf, "b" if match["half"] == "A" else "a", value)
