"""GGUF files: what the gguf package writes is read back; what nobody should write is refused."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tars_jax.errors import ModelFileError
from tars_jax.loaders import gguf as module
from tars_jax.loaders.blocks import Blocks
from tars_jax.loaders.gguf import GGUFFile, open_gguf

U8, BOOL, STRING, ARRAY, U32 = 0, 7, 8, 9, 4


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def image(*, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 0, version: int = 3) -> bytes:
    """A whole file: header, padding to 32 bytes, ``data`` bytes of tensors."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


def opened(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return open_gguf(path)


def value(tmp_path: Path, kind: int, content: bytes) -> Any:
    return opened(tmp_path, image(pairs=(pair(b"k", kind, content),))).metadata["k"]


def refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason) as caught:
        opened(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/m.gguf: ")
    assert "\n" not in str(caught.value)


def write(path: Path, **tensors: tuple[np.ndarray, gguf.GGMLQuantizationType | None]) -> Path:
    """A small but complete file from the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("n", 7)
    writer.add_token_list(["<s>", "é", "▁the"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", a=(np.arange(64, dtype=np.float32).reshape(2, 32), None))


SCALARS = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float32": 0.5,
    "float64": 0.1,
    "bool": True,
    "string": "naïve ▁ 🙂",
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalar_metadata_round_trips(kind: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    getattr(writer, f"add_{kind}")("key", SCALARS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = open_gguf(tmp_path / "m.gguf").metadata["key"]
    assert found == SCALARS[kind]
    assert type(found) is type(SCALARS[kind])


def test_string_arrays_are_lists_of_text(small: Path) -> None:
    assert open_gguf(small).metadata["tokenizer.ggml.tokens"] == ["<s>", "é", "▁the"]


def test_number_arrays_are_aligned_arrays(small: Path) -> None:
    scores = open_gguf(small).metadata["tokenizer.ggml.scores"]
    np.testing.assert_array_equal(scores, np.array([0, -1, -2.5], np.float32))
    assert scores.flags.aligned


def test_bool_arrays_are_arrays_of_bools(tmp_path: Path) -> None:
    found = value(tmp_path, ARRAY, array(BOOL, 3, b"\0\1\2"))
    assert found.dtype == np.bool_
    assert found.tolist() == [False, True, True]


def test_nested_arrays_are_lists(tmp_path: Path) -> None:
    found = value(tmp_path, ARRAY, array(ARRAY, 2, array(U8, 2, b"\1\2") + array(STRING, 1, string(b"x"))))
    assert found[0].tolist() == [1, 2]
    assert found[1] == ["x"]


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    text = value(tmp_path, STRING, string(b"a\xff\xfe"))
    assert text.encode("utf-8", "surrogateescape") == b"a\xff\xfe"


def test_metadata_is_that_of_the_reference_reader(small: Path) -> None:
    reader = gguf.GGUFReader(small)
    ours = {key: found.tolist() if isinstance(found, np.ndarray) else found for key, found in open_gguf(small).metadata.items()}
    assert ours == {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_the_same_layout(version: int, small: Path) -> None:
    small.write_bytes(b"GGUF" + struct.pack("<I", version) + small.read_bytes()[8:])
    file = open_gguf(small)
    assert file.version == version
    assert file.metadata["n"] == 7
    assert file.read("a").shape == (2, 32)


def test_tensor_shapes_are_row_major(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float16).reshape(2, 3, 4)
    file = open_gguf(write(tmp_path / "m.gguf", a=(values, None)))
    assert file.tensors["a"].shape == (2, 3, 4)
    np.testing.assert_array_equal(file.read("a"), values)


def test_quantised_tensors_read_as_blocks(tmp_path: Path) -> None:
    weights = np.linspace(-1, 1, 3 * 2 * 64, dtype=np.float32).reshape(3, 2, 64)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(weights, kind)
    found = open_gguf(write(tmp_path / "m.gguf", w=(packed, kind))).read("w")
    assert isinstance(found, Blocks)
    np.testing.assert_array_equal(found.dequantize(), gguf.quants.dequantize(packed, kind))


def test_raw_is_a_read_only_view_of_the_file(small: Path) -> None:
    file = open_gguf(small)
    assert not file.raw("a").flags.writeable
    assert file.raw("a").tobytes() == np.arange(64, dtype="<f4").tobytes()
    assert np.shares_memory(file.raw("a"), file.read("a"))


def test_the_map_outlives_the_file_object(small: Path) -> None:
    values = open_gguf(small).read("a")
    small.unlink()
    assert values[1, 31] == 63


def test_a_wider_alignment_moves_the_tensors(tmp_path: Path) -> None:
    header = image(pairs=(pair(b"general.alignment", U32, struct.pack("<I", 256)),), tensors=(tensor(),))
    file = opened(tmp_path, header.ljust(256 + 128, b"\0"))
    assert file.tensors["t"].offset == 256


def test_a_vocabulary_without_tensors_opens(tmp_path: Path) -> None:
    assert opened(tmp_path, image()).tensors == {}


def test_a_missing_tensor_is_named(small: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tensor 'output\.weight'"):
        open_gguf(small).raw("output.weight")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\3\4" + bytes(60), "not a GGUF file"),
        (image(version=1), "version 1 is not supported, only 2 and 3 are; convert"),
        (image(version=4), "version 4 is not supported, only 2 and 3 are; update"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
    ids=["empty", "short", "zip", "v1", "v4", "big-endian"],
)
def test_other_files_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    refused(tmp_path, content, reason)


@pytest.mark.parametrize("path", ["missing.gguf", ".", "a\0b"])
def test_a_path_without_a_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        open_gguf(tmp_path / path)


HUGE = 2**60
BAD_PAIRS = {
    "key length": (struct.pack("<Q", HUGE) + b"k" * 9, "bytes of text"),
    "string length": (pair(b"k", STRING, struct.pack("<Q", 2**64 - 1)), "bytes of text"),
    "string count": (pair(b"k", ARRAY, array(STRING, HUGE)), "strings expected"),
    "number count": (pair(b"k", ARRAY, array(U32, HUGE)), "numbers expected"),
    "array count": (pair(b"k", ARRAY, array(ARRAY, HUGE)), "arrays expected"),
    "value type": (pair(b"k", 13, b"\0"), "unknown metadata type 13"),
    "element type": (pair(b"k", ARRAY, array(13, 1, b"\0")), "unknown metadata type 13"),
    "nesting": (pair(b"k", ARRAY, array(ARRAY, 1) * 10_000), "nested more than 4 deep"),
    "alignment": (pair(b"general.alignment", U32, struct.pack("<I", 48)), "not a power of two"),
    "alignment zero": (pair(b"general.alignment", U32, bytes(4)), "not a power of two"),
    "alignment type": (pair(b"general.alignment", BOOL, b"\1"), "not a power of two"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_lying_metadata_is_refused(case: str, tmp_path: Path) -> None:
    content, reason = BAD_PAIRS[case]
    refused(tmp_path, image(pairs=(content,)), reason)


BAD_TENSORS = {
    "too many axes": (tensor(dims=(1,) * 5), "5 axes"),
    "axis count": (string(b"t") + struct.pack("<I", 2**32 - 1) + bytes(64), "4294967295 axes"),
    "zero axis": (tensor(dims=(32, 0)), "impossible shape"),
    "huge axis": (tensor(dims=(2**63,)), "impossible shape"),
    "product": (tensor(dims=(2**40, 2**40)), "impossible shape"),
    "past the end": (tensor(dims=(2**40,)), "truncated: tensor 't' ends at byte"),
    "offset": (tensor(offset=2**64 - 32), "truncated: tensor 't' ends at byte"),
    "misaligned": (tensor(offset=8), "not a multiple of the alignment 32"),
    "type": (tensor(kind=4), "unknown ggml tensor type 4"),
    "broken block": (tensor(dims=(33,), kind=2), "rows of 33 weights are not whole Q4_0 blocks"),
    "rows of broken blocks": (tensor(dims=(16, 2), kind=2), "rows of 16 weights are not whole Q4_0 blocks"),
    "escape codes": (tensor(name=b"\x1b[2J\n\xff", kind=99), r"tensor '\\x1b\[2J\\n\\udcff'"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_lying_tensors_are_refused(case: str, tmp_path: Path) -> None:
    content, reason = BAD_TENSORS[case]
    refused(tmp_path, image(tensors=(content,), data=128), reason)


def test_duplicates_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, image(pairs=(pair(b"k", BOOL, b"\1"),) * 2), "metadata key 'k' appears twice")
    refused(tmp_path, image(tensors=(tensor(),) * 2, data=128), "tensor 't' appears twice")


@pytest.mark.parametrize("counts", [(HUGE, 0), (0, HUGE), (2**64 - 1, 2**64 - 1)])
def test_lying_counts_are_refused(counts: tuple[int, int], tmp_path: Path) -> None:
    refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64), "tensors expected|metadata pairs expected")


def test_a_header_of_a_sparse_giant_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(image(pairs=(pair(b"k", ARRAY, array(U8, 2**32)),)))
    with path.open("r+b") as file:
        file.truncate(2**33)  # the bytes exist as far as the file's size tells
    tracemalloc.start()
    with pytest.raises(ModelFileError, match="the header is larger than 128 MiB"):
        open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_more_entries_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MAX_ENTRIES", 10)
    refused(tmp_path, image(pairs=(pair(b"k", ARRAY, array(ARRAY, 10, array(U8, 0) * 10)),)), "10 arrays are more than")


def test_every_truncation_is_refused(small: Path) -> None:
    content = small.read_bytes()
    for size in range(len(content)):
        small.write_bytes(content[:size])
        with pytest.raises(ModelFileError):
            open_gguf(small)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_file_or_an_error(small: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(small.read_bytes())
    for position, byte in changes:
        content[position % len(content)] = byte
    outcome(small.with_name("changed.gguf"), bytes(content))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200), tensors=st.integers(0, 3), pairs=st.integers(0, 3))
def test_noise_after_a_good_start_gives_a_file_or_an_error(tmp_path: Path, tail: bytes, tensors: int, pairs: int) -> None:
    outcome(tmp_path / "m.gguf", b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + tail)


def outcome(path: Path, content: bytes) -> None:
    """Opens and reads everything; anything but a result or ModelFileError escapes and fails the test."""
    path.unlink(missing_ok=True)  # a new inode: an older map of the file must not shrink under its owner
    path.write_bytes(content)
    try:
        file = open_gguf(path)
    except ModelFileError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
