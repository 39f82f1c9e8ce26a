"""llama.cpp's samplers (src/llama-sampler.cpp) written again in numpy, token by token, for one row at a time.

Candidates are (ids, logits) in float64; a filter returns those it leaves.
"""

import math
from collections.abc import Sequence

import numpy as np

Candidates = tuple[np.ndarray, np.ndarray]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def descending(candidates: Candidates) -> Candidates:
    order = np.argsort(-candidates[1], kind="stable")
    return candidates[0][order], candidates[1][order]


def select(candidates: Candidates, which: Sequence[int] | np.ndarray) -> Candidates:
    return candidates[0][which], candidates[1][which]


def top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    x = candidates[1]
    return select(candidates, x >= x.max() - n * x.std()) if n > 0 else candidates


def top_k(candidates: Candidates, k: int) -> Candidates:
    return select(descending(candidates), slice(None, k or None))


def typical(candidates: Candidates, wanted: float) -> Candidates:
    if wanted >= 1:
        return candidates
    p = softmax(candidates[1])
    entropy = -sum(q * math.log(q) for q in p)
    distance = [abs(-math.log(q) - entropy) for q in p]
    chosen, mass = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: distance[i]):
        chosen.append(i)
        mass += p[i]
        if mass > wanted:
            break
    return select(candidates, chosen)


def top_p(candidates: Candidates, wanted: float) -> Candidates:
    candidates = descending(candidates)
    mass = 0.0
    for i, q in enumerate(softmax(candidates[1])):
        mass += q
        if mass >= wanted < 1:
            return select(candidates, slice(i + 1))
    return candidates


def min_p(candidates: Candidates, wanted: float) -> Candidates:
    p = softmax(candidates[1])
    return select(candidates, p >= wanted * p.max())


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    """When chance lets it act."""
    candidates = descending(candidates)
    last = max(int((softmax(candidates[1]) >= threshold).sum()) - 1, 0)
    return select(candidates, slice(last, None))


def dynamic_temperature(candidates: Candidates, temperature: float, reach: float, exponent: float) -> float:
    p = softmax(candidates[1])
    if reach <= 0 or len(p) < 2:
        return temperature
    entropy = -sum(q * math.log(q) for q in p) / math.log(len(p))
    low = max(temperature - reach, 0.0)
    return low + (temperature + reach - low) * entropy**exponent


def mirostat_1(p: np.ndarray, mu: float, vocab: int, m: int = 100) -> int:
    """How many of the descending probabilities stay."""
    t = [math.log((i + 2) / (i + 1)) for i in range(min(m, len(p)) - 1)]
    b = [math.log(p[i] / p[i + 1]) for i in range(min(m, len(p)) - 1)]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    e = s - 1
    return max(int((e * 2**mu / (1 - vocab**-e)) ** (1 / s)), 1)


def mirostat_2(p: np.ndarray, mu: float) -> int:
    return max(int((-np.log2(p) <= mu).sum()), 1)


def penalize(logits: np.ndarray, recent: Sequence[int], repeat: float, presence: float, frequency: float) -> np.ndarray:
    out = logits.astype(np.float64).copy()
    for token in set(recent):
        out[token] = out[token] * repeat if out[token] <= 0 else out[token] / repeat
        out[token] -= recent.count(token) * frequency + presence if isinstance(recent, list) else 0
    return out


def dry(tokens: Sequence[int], window: int, allowed: int, breakers: set[int]) -> dict[int, int]:
    """The tokens that would prolong a repetition, and how long it is so far."""
    recent = list(tokens[-window:]) if window else []
    limit = next((back for back, token in enumerate(reversed(recent)) if token in breakers), len(recent))
    longest: dict[int, int] = {}
    for at in range(1, len(recent)):
        size = 0
        while size < min(at, limit) and recent[at - 1 - size] == recent[-1 - size]:
            size += 1
        if size >= allowed and recent[at] not in breakers:
            longest[recent[at]] = max(size, longest.get(recent[at], 0))
    return longest
