"""Perplexity of a text under a model, by the method of llama.cpp's perplexity tool."""

import math
from collections.abc import Callable

import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.loaders.loaded import Model
from tars_jax.tokenizer import Tokenizer

Progress = Callable[[int, int, float], None]  # chunks done, chunks in all, perplexity so far


def perplexity(model: Model, text: str, *, context: int = 512, exact: bool = True, progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of the text's tokens.

    The tokens are cut into chunks of ``context`` (a rest is left out); each chunk is run on its own, begun with BOS where
    the model's metadata asks for one, and its second half is scored. ``exact`` as in `Model.logits`. Raises InvalidRequest
    for a text that is too short.
    """
    if not 4 <= context <= model.config.context_length:
        raise InvalidRequest(f"the context must be between 4 and the model's {model.config.context_length} tokens, got {context}")
    chunks = split(model.tokenizer, text, context)
    total, count = 0.0, 0
    for i, chunk in enumerate(chunks):
        scores = log_probabilities(model.logits(chunk, exact=exact)[context // 2 : -1], chunk[context // 2 + 1 :])
        total, count = total - float(scores.sum()), count + len(scores)
        if progress:
            progress(i + 1, len(chunks), math.exp(total / count))
    return math.exp(total / count)


def split(tokenizer: Tokenizer, text: str, context: int) -> list[list[int]]:
    """A text's tokens in chunks of ``context``, the rest left out. Raises InvalidRequest for a text without a whole chunk."""
    ids = tokenizer.encode(text, add_special=True)
    chunks = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    if not chunks:
        raise InvalidRequest(f"the text has {len(ids)} tokens; at least one chunk of {context} is needed")
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_id
    return chunks


def log_probabilities(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """Natural-log probability of each target [N] under logits [N, V], float64."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1)
    normalizer = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=-1))
    return wide[np.arange(len(targets)), targets] - normalizer
