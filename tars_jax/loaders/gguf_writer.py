"""Writing GGUF files, version 3: the inverse of `gguf` for small files of float tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # metadata types
_TENSOR_TYPES = {"float32": 0, "float16": 1}


def write_gguf(path: Path, metadata: Mapping[str, str | int | float], tensors: Mapping[str, np.ndarray]) -> None:
    """Write metadata and tensors (float32 or float16, shapes row-major). An int is stored as uint32, a float as float32."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    header += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *tensor.shape[::-1])
        header.append(_text(name) + shape + struct.pack("<IQ", _TENSOR_TYPES[str(tensor.dtype)], offset))
        offset += _padded(tensor.nbytes)
    start = b"".join(header)
    with path.open("wb") as file:
        file.write(start.ljust(_padded(len(start)), b"\0"))
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes().ljust(_padded(tensor.nbytes), b"\0"))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    return struct.pack("<If", _FLOAT32, value) if isinstance(value, float) else struct.pack("<II", _UINT32, value)
