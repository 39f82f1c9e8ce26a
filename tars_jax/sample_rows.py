"""What each row of a step wants of the sampler, as arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tars_jax import struct
from tars_jax.config import MAX_BIASES
from tars_jax.rows import FIELDS


class Extras(NamedTuple):
    """What few rows use: large arrays that stay on the device, all zeros, as long as nobody does.

    allowed: uint32 [R, ceil(V / 32)]: bit v % 32 of word v // 32 allows token v; read for masked rows.
    breakers: the same shape: tokens that break DRY's sequences; read for rows with a DRY multiplier.
    biases: int32 [R, 2, config.MAX_BIASES], see `rows.pack_biases`; read for biased rows.
    """

    allowed: jax.Array
    breakers: jax.Array
    biases: jax.Array


@struct.dataclass
class SampleRows:
    """What each of R rows wants. Float32 or int32 [R] unless said otherwise; the names are those of `SamplingParams`."""

    temperature: jax.Array  # 0: greedy
    top_k: jax.Array  # 0: off
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    top_n_sigma: jax.Array  # 0: off
    xtc_probability: jax.Array
    xtc_threshold: jax.Array
    dynatemp_range: jax.Array
    dynatemp_exponent: jax.Array
    repeat_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    window: jax.Array  # tokens the penalties look back on
    dry_multiplier: jax.Array  # 0: off
    dry_base: jax.Array
    dry_allowed_length: jax.Array
    dry_window: jax.Array
    mirostat: jax.Array  # 0, or the version
    mirostat_tau: jax.Array  # bits
    mirostat_eta: jax.Array
    seed: jax.Array  # uint32
    top_logprobs: jax.Array  # alternatives wanted beside the token's own log-probability; -1: not even that
    biased: jax.Array  # bool: whether `extras.biases` counts
    masked: jax.Array  # bool: whether `extras.allowed` counts
    mu: jax.Array  # bits: where mirostat stands; NaN: as the slot's last token left it
    slot: jax.Array  # of the row in the token table
    length: jax.Array  # tokens so far: the position of the new one
    extras: Extras

    @property
    def random(self) -> jax.Array:
        return self.temperature > 0

    @property
    def special(self) -> jax.Array:
        """Whether more is wanted than top-k, top-p and min-p."""
        return (self.typical_p < 1) | (self.xtc_probability > 0) | (self.dynatemp_range > 0) | (self.mirostat > 0)


def unpack_rows(packed: jax.Array, extras: Extras) -> SampleRows:
    """Packed rows int32 [R, len(FIELDS)] as `SampleRows`."""
    columns: dict[str, jax.Array] = {
        name: lax.bitcast_convert_type(packed[:, i], jnp.dtype(dtype)) for i, (name, dtype) in enumerate(FIELDS.items())
    }
    flags = {name: columns[name] > 0 for name in ("biased", "masked")}
    return SampleRows(**{**columns, **flags}, extras=extras)


def no_extras(rows: int, vocab_size: int) -> Extras:
    """Extras for rows that use none."""
    words = (rows, -(-vocab_size // 32))
    zeros = np.zeros(words, np.uint32), np.zeros(words, np.uint32), np.zeros((rows, 2, MAX_BIASES), np.int32)
    return Extras(*map(jax.device_put, zeros))  # jnp.zeros would be compiled first
