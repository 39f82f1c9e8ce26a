"""Choosing one option of each item so that the costs' sum is small and the sizes' sum stays within a limit.

The multiple-choice knapsack by its Lagrangian relaxation: for a price of a byte every item takes its own cheapest option, the smallest
price that fits is found by bisection, and what room is left goes to the exchanges that gain most (Kellerer, Pferschy and Pisinger,
Knapsack Problems, 2004, chapter 11).
"""

import numpy as np

_BISECTIONS = 60


def choose(costs: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """The option of each item, int [M], for costs float [M, T] and sizes int [M, T]; the sizes chosen never exceed ``room``.

    The smallest options together must fit. An infinite cost forbids an option, but not an item's smallest.
    """
    items = np.arange(len(costs))
    smallest = np.lexsort((costs, sizes), axis=1)[:, 0]
    if sizes[items, smallest].sum() > room:
        raise ValueError("the smallest options exceed the room")
    ceiling = 1e-30 + np.max(costs, where=np.isfinite(costs), initial=0.0)  # a price at which a byte outweighs any cost
    low, high, best = np.log(1e-30), np.log(ceiling) + 1, smallest
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mix = np.argmin(costs + np.exp(middle) * sizes, axis=1)
        if sizes[items, mix].sum() <= room:
            high, best = middle, mix
        else:
            low = middle
    return _filled(costs, sizes, room, best)


def _filled(costs: np.ndarray, sizes: np.ndarray, room: int, mix: np.ndarray) -> np.ndarray:
    """The mix with the room that is left used: whatever exchange gains most, until none that fits gains."""
    mix, items = mix.copy(), np.arange(len(costs))
    while True:
        left = room - sizes[items, mix].sum()
        gain = costs[items, mix][:, None] - costs
        gain[sizes - sizes[items, mix][:, None] > left] = 0
        item, option = np.unravel_index(gain.argmax(), gain.shape)
        if gain[item, option] <= 0:
            return mix
        mix[item] = option
