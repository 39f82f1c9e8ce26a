"""The matrices of a GGUF file in every type they may get: bytes for the file, values for evaluation, both made once and shared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.hub.gguf_manifest import FILE_TYPES
from tars_jax.loaders.blocks import TYPES, Blocks, decode
from tars_jax.loaders.gguf import GGUFFile, TensorInfo
from tars_jax.loaders.gguf_model import read_config, rotary_order
from tars_jax.loaders.gguf_writer import Encoded, padded, write_gguf
from tars_jax.loaders.names import GGUF, translate
from tars_jax.loaders.quantizers import QUANTIZERS, encode, fallback
from tars_jax.model import Decoder, leaf_name, spec

IDS = {kind.name: type_id for type_id, kind in TYPES.items()}
WRITABLE = (*QUANTIZERS, "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A tensor whose type is chosen."""

    info: TensorInfo
    leaf: str  # canonical name
    type: str  # in the source

    @property
    def role(self) -> str:
        """What it is in its block: q, k, v, o, gate, up, down, embed, lm_head ..."""
        return self.leaf.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        return next((int(part) for part in self.leaf.split(".") if part.isdigit()), None)


class Versions:
    """A file's matrices and the types each may have: ``types`` (with llama.cpp's fallbacks), and as it stands in the file.

    Options are numbered: 0 .. len(types) - 1, and ``kept``, the last, for the source's bytes as they are.
    """

    def __init__(self, file: GGUFFile, types: Sequence[str], memory: int = 0) -> None:
        """``memory``: bytes of dense values to keep. Raises InvalidRequest for types that cannot be written, ModelFileError."""
        if unknown := [name for name in types if name not in WRITABLE]:
            raise InvalidRequest(f"{', '.join(unknown)}: no types that can be written; choose among {', '.join(WRITABLE)}")
        self.file, self.types, self.config = file, tuple(dict.fromkeys(types)), read_config(file)
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(spec(self.config))[0]}
        found = [(info, translate(name, GGUF)) for name, info in file.tensors.items()]
        self.matrices = tuple(
            Matrix(info, leaf, TYPES[info.type].name)
            for info, leaf in found
            if leaf in leaves and len(info.shape) > 1  # type: ignore[operator]  # None is in no dictionary of names
        )
        self.importance: dict[str, np.ndarray] = {}  # by leaf: mean squares of its inputs [K]
        self.kept = len(self.types)
        self._packed: dict[tuple[int, str], np.ndarray] = {}
        self._dense: dict[tuple[int, str], jax.Array] = {}
        self.memory = memory  # left for dense values
        self.sizes = np.array([[self._size(i, t) for t in range(self.kept + 1)] for i in range(len(self.matrices))], np.int64)
        others = [info for info in file.tensors.values() if info not in {matrix.info for matrix in self.matrices}]
        self.fixed = self._header_size() + sum(padded(info.nbytes, self._alignment) for info in others)

    @property
    def _alignment(self) -> int:
        return int(self.file.metadata.get("general.alignment", 32))

    def type_of(self, i: int, option: int) -> str:
        """The ggml type that an option means for matrix ``i``."""
        matrix = self.matrices[i]
        return matrix.type if option == self.kept else fallback(self.types[option], matrix.info.shape[-1])

    def file_size(self, mix: Sequence[int] | np.ndarray) -> int:
        """Bytes of the file with these options."""
        return self.fixed + int(self.sizes[np.arange(len(self.matrices)), np.asarray(mix)].sum())

    def packed(self, i: int, name: str) -> np.ndarray:
        """Bytes of matrix ``i`` in a type; in the source's own they are the source's."""
        if name == self.matrices[i].type:
            return self.file.raw(self.matrices[i].info.name)
        key = i, name
        if key not in self._packed:
            self._packed[key] = encode(name, self._source(i), self.importance.get(self.matrices[i].leaf))
        return self._packed[key]

    def dense(self, i: int, option: int) -> jax.Array:
        """Values of matrix ``i`` under an option as the model multiplies by them, float32 [O, K]."""
        name = self.type_of(i, option)
        key = i, name
        if key in self._dense:
            return self._dense[key]
        values = jnp.asarray(self._in_model_order(i, self._values(i, name)))
        if values.nbytes <= self.memory:
            self.memory -= values.nbytes
            self._dense[key] = values
        return values

    def costs(self, i: int) -> np.ndarray:
        """Sum of squared errors of the products by matrix ``i``, a token in the mean, under every option: sum((dW)^2 E[x^2]).

        Infinite for what is no smaller than the source and another type: nothing speaks for it, so it is not even encoded.
        """
        source, matter = self._source(i), self.importance.get(self.matrices[i].leaf, np.float32(1))
        known = {self.matrices[i].type: 0.0}
        for option in range(self.kept):
            name = self.type_of(i, option)
            if name not in known and self.sizes[i, option] >= self.sizes[i, self.kept]:
                known[name] = np.inf
            if name not in known:
                error = self._values(i, name).reshape(source.shape) - source
                squares = np.square(error, out=error).reshape(-1, source.shape[-1]).sum(axis=0)
                known[name] = float((squares * matter).sum())
        return np.array([known[self.type_of(i, option)] for option in range(self.kept + 1)])

    def params(self, base: Decoder, mix: Sequence[int] | np.ndarray) -> Decoder:
        """A model's parameters, dense, with its matrices under these options."""
        values = {matrix.leaf: self.dense(i, int(mix[i])) for i, matrix in enumerate(self.matrices)}
        return jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(leaf_name(path), leaf), base)

    def counts(self, mix: Sequence[int] | np.ndarray) -> dict[str, int]:
        """How many matrices have each type, most first."""
        names = [self.type_of(i, int(option)) for i, option in enumerate(mix)]
        return {name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))}

    def write(self, path: Path, mix: Sequence[int] | np.ndarray) -> None:
        """The model's file with these options: everything else is copied. Appears when it is complete."""
        chosen = {matrix.info.name: self.type_of(i, int(mix[i])) for i, matrix in enumerate(self.matrices)}
        tensors = {
            name: Encoded(info.type, info.shape, self.file.raw(name)) for name, info in self.file.tensors.items() if name not in chosen
        }
        for i, matrix in enumerate(self.matrices):
            name = chosen[matrix.info.name]
            tensors[matrix.info.name] = Encoded(IDS[name], matrix.info.shape, self.packed(i, name))
        metadata: dict[str, bytes | int] = {key: self.file.raw_value(key) for key in self.file.metadata}
        metadata |= {"general.file_type": self._file_type(mix), "general.quantization_version": 2}
        partial = path.with_name(path.name + ".partial")
        try:
            write_gguf(partial, metadata, {name: tensors[name] for name in self.file.tensors}, self._alignment)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _file_type(self, mix: Sequence[int] | np.ndarray) -> int:
        """llama.cpp's number for the type that most weights have."""
        weights: dict[str, int] = {}
        for i, matrix in enumerate(self.matrices):
            name = self.type_of(i, int(mix[i]))
            weights[name] = weights.get(name, 0) + math.prod(matrix.info.shape)
        numbers = {"Q4_K": 14, "Q5_K": 16} | {name: number for number, name in FILE_TYPES.items()}
        return numbers[max(weights, key=lambda name: weights[name])]

    def _size(self, i: int, option: int) -> int:
        kind, shape = TYPES[IDS[self.type_of(i, option)]], self.matrices[i].info.shape
        return padded(math.prod(shape) // kind.block_size * kind.type_size, self._alignment)

    def _header_size(self) -> int:
        """Bytes before the tensors: types and offsets in it take the same room whatever they are."""
        pairs = {key: 8 + len(key.encode("utf-8", "surrogateescape")) + len(self.file.raw_value(key)) for key in self.file.metadata}
        pairs |= {key: 8 + len(key) + 8 for key in ("general.file_type", "general.quantization_version")}
        names = [(8 + len(name.encode("utf-8", "surrogateescape")), info) for name, info in self.file.tensors.items()]
        return padded(24 + sum(pairs.values()) + sum(size + 16 + 8 * len(info.shape) for size, info in names), self._alignment)

    def _source(self, i: int) -> np.ndarray:
        """The matrix as its file has it, float32."""
        return _widened(self.file.read(self.matrices[i].info.name))

    def _values(self, i: int, name: str) -> np.ndarray:
        return _widened(decode(IDS[name], self.packed(i, name), self.matrices[i].info.shape))

    def _in_model_order(self, i: int, values: np.ndarray) -> np.ndarray:
        order = rotary_order(self.config, self.matrices[i].leaf, len(values))
        return values if order is None else values[order]


def _widened(value: Blocks | np.ndarray) -> np.ndarray:
    return value.dequantize() if isinstance(value, Blocks) else value.astype(np.float32)


def named(versions: Versions, mix: Sequence[int] | np.ndarray) -> Mapping[str, str]:
    """The type of each matrix, by its name in the file."""
    return {matrix.info.name: versions.type_of(i, int(mix[i])) for i, matrix in enumerate(versions.matrices)}
