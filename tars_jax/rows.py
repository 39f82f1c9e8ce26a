"""How a request's tokens are sampled, as a row of numbers: packed once per request, copied into every step. Without jax."""

import numpy as np

FIELDS: dict[str, type] = {  # of a packed row: every number of `SampleRows` but the mask
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repeat_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "window": np.int32,
    "seed": np.uint32,
    "top_logprobs": np.int32,
    "masked": np.int32,
}
GREEDY = {"top_p": 1.0, "repeat_penalty": 1.0, "top_logprobs": -1}  # what is not 0 in a row that wants nothing


def pack_row(**numbers: float) -> np.ndarray:
    """A row's numbers as int32 [len(FIELDS)], floats by their bits; those not given are those of a greedy row."""
    wanted = {**GREEDY, **numbers}
    return np.concatenate([np.array([wanted.get(name, 0)], dtype).view(np.int32) for name, dtype in FIELDS.items()])
