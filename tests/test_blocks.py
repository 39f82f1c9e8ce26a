"""ggml tensor types against the gguf package, whose dequantisation is the reference."""

import gguf
import numpy as np
import pytest

from tars_jax.errors import ModelFileError
from tars_jax.loaders import blocks as blocks_module
from tars_jax.loaders.blocks import TYPES, Blocks, BlockType, data_size, decode
from tars_jax.quant import pack

QUANTISED = {type_id: kind for type_id, kind in TYPES.items() if kind.dtype is None}
DENSE = {type_id: kind for type_id, kind in TYPES.items() if kind.dtype is not None}
Q1_0 = 41  # gguf 0.19 knows its size but cannot dequantise it
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)} | {
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ1_M": (),
    "MXFP4": (),
    "NVFP4": (),
}  # where a block's float16 numbers are; of the others only at byte 0


def random_bytes(kind: BlockType, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, type_size]: any bits, but finite float16 numbers and scales."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, kind.type_size), np.uint8)
    for start in HALVES.get(kind.name, (0,)):
        raw[:, start : start + 2] = rng.standard_normal(count).astype("<f2").view(np.uint8).reshape(count, 2)
    if kind.name == "IQ1_M":
        raw[:, 55] &= 0x8F  # the top bits of its scattered float16
    if kind.name == "MXFP4":
        raw[:, 0] %= 250  # 2^127 times a code would overflow
    return raw


def random_blocks(type_id: int, count: int = 64) -> Blocks:
    kind = TYPES[type_id]
    decoded = decode(type_id, random_bytes(kind, count).reshape(-1), (count, kind.block_size))
    assert isinstance(decoded, Blocks)
    return decoded


def reference(type_id: int, raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id))


each_quantised = pytest.mark.parametrize("type_id", QUANTISED, ids=[kind.name for kind in QUANTISED.values()])
each_dense = pytest.mark.parametrize("type_id", DENSE, ids=[kind.name for kind in DENSE.values()])


@pytest.mark.parametrize("type_id", sorted(QUANTISED.keys() - {Q1_0}), ids=lambda type_id: TYPES[type_id].name)
def test_weights_equal_the_reference_bit_for_bit(type_id: int) -> None:
    # Every product is exact in float32 or rounded once, in the same place as in ggml: no tolerance is needed.
    raw = random_bytes(TYPES[type_id], 64)
    np.testing.assert_array_equal(random_blocks(type_id).dequantize(), reference(type_id, raw))


def test_q1_0_is_a_sign_bit_lowest_first_times_a_scale() -> None:
    raw = random_bytes(TYPES[Q1_0], 3)
    scale = raw[:, :2].copy().view("<f2").astype(np.float32)
    signs = np.unpackbits(raw[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    np.testing.assert_array_equal(decode(Q1_0, raw.reshape(-1), (3, 128)).dequantize(), scale * signs)


@each_quantised
def test_codes_keep_the_range_that_bits_promises(type_id: int) -> None:
    decoded = random_blocks(type_id)
    low, high = (0, 15) if decoded.mins is not None else (-8, 7)
    fits = low <= decoded.codes.min() and decoded.codes.max() <= high
    assert fits == (decoded.bits == 4)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_views_are_the_file_s_own_bytes_in_the_order_of_packing(name: str) -> None:
    decoded = random_blocks(gguf.GGMLQuantizationType[name])
    packed = pack(decoded.codes, decoded.scales, decoded.mins, bits=decoded.bits, group=decoded.group)
    views = decoded.views()
    assert views is not None
    assert all(np.shares_memory(view, decoded.data) for view in views if view is not None)
    np.testing.assert_array_equal(views[0].reshape(packed.codes.shape), packed.codes.view(np.uint8))
    np.testing.assert_array_equal(views[1], packed.scales)
    assert (views[2] is None) == (packed.mins is None)
    if views[2] is not None:
        np.testing.assert_array_equal(views[2], packed.mins)


@each_quantised
def test_the_form_is_one_that_packing_takes(type_id: int) -> None:
    decoded = random_blocks(type_id)
    assert decoded.codes.dtype == np.int8
    assert decoded.group in (16, 32)
    assert decoded.scales.shape == (64, TYPES[type_id].block_size // decoded.group)
    assert decoded.mins is None or (decoded.mins.shape, decoded.mins.dtype) == (decoded.scales.shape, decoded.scales.dtype)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_scales_that_the_file_holds_stay_float16(name: str) -> None:
    assert random_blocks(gguf.GGMLQuantizationType[name]).scales.dtype == np.float16


@each_quantised
def test_leading_axes_are_kept(type_id: int) -> None:
    kind = TYPES[type_id]
    raw, shape = random_bytes(kind, 12).reshape(-1), (2, 3, 2 * kind.block_size)
    flat, deep = decode(type_id, raw, (6, shape[-1])), decode(type_id, raw, shape)
    assert isinstance(flat, Blocks)
    assert isinstance(deep, Blocks)
    assert deep.shape == shape
    np.testing.assert_array_equal(deep.dequantize(), flat.dequantize().reshape(shape))


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_blocks(14).dequantize()
    monkeypatch.setattr(blocks_module, "_CHUNK_WEIGHTS", 3 * 256)  # 64 blocks are not a multiple of 3
    np.testing.assert_array_equal(random_blocks(14).dequantize(), whole)


def test_rows_reorder_the_first_axis() -> None:
    decoded, order = random_blocks(12, 4), np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(decoded.rows(order).dequantize(), decoded.dequantize()[order])


@each_dense
def test_dense_types_are_views_of_the_bytes(type_id: int) -> None:
    kind = TYPES[type_id]
    raw = np.arange(6 * kind.type_size, dtype=np.uint8)
    values = decode(type_id, raw, (1, 2, 3))
    assert isinstance(values, np.ndarray)
    assert (values.shape, values.dtype) == ((1, 2, 3), kind.dtype)
    assert np.shares_memory(values, raw)


def test_bf16_equals_the_reference() -> None:
    raw = np.arange(0x3F00, 0x4100, dtype="<u2").view(np.uint8)
    np.testing.assert_array_equal(decode(30, raw, (512,)).astype(np.float32), reference(30, raw.reshape(1, -1))[0])


@each_quantised
def test_non_finite_scales_decode_without_a_warning(type_id: int) -> None:
    kind = TYPES[type_id]
    decoded = decode(type_id, np.full(kind.type_size, 0xFF, np.uint8), (kind.block_size,))
    assert decoded.dequantize().shape == (kind.block_size,)


def test_an_empty_tensor_decodes_to_nothing() -> None:
    assert decode(2, np.empty(0, np.uint8), (0, 32)).dequantize().shape == (0, 32)


@pytest.mark.parametrize("type_id", TYPES, ids=[kind.name for kind in TYPES.values()])
def test_sizes_and_names_are_ggml_s(type_id: int) -> None:
    known = gguf.GGMLQuantizationType(type_id)
    assert (TYPES[type_id].block_size, TYPES[type_id].type_size) == gguf.GGML_QUANT_SIZES[known]
    assert TYPES[type_id].name == known.name


def test_the_table_has_every_type_that_the_reference_dequantises() -> None:
    assert set(gguf.quants._type_traits) <= set(TYPES)


def test_data_size_counts_whole_blocks() -> None:
    assert data_size(14, (2, 3, 512)) == 2 * 3 * 2 * 210


def test_an_unknown_type_is_refused_by_number() -> None:
    with pytest.raises(ModelFileError, match="unknown ggml tensor type 99"):
        data_size(99, (32,))


@pytest.mark.parametrize("shape", [(1, 100), ()])
def test_rows_of_broken_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelFileError, match="not whole Q4_K blocks of 256"):
        data_size(12, shape)


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ModelFileError, match="takes 18 bytes, but 17 were given"):
        decode(2, np.zeros(17, np.uint8), (32,))
