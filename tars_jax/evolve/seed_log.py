"""The seed log: a few KB from which an evolved adapter is made again, exactly, on the same model; and from which a run goes on.

Noise is a function of the seed, so the values that each generation told are all there is to a run. What else it depends on stands
here too: the settings, and the examples that gave the directions of the search.
"""

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.evolve.data import Example
from tars_jax.evolve.evolution import Evolution, State
from tars_jax.evolve.fitness import Fitness
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.loaded import Model

FORMAT = "tars seed log 2"  # 1: `a` lay the other way round


def write_seed_log(path: Path, evolution: Evolution, state: State, best: int, vector: jax.Array) -> None:
    """Write the log of a run whose best update, ``vector``, was found after ``best`` generations."""
    texts = json.dumps([[e.prompt_text, e.completion_text, *map(list, (e.prompt, e.completion))] for e in evolution.basis_examples])
    record = {
        "format": FORMAT,
        "model": evolution.model.name,
        "model_sha256": file_digest(evolution.model.path),
        "data_sha256": data_digest(evolution.examples),
        "settings": dataclasses.asdict(evolution.settings),
        "basis_examples": _packed(texts.encode()),
        "best_generation": best,
        "best_sha256": vector_digest(vector),
        "log": [_packed(values.tobytes()) for values in state.log],
    }
    path.write_text(json.dumps(record, indent=1))


def read_seed_log(path: Path) -> dict[str, Any]:
    """The log as it was written, `settings`, `basis_examples` and `log` decoded. Raises InvalidRequest."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {FORMAT!r}")
        record["settings"] = Settings(**record["settings"] | {"matrices": tuple(record["settings"]["matrices"])})
        record["log"] = [np.frombuffer(_unpacked(values), np.float32) for values in record["log"]]
        rows = json.loads(_unpacked(record["basis_examples"]))
        record["basis_examples"] = [Example(tuple(prompt), tuple(completion), *texts) for *texts, prompt, completion in rows]
        if any(len(values) != record["settings"].population for values in record["log"]):
            raise ValueError("a generation has another number of members than the settings")
        int(record["best_generation"])
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise InvalidRequest(f"{path} is not a seed log: {getattr(error, 'strerror', None) or error}") from None
    return record


def rebuild(path: Path, model: Model) -> tuple[Evolution, jax.Array]:
    """The best update of a logged run, made again. Raises InvalidRequest for another model, or where arithmetic differs."""
    record = read_seed_log(path)
    check_model(record, model, path)
    evolution = Evolution(model, record["basis_examples"], record["settings"], fitness=Fitness("label"))
    vector = evolution.centre(evolution.replay(record["log"][: record["best_generation"]]))
    if vector_digest(vector) != record["best_sha256"]:
        raise InvalidRequest(f"{path} gives other numbers here: arithmetic differs from that of the run; use its adapter files")
    return evolution, vector


def check_model(record: dict[str, Any], model: Model, path: Path) -> None:
    """Raise InvalidRequest if the log is of another model."""
    if record["model_sha256"] != file_digest(model.path):
        raise InvalidRequest(f"{path} belongs to another model: {record['model']}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of nothing, for a model that was made in memory."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples' tokens."""
    return hashlib.sha256(repr([(e.prompt, e.completion) for e in examples]).encode()).hexdigest()


def vector_digest(vector: jax.Array) -> str:
    return hashlib.sha256(np.asarray(vector).tobytes()).hexdigest()


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    """Raises ValueError for more than a log can hold: a few bytes of it may stand for gigabytes."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"an entry unpacks to more than {MAX_BYTES} bytes")
    return data


MAX_BYTES = 1 << 26
