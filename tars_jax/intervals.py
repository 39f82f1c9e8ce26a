"""Confidence intervals of means."""

import numpy as np
from scipy.special import stdtrit


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of values [N] (Student, The Probable Error of a Mean, 1908); infinite for fewer than two."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
