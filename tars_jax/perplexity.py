"""Perplexity of a text under a model, by the method of llama.cpp's perplexity tool."""

import math
from collections.abc import Callable

import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.loaders.loaded import Model

Progress = Callable[[int, int, float], None]  # chunks done, chunks in all, perplexity so far


def perplexity(model: Model, text: str, *, context: int = 512, exact: bool = True, progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of the text's tokens.

    The tokens are cut into chunks of ``context`` (a rest is left out); each chunk is run on its own, begun with BOS where
    the model's metadata asks for one, and its second half is scored. ``exact`` as in `Model.logits`. Raises InvalidRequest
    for a text that is too short.
    """
    if not 4 <= context <= model.config.context_length:
        raise InvalidRequest(f"the context must be between 4 and the model's {model.config.context_length} tokens, got {context}")
    ids = model.tokenizer.encode(text, add_special=True)
    chunks = len(ids) // context
    if not chunks:
        raise InvalidRequest(f"the text has {len(ids)} tokens; perplexity needs at least one chunk of {context}")
    total, count = 0.0, 0
    for i in range(chunks):
        chunk = ids[i * context : (i + 1) * context]
        if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
            chunk[0] = model.tokenizer.bos_id
        scores = log_probabilities(model.logits(chunk, exact=exact)[context // 2 : -1], chunk[context // 2 + 1 :])
        total, count = total - float(scores.sum()), count + len(scores)
        if progress:
            progress(i + 1, chunks, math.exp(total / count))
    return math.exp(total / count)


def log_probabilities(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """Natural-log probability of each target [N] under logits [N, V], float64."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1)
    normalizer = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=-1))
    return wide[np.arange(len(targets)), targets] - normalizer
