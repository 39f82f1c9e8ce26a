"""Writing GGUF files, version 3: the inverse of `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # metadata types
_TENSOR_TYPES = {"float32": 0, "float16": 1}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor's bytes as they are to stand in the file."""

    type: int  # ggml type id, a key of blocks.TYPES
    shape: tuple[int, ...]  # row-major
    data: np.ndarray  # uint8


Value = str | int | float | bytes  # an int is stored as uint32, a float as float32; bytes are what `GGUFFile.raw_value` gives


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray | Encoded], alignment: int = _ALIGNMENT) -> None:
    """Write metadata and tensors (float32 or float16, shapes row-major, or encoded). ``alignment`` is what the metadata say."""
    encoded = {name: tensor if isinstance(tensor, Encoded) else _encoded(tensor) for name, tensor in tensors.items()}
    header = [b"GGUF", struct.pack("<IQQ", 3, len(encoded), len(metadata))]
    header += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, tensor in encoded.items():
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header.append(_text(name) + shape + struct.pack("<IQ", tensor.type, offset))
        offset += padded(tensor.data.nbytes, alignment)
    start = b"".join(header)
    with path.open("wb") as file:
        file.write(start.ljust(padded(len(start), alignment), b"\0"))
        for tensor in encoded.values():
            file.write(tensor.data.tobytes().ljust(padded(tensor.data.nbytes, alignment), b"\0"))


def padded(size: int, alignment: int = _ALIGNMENT) -> int:
    """The bytes that so many take in a file."""
    return -(-size // alignment) * alignment


def _encoded(tensor: np.ndarray) -> Encoded:
    return Encoded(_TENSOR_TYPES[str(tensor.dtype)], tensor.shape, np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")  # as `gguf` reads names that are not UTF-8
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    return struct.pack("<If", _FLOAT32, value) if isinstance(value, float) else struct.pack("<II", _UINT32, value)
