"""GGUF files: metadata and tensors over a memory map, without trusting a single number in the file.

A GGUF file is a header (counts, key/value pairs, tensor descriptions) and then the tensors' bytes. Every count and length
is compared with the bytes that remain before anything is allocated for it, so that a truncated, lying or hostile file
ends in one ModelFileError.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tars_jax.errors import ModelFileError
from tars_jax.loaders.blocks import Blocks, data_size, decode

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 128 << 20  # bytes; a vocabulary of 262,144 tokens with merges takes 20 MiB. Bounds the memory a hostile file can ask for
_MAX_ENTRIES = 1 << 18  # tensors, metadata pairs and arrays in arrays together; bounds the time to read a hostile header
_MAX_DEPTH = 4  # arrays in arrays
_MAX_AXES = 4  # GGML_MAX_DIMS
_MIN_PAIR = 8 + 4 + 1  # bytes of the shortest key/value pair: key length, value type, a bool
_MIN_ARRAY = 4 + 8  # element type, count
_MIN_TENSOR = 8 + 4 + 4 + 8  # name length, axis count, type, offset
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}
_DTYPES = {type_id: np.dtype(name) for type_id, name in _SCALARS.items()}

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]  # row-major, a matrix is (out, in): ggml's ne reversed
    type: int  # ggml type id, a key of blocks.TYPES
    offset: int  # bytes from the start of the file
    nbytes: int


class GGUFFile:
    """An opened file. The memory map lives as long as this object or any array that `raw` or `read` gave."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        """Reads the header. Raises ModelFileError."""
        header = _Header(path, data)
        self.path = path
        self.version = header.version
        self.metadata: dict[str, Any] = header.metadata
        self._values = header.values
        self.tensors: dict[str, TensorInfo] = header.tensors
        self._data = data

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8 [nbytes], read-only and not copied. Raises ModelFileError if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: the file has no tensor {_show(name)}; it may be incomplete or of another architecture")
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)

    def raw_value(self, key: str) -> bytes:
        """A metadata value with its type before it, as it stands in the file. Raises KeyError."""
        return self._data[self._values[key]]

    def read(self, name: str) -> Blocks | np.ndarray:
        """A tensor's values, see `blocks.decode`; dense types are read-only views of the file."""
        raw = self.raw(name)
        return decode(self.tensors[name].type, raw, self.tensors[name].shape)


def open_gguf(path: Path | str) -> GGUFFile:
    """Opens a GGUF file of version 2 or 3, little endian. Raises ModelFileError that says what is wrong with it."""
    path = Path(path)
    try:
        if not path.is_file():  # a named pipe would block, a directory cannot be mapped
            raise ModelFileError(f"{path}: no such file; pass the path of a GGUF file")
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise ModelFileError(f"{path}: the file is empty; download it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise ModelFileError(f"{path}: cannot be opened: {error}") from error
    return GGUFFile(path, data)


def _show(name: str) -> str:
    """A name from a file, fit for an error message: quoted, control characters escaped, shortened."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


class _Header:
    """A cursor over the header that refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at, self._size = path, data, 0, len(data)
        self._end = min(self._size, _MAX_HEADER)
        self._entries = 0
        self.version = self._check_version()
        tensors, pairs = self._u64(), self._u64()
        self._claim(tensors, _MIN_TENSOR, "tensors")
        self._claim(pairs, _MIN_PAIR, "metadata pairs")
        self.values: dict[str, slice] = {}  # where each metadata value stands
        self.metadata = self._metadata(pairs)
        self.tensors = self._tensors(tensors)

    def _fail(self, problem: str, remedy: str = "the file is damaged, download it again") -> NoReturn:
        raise ModelFileError(f"{self._path}: {problem}; {remedy}")

    def _expect(self, count: int, size: int, what: str) -> None:
        """Refuses ``count`` items of at least ``size`` bytes each that the rest of the header cannot hold."""
        if count * size <= self._end - self._at:
            return
        if count * size <= self._size - self._at:
            self._fail(f"the header is larger than {_MAX_HEADER >> 20} MiB", "no known model needs that")
        self._fail(f"truncated or malformed: {count} {what} expected at byte {self._at}, but the file has {self._size} bytes")

    def _claim(self, count: int, size: int, what: str) -> None:
        """`_expect` for entries that become one Python object or more each, of which a header may have only so many."""
        self._expect(count, size, what)
        self._entries += count
        if self._entries > _MAX_ENTRIES:
            self._fail(f"{count} {what} are more than any known model has")

    def _take(self, size: int, what: str) -> bytes:
        self._expect(size, 1, what)
        self._at += size
        return self._data[self._at - size : self._at]

    def _u32(self) -> int:
        return int.from_bytes(self._take(4, "bytes"), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8, "bytes"), "little")

    def _check_version(self) -> int:
        magic = self._data[:4]
        if magic != _MAGIC:
            self._fail(f"not a GGUF file (it starts with {magic!r})", "pass a .gguf model, or download it again")
        self._at = 4
        version = self._u32()
        if version & 0xFFFF == 0 and version:  # a small number, seen from the wrong end
            self._fail("big-endian GGUF is not supported", "use the little-endian file of this model")
        if version not in _VERSIONS:
            remedy = "convert the model again with a current llama.cpp" if version < 2 else "update tars-jax"
            self._fail(f"GGUF version {version} is not supported, only 2 and 3 are", remedy)
        return version

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """``count`` strings. The one hot loop of opening a file: half a million token and merge strings are usual.

        Strings should be UTF-8. Bytes that are not become lone surrogates (PEP 383), from which
        ``s.encode("utf-8", "surrogateescape")`` gives them back; "replace" would make different tokens equal.
        """
        self._expect(count, 8, "strings")
        data, at, end, length_at = self._data, self._at, self._end, _U64.unpack_from
        texts = []
        for _ in range(count):
            start = at + 8
            stop = start + (length_at(data, at)[0] if start <= end else 0)
            if stop > end:
                self._at = at
                self._expect(stop - at, 1, "bytes of text")
            texts.append(data[start:stop].decode("utf-8", "surrogateescape"))
            at = stop
        self._at = at
        return texts

    def _array(self, depth: int) -> list[Any] | np.ndarray:
        kind, count = self._u32(), self._u64()
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                self._fail(f"metadata arrays are nested more than {_MAX_DEPTH} deep")
            self._claim(count, _MIN_ARRAY, "arrays")
            return [self._array(depth + 1) for _ in range(count)]
        dtype = self._dtype(kind)
        self._expect(count, dtype.itemsize, "numbers")
        self._at += count * dtype.itemsize
        values = np.frombuffer(self._data, np.uint8, count * dtype.itemsize, self._at - count * dtype.itemsize)
        return values != 0 if kind == _BOOL else values.copy().view(dtype)  # a copy is aligned and small

    def _dtype(self, kind: int) -> np.dtype:
        if kind not in _DTYPES:
            self._fail(f"unknown metadata type {kind} at byte {self._at}")
        return _DTYPES[kind]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(1)
        dtype = self._dtype(kind)
        value = self._take(dtype.itemsize, "bytes")
        return value != b"\0" if kind == _BOOL else np.frombuffer(value, dtype)[0].item()

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                self._fail(f"metadata key {_show(key)} appears twice")
            start = self._at
            metadata[key] = self._value(self._u32())
            self.values[key] = slice(start, self._at)
        return metadata

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            self._fail("general.alignment is not a power of two")
        return alignment

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        alignment = self._alignment()
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            info = self._tensor(alignment)
            if info.name in found:
                self._fail(f"tensor {_show(info.name)} appears twice")
            found[info.name] = info
        start = -(-self._at // alignment) * alignment  # offsets count from the first aligned byte after the header
        for name, info in found.items():
            end = start + info.offset + info.nbytes
            if end > self._size:
                self._fail(f"truncated: tensor {_show(name)} ends at byte {end}, but the file has {self._size} bytes")
            found[name] = dataclasses.replace(info, offset=start + info.offset)
        return found

    def _tensor(self, alignment: int) -> TensorInfo:
        """The next tensor description; its offset is still relative."""
        name, axes = self._string(), self._u32()
        if axes > _MAX_AXES:
            self._fail(f"tensor {_show(name)} has {axes} axes, GGUF allows {_MAX_AXES}")
        shape = tuple(self._u64() for _ in range(axes))[::-1]
        kind, offset = self._u32(), self._u64()
        if 0 in shape or math.prod(shape) >= 1 << 63:
            self._fail(f"tensor {_show(name)} has the impossible shape {list(shape)}")
        if offset % alignment:
            self._fail(f"tensor {_show(name)} starts at {offset}, which is not a multiple of the alignment {alignment}")
        try:
            return TensorInfo(name, shape, kind, offset, data_size(kind, shape))
        except ModelFileError as error:
            raise ModelFileError(f"{self._path}: tensor {_show(name)}: {error}") from None
