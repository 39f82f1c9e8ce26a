"""Encoding into ggml blocks, against the gguf package's own quantisers and decoders."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from tars_jax.errors import InvalidRequest
from tars_jax.loaders.blocks import TYPES, Blocks, decode
from tars_jax.loaders.quantizers import DENSE, QUANTIZERS, encode, fallback

IDS = {kind.name: type_id for type_id, kind in TYPES.items()}
THEIRS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # types that the gguf package can write


def matrix(rows: int = 24, width: int = 512, seed: int = 0) -> np.ndarray:
    """Normal weights with some large ones, and a block of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(4, (rows, width)).astype(np.float32) * 0.02
    weights[3, :256] = 0
    return weights


def restored(name: str, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    value = decode(IDS[name], data, shape)
    return value.dequantize() if isinstance(value, Blocks) else value.astype(np.float32)


@pytest.mark.parametrize("name", [*QUANTIZERS, *DENSE])
def test_what_is_written_reads_the_same_as_with_gguf(name: str) -> None:
    weights = matrix()
    data = encode(name, weights)
    theirs = dequantize(data.reshape(len(weights), -1), GGMLQuantizationType[name])
    np.testing.assert_allclose(restored(name, data, weights.shape), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", THEIRS)
def test_the_fit_is_closer_than_plain_rounding(name: str) -> None:
    weights = matrix()
    theirs = dequantize(gguf_quantize(weights, GGMLQuantizationType[name]), GGMLQuantizationType[name])
    ours = restored(name, encode(name, weights), weights.shape)
    blocks = (len(weights), -1, 32)
    error, reference = (((x - weights) ** 2).reshape(blocks).sum(2) for x in (ours, theirs))
    assert (error <= reference * (1 + 1e-5) + 1e-12).all()  # in every block: plain rounding is one of the trials
    assert error.sum() < (0.99 if name == "Q8_0" else 0.95) * reference.sum()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_errors_shrink_with_the_bits(name: str) -> None:
    weights = matrix()
    error = np.sqrt(((restored(name, encode(name, weights), weights.shape) - weights) ** 2).mean() / (weights**2).mean())
    bits = {"Q4": 0.12, "IQ": 0.11, "Q5": 0.06, "Q6": 0.03, "Q8": 0.01}
    assert error < bits[name[:2]]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_inputs_that_matter_more_are_kept_better(name: str) -> None:
    weights, matter = matrix(), np.ones(512, np.float32)
    matter[::8] = 50
    plain, weighted = (restored(name, encode(name, weights, m), weights.shape) for m in (None, matter))
    cost = [float((((x - weights) ** 2) * matter).sum()) for x in (plain, weighted)]
    assert cost[1] < cost[0]


@pytest.mark.parametrize("name", THEIRS)
def test_what_a_type_can_hold_comes_back(name: str) -> None:
    weights = dequantize(gguf_quantize(matrix(), GGMLQuantizationType[name]), GGMLQuantizationType[name])
    np.testing.assert_allclose(restored(name, encode(name, weights), weights.shape), weights, rtol=2e-3, atol=1e-5)


def test_a_chunk_does_not_change_its_neighbours() -> None:
    weights = np.tile(matrix(8, 64), (3000, 1))  # more than is fitted at a time
    data = encode("Q4_0", weights).reshape(3000, -1)
    assert (data == data[0]).all()


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [("Q4_K", 576, "Q5_0"), ("Q5_K", 576, "Q5_1"), ("Q6_K", 576, "Q8_0"), ("Q4_K", 512, "Q4_K"), ("Q4_0", 40, "F16"), ("Q6_K", 40, "F16")],
)
def test_rows_that_are_not_whole_blocks_fall_back_as_in_llama_cpp(name: str, width: int, expected: str) -> None:
    assert fallback(name, width) == expected


def test_a_type_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Q2_K cannot be written"):
        encode("Q2_K", matrix())
    with pytest.raises(InvalidRequest, match="not whole Q4_0 blocks"):
        encode("Q4_0", matrix(4, 40))
