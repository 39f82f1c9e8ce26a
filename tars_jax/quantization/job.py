"""A whole run: from a model and texts to a file and what is to be said about it."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from tars_jax import planning
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.evaluation import general_text
from tars_jax.loaders.opening import Model, ModelFile, load
from tars_jax.perplexity import split
from tars_jax.quantization.search import Candidate, Outcome, Progress, Search, Settings, is_quantised
from tars_jax.quantization.versions import Versions, named
from tars_jax.tokenizer import Tokenizer

SAMPLE_CONTEXTS, HELD_OUT_CONTEXTS = (256, 64), (512, 64)  # tokens of a chunk; the shorter for texts of fewer than so many chunks:
ENOUGH = 4
HELD_BACK = 5  # without a held-out text, the last of so many parts of the text is kept from the search


def open_source(name_or_path: str | Path, types: Sequence[str]) -> tuple[Model, Versions]:
    """A model with dense weights, and the versions its matrices may have. Raises InvalidRequest for a model with adapters."""
    file = ModelFile.open(name_or_path)
    if file.adapters:
        raise InvalidRequest(f"{name_or_path} has adapters, which a file of weights cannot hold: quantise the model they are for")
    versions = Versions(file.gguf, types)
    model = load(file.path, weights="dense")
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype("float32"), model.params))
    versions.memory = planning.free_device_bytes() // 2
    return model, versions


def chunked(tokenizer: Tokenizer, text: str, contexts: Sequence[int], longest: int) -> list[list[int]]:
    """A text in chunks of the first of these contexts of which it has enough, else of the last. Raises InvalidRequest."""
    chunks: list[list[int]] = []
    for context in contexts:
        if context == contexts[-1] or (context <= longest and len(tokenizer.encode(text)) >= ENOUGH * context):
            chunks = split(tokenizer, text, context)
            break
    return chunks


def texts(text: str | None, held_out: str | None) -> tuple[str, str]:
    """What to search with and what to judge with: the last part of the one text where there are not two."""
    text = general_text() if text is None else text
    if held_out is not None:
        return text, held_out
    cut = len(text) * (HELD_BACK - 1) // HELD_BACK
    cut = max(text.rfind("\n", cut // 2, cut), text.rfind(". ", cut // 2, cut)) + 1 or cut
    return text[:cut], text[cut:]


def search(model: Model, versions: Versions, settings: Settings, text: str, held_out: str, progress: Progress) -> Outcome:
    """The search on a model, see `Search`."""
    longest = model.config.context_length
    found = Search(versions, model.params, settings, progress)
    return found.run(
        chunked(model.tokenizer, text, SAMPLE_CONTEXTS, longest), chunked(model.tokenizer, held_out, HELD_OUT_CONTEXTS, longest)
    )


def save(path: Path, versions: Versions, outcome: Outcome, settings: Settings, command: str) -> Path:
    """Write the file and, beside it, its report; the report's path. Raises InvalidRequest for a place that cannot be written."""
    report = path.with_suffix(".report.json")
    try:
        versions.write(path, outcome.best.mix)
        report.write_text(json.dumps(as_json(versions, outcome, settings, command), indent=1) + "\n")
    except OSError as error:
        raise InvalidRequest(f"cannot write {error.filename or path}: {error.strerror or error}") from None
    return report


def as_json(versions: Versions, outcome: Outcome, settings: Settings, command: str) -> dict[str, Any]:
    """The report."""
    return {
        "command": command,
        "source": str(versions.file.path),
        "source_quantised": is_quantised(versions),
        "limit": settings.limit,
        "size": outcome.best.size or versions.file_size(outcome.best.mix),
        "strategy": settings.strategy,
        "seed": settings.seed,
        "chosen": outcome.best.name,
        "interrupted": outcome.interrupted,
        "search_seconds": round(outcome.seconds, 1),
        "mixes_tried": outcome.evaluations,
        "improvements": [{"seconds": round(at, 1), "divergence": value} for at, value in outcome.history],
        "candidates": [_candidate(versions, candidate, outcome.source) for candidate in (*outcome.candidates, outcome.source)],
        "slopes": outcome.slopes,
        "types": dict(named(versions, outcome.best.mix)),
    }


def _candidate(versions: Versions, candidate: Candidate, source: Candidate) -> dict[str, Any]:
    known = candidate.losses is not None
    return {
        "name": candidate.name,
        "size": candidate.size,
        "types": versions.counts(candidate.mix),
        "divergence": _number(candidate.divergence),
        "perplexity": _number(candidate.perplexity),
        "interval": [_number(bound) for bound in candidate.interval],
        "over_source": [_number(x) for x in candidate.change(source)] if known and source.losses is not None else None,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows(versions: Versions, outcome: Outcome) -> Iterable[tuple[str, ...]]:
    """The candidates for a table, best first, then the source."""
    for candidate in (*outcome.candidates, outcome.source):
        types = ", ".join(f"{count} {name}" for name, count in versions.counts(candidate.mix).items())
        known, compared = candidate.losses is not None, outcome.source.losses is not None
        low, high = candidate.interval
        change = ""
        if known and compared and candidate is not outcome.source:
            mean, least, most = candidate.change(outcome.source)
            change = f"{mean:+.2%} ({least:+.2%} to {most:+.2%})"
        divergence = "" if math.isnan(candidate.divergence) else f"{candidate.divergence:.4f}"
        perplexity = f"{candidate.perplexity:.3f} ({low:.2f}-{high:.2f})" if known else ""
        yield candidate.name, f"{candidate.size / 1e6:.2f}", divergence, perplexity, change, types


HEADER = ("MIX", "MB", "DIVERGENCE", "PERPLEXITY (95 %)", "OVER SOURCE (95 %, PAIRED)", "TYPES")
