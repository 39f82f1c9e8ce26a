"""Filters over a whole vocabulary, without sorting it, in llama.cpp's order.

Every one of these filters leaves the logits of an interval: top-k, top-p, min-p cut it from below, typical sampling from both sides,
XTC from above. So a row's filters are two numbers, found by bisection over sums. What depends on a row is [R, 1, 1] here, and logits
are [R, N, B] (`ranking.blocks`), since sums over the middle axis vectorise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax.ranking import blocks, top_k
from tars_jax.sample_rows import SampleRows

MIROSTAT_CANDIDATES = 100  # tokens mirostat 1 estimates the distribution's exponent from
LOWEST = float(np.finfo(np.float32).min)
LOG_2 = float(np.log(2.0))


class Interval(NamedTuple):
    """Which logits are left, and the temperature they are to be divided by: float32 [R, 1, 1] each."""

    low: jax.Array
    high: jax.Array
    temperature: jax.Array


Filter = Callable[[Interval, jax.Array, SampleRows], Interval]


def draw_filtered(logits: jax.Array, rows: SampleRows, mu: jax.Array, *, plain: bool = False) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [R] drawn from logits [R, V] after the rows' filters, and where mirostat stands then, [R]. plain: all rows are, see
    `rows.is_plain`."""
    z = blocks(logits)
    interval = filtered(z, rows, plain=plain)
    if plain:
        return _draw(interval, z, rows)[0], mu
    uses = rows.mirostat > 0
    interval = lax.cond(uses.any(), lambda: mirostat(interval, z, logits, rows, mu), lambda: interval)
    tokens, information = _draw(interval, z, rows)
    return tokens, jnp.where(uses, mu - rows.mirostat_eta * (information / LOG_2 - rows.mirostat_tau), mu)


def filtered(z: jax.Array, rows: SampleRows, *, plain: bool = False) -> Interval:
    """What the rows' filters leave; at least the best token."""
    everything = jnp.full((z.shape[0], 1, 1), LOWEST)
    interval = Interval(everything, _max(z), jnp.where(rows.random, rows.temperature, 1.0)[:, None, None])
    steps: list[tuple[jax.Array, Filter]] = [
        (rows.top_k > 0, _top_k),
        (rows.typical_p < 1, _typical),
        (rows.top_p < 1, _top_p),
        (rows.min_p > 0, _min_p),
        (rows.xtc_probability > 0, _xtc),
        (rows.dynatemp_range > 0, _dynamic_temperature),
    ]
    for wanted, step in steps:
        if plain and step not in _PLAIN:
            continue
        interval = lax.cond(wanted.any(), step, lambda interval, *_: interval, interval, z, rows)
    return interval


def _inside(z: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (z >= low) & (z <= high)


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)


def _max(x: jax.Array) -> jax.Array:
    return x.max(axis=1, keepdims=True).max(axis=2, keepdims=True)


def _weights(interval: Interval, z: jax.Array) -> jax.Array:
    """Unnormalised probabilities of what is left, before the temperature."""
    return jnp.where(_inside(z, interval.low, interval.high), jnp.exp(z - interval.high), 0.0)


def _bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two neighbouring floats: the last for which ``holds``, and the next. It is taken to hold at ``low`` and not above ``high``."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        is_low = holds(_swap(middle))
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    start = _swap(low), _swap(high) + 1
    low, high = lax.fori_loop(0, 32, halve, start)
    return _swap(low), _swap(high)


def _swap(x: jax.Array) -> jax.Array:
    """Floats as integers of the same order, and back."""
    bits = lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered if x.dtype == jnp.float32 else lax.bitcast_convert_type(ordered, jnp.float32)


def _top_k(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    return interval._replace(low=_kth(interval, z, rows.top_k))


def _kth(interval: Interval, z: jax.Array, k: jax.Array) -> jax.Array:
    """The ``k``-th best logit of each row; the lower end where k is 0 or there are fewer."""
    k = k[:, None, None]

    def reaches(low: jax.Array) -> jax.Array:
        return _sum((z >= low).astype(jnp.int32)) >= k

    return jnp.where(k > 0, _bisect(reaches, interval.low, interval.high)[0], interval.low)


def _typical(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    """The tokens whose information is nearest to the entropy, up to a mass (Meister et al. 2022, arXiv 2202.00666)."""
    weights, wanted = _weights(interval, z), rows.typical_p[:, None, None]
    total = _sum(weights)
    mean = interval.high + _sum(weights * jnp.where(weights > 0, z - interval.high, 0.0)) / total  # its information is the entropy

    def is_less(distance: jax.Array) -> jax.Array:
        return _sum(jnp.where(jnp.abs(z - mean) <= distance, weights, 0.0)) <= wanted * total

    _, distance = _bisect(is_less, jnp.zeros_like(mean), jnp.full_like(mean, -LOWEST))
    left = jnp.abs(z - mean) <= distance
    low, high = -_max(jnp.where(left & (weights > 0), -z, -jnp.inf)), _max(jnp.where(left & (weights > 0), z, -jnp.inf))
    return interval._replace(low=jnp.where(wanted < 1, low, interval.low), high=jnp.where(wanted < 1, high, interval.high))


def _top_p(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    """The fewest tokens that reach a mass (Holtzman et al. 2019, arXiv 1904.09751)."""
    weights, wanted = _weights(interval, z), rows.top_p[:, None, None]
    total = _sum(weights)

    def reaches(low: jax.Array) -> jax.Array:
        return _sum(jnp.where(z >= low, weights, 0.0)) >= wanted * total

    low, _ = _bisect(reaches, interval.low, interval.high)
    return interval._replace(low=jnp.where(wanted < 1, low, interval.low))


def _min_p(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    """What is at least so likely, relative to the best (Nguyen et al. 2024, arXiv 2407.01082)."""
    return interval._replace(low=jnp.maximum(interval.low, interval.high + jnp.log(rows.min_p)[:, None, None]))


def _xtc(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    """Now and then, of the tokens above a threshold only the least likely ("exclude top choices", P. E. Weidmann,
    github.com/oobabooga/text-generation-webui/pull/6335)."""
    weights = _weights(interval, z)
    above = (weights > 0) & (weights >= rows.xtc_threshold[:, None, None] * _sum(weights))
    chance = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(position_keys(rows))  # not the draw's own noise
    happens = (rows.xtc_threshold <= 0.5) & (chance < rows.xtc_probability)
    least = -_max(jnp.where(above, -z, -jnp.inf))
    return interval._replace(high=jnp.where(happens[:, None, None] & (_sum(above.astype(jnp.int32)) > 1), least, interval.high))


def _dynamic_temperature(interval: Interval, z: jax.Array, rows: SampleRows) -> Interval:
    """A temperature between T - range and T + range that grows with the entropy of what is left (as in llama.cpp)."""
    weights, reach, temperature = _weights(interval, z), rows.dynatemp_range[:, None, None], interval.temperature
    total = _sum(weights)
    entropy = jnp.log(total) - _sum(weights * jnp.where(weights > 0, z - interval.high, 0.0)) / total
    most = jnp.log(jnp.maximum(_sum(_inside(z, interval.low, interval.high).astype(jnp.float32)), 2.0))
    low, high = jnp.maximum(temperature - reach, 0.0), temperature + reach
    dynamic = low + (high - low) * jnp.maximum(entropy / most, 0.0) ** rows.dynatemp_exponent[:, None, None]
    return interval._replace(temperature=jnp.where(reach > 0, jnp.maximum(dynamic, 1e-5), temperature))


_PLAIN: tuple[Filter, ...] = (_top_k, _top_p, _min_p)


def mirostat(interval: Interval, z: jax.Array, logits: jax.Array, rows: SampleRows, mu: jax.Array) -> Interval:
    """Cut so that a token surprises by no more than about ``mu`` [R] bits (Basu et al. 2021, arXiv 2007.14966).

    Version 1 estimates how many tokens that are from Zipf's law, version 2 cuts where the surprise exceeds mu.
    """
    best, temperature = _max(z), jnp.where(rows.random, rows.temperature, 1.0)[:, None, None]
    whole = Interval(jnp.full_like(best, LOWEST), best, temperature)
    total = _sum(jnp.exp((z - best) / temperature))
    by_surprise = best + temperature * (jnp.log(total) - mu[:, None, None] * LOG_2)
    count = min(MIROSTAT_CANDIDATES, logits.shape[1])
    by_count = _kth(whole, z, _zipf_count(top_k(logits, count)[0] / temperature[:, 0], mu, logits.shape[1]))
    low = jnp.where(rows.mirostat[:, None, None] == 1, by_count, jnp.minimum(by_surprise, best))
    uses = rows.mirostat[:, None, None] > 0
    return Interval(*(jnp.where(uses, ours, theirs) for ours, theirs in zip(whole._replace(low=low), interval, strict=True)))


def _zipf_count(best: jax.Array, mu: jax.Array, vocab: int) -> jax.Array:
    """Mirostat 1's k from each row's best logits, descending [R, M]: int32 [R]."""
    rank = jnp.arange(best.shape[1] - 1, dtype=jnp.float32)
    t = jnp.log((rank + 2) / (rank + 1))[None]
    possible = best[:, 1:] > -jnp.inf
    b = jnp.where(possible, best[:, :-1] - jnp.where(possible, best[:, 1:], 0.0), 0.0)
    exponent = (t * b).sum(axis=1) / jnp.where(possible, t * t, 0.0).sum(axis=1)
    excess = exponent - 1
    k = (excess * 2**mu / (1 - jnp.float32(vocab) ** -excess)) ** (1 / exponent)
    return jnp.clip(jnp.nan_to_num(k, nan=1.0), 1, vocab).astype(jnp.int32)


def _draw(interval: Interval, z: jax.Array, rows: SampleRows) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn by inverting the distribution function, and their information in nats. Columns of ``z`` first, then rows."""
    weights = jnp.where(_inside(z, interval.low, interval.high), jnp.exp((z - interval.high) / interval.temperature), 0.0)
    columns = weights.sum(axis=1)
    column, rest = _invert(columns, jax.vmap(jax.random.uniform)(position_keys(rows)) * columns.sum(axis=1))
    ones = jnp.take_along_axis(weights, column[:, None, None], axis=2)[:, :, 0]
    row, _ = _invert(ones, rest)
    information = jnp.log(columns.sum(axis=1)) - jnp.log(jnp.take_along_axis(ones, row[:, None], axis=1)[:, 0])
    return row * z.shape[2] + column, information


def _invert(weights: jax.Array, mass: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum of weights [R, C] exceeds ``mass`` [R], and how far. Never where the weight is 0, whatever the rounding."""
    sums = jnp.cumsum(weights, axis=1)
    at = jnp.minimum((sums <= mass[:, None]).sum(axis=1, dtype=jnp.int32), weights.shape[1] - 1)
    at = jnp.where(jnp.take_along_axis(weights, at[:, None], axis=1)[:, 0] > 0, at, jnp.argmax(weights, axis=1).astype(jnp.int32))
    before = jnp.take_along_axis(sums - weights, at[:, None], axis=1)[:, 0]
    return at, mass - before


def position_keys(rows: SampleRows) -> jax.Array:
    """The noise of each row's next token: keys [R] that depend on seed and position alone."""
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(rows.seed, rows.length)
