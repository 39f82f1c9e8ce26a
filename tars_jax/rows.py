"""How a request's tokens are sampled, as a row of numbers: packed once per request, copied into every step. Without jax."""

import math

import numpy as np

from tars_jax.config import MAX_BIASES

FIELDS: dict[str, type] = {  # of a packed row: every number of `SampleRows`
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "typical_p": np.float32,
    "top_n_sigma": np.float32,
    "xtc_probability": np.float32,
    "xtc_threshold": np.float32,
    "dynatemp_range": np.float32,
    "dynatemp_exponent": np.float32,
    "repeat_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "window": np.int32,
    "dry_multiplier": np.float32,
    "dry_base": np.float32,
    "dry_allowed_length": np.int32,
    "dry_window": np.int32,
    "mirostat": np.int32,
    "mirostat_tau": np.float32,
    "mirostat_eta": np.float32,
    "seed": np.uint32,
    "top_logprobs": np.int32,
    "biased": np.int32,
    "masked": np.int32,
    "mu": np.float32,
    "slot": np.int32,
    "length": np.int32,
}
COLUMN = {name: column for column, name in enumerate(FIELDS)}
CANDIDATES = 64  # rows with a top-k up to this, and no other filters than top-p and min-p, never look at the rest of the vocabulary
GREEDY = {"top_p": 1.0, "typical_p": 1.0, "repeat_penalty": 1.0, "dry_base": 1.75, "top_logprobs": -1, "mu": math.nan}  # else 0


def pack_row(**numbers: float) -> np.ndarray:
    """A row's numbers as int32 [len(FIELDS)], floats by their bits; those not given are those of a greedy row."""
    wanted = {**GREEDY, **numbers}
    return np.concatenate([np.array([wanted.get(name, 0)], dtype).view(np.int32) for name, dtype in FIELDS.items()])


def is_plain(row: np.ndarray) -> bool:
    """Whether a packed row wants no more than a temperature, top-k, top-p, min-p and penalties for repetition: most do, and a program
    for these alone is half of the whole."""
    return all(row[column] == value for column, value in _UNUSED.items())


_SPECIAL = (
    "typical_p",
    "top_n_sigma",
    "xtc_probability",
    "dynatemp_range",
    "dry_multiplier",
    "mirostat",
    "top_logprobs",
    "biased",
    "masked",
)
_UNUSED = {COLUMN[name]: int(pack_row()[COLUMN[name]]) for name in _SPECIAL}  # the numbers of a row that does without


def pack_biases(biases: tuple[tuple[int, float], ...]) -> np.ndarray:
    """(token, bias) pairs as int32 [2, MAX_BIASES]: tokens, -1 where there is none, and the biases by their bits."""
    packed = np.zeros((2, MAX_BIASES), np.int32)
    packed[0] = -1
    for column, (token, bias) in enumerate(biases):
        packed[0, column], packed[1, column] = token, np.float32(bias).view(np.int32)
    return packed
