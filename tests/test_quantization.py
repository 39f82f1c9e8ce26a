"""The search for a mix of tensor types: the limit is kept to the byte, sensitive matrices are spared, the file is what was judged."""

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize

from tars_jax import cli, quant
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.batches import layout
from tars_jax.loaders.blocks import TYPES, Blocks, decode
from tars_jax.loaders.gguf import open_gguf
from tars_jax.loaders.gguf_model import rotary_order
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.names import GGUF, name_in_file
from tars_jax.loaders.quantizers import encode
from tars_jax.model import leaf_name
from tars_jax.perplexity import perplexity
from tars_jax.quantization import job
from tars_jax.quantization import search as searching
from tars_jax.quantization.knapsack import choose
from tars_jax.quantization.loss import Divergence, chunk_losses, mean_squares
from tars_jax.quantization.search import Candidate, Search, Settings, spread
from tars_jax.quantization.versions import Versions
from tests.tiny import tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3}


def write_model(path: Path, change: Callable[[str, np.ndarray], np.ndarray] = lambda leaf, value: value, **more: int) -> Any:
    """A tiny model, and its file as llama.cpp's converter would write it."""
    model = tiny_model(scale=2.0, **SHAPE)
    config, tensors, leaves = model.config, {}, {}
    for at, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]:
        name, value = leaf_name(at), np.asarray(leaf)
        value = change(name, value)
        leaves[name] = value
        order = rotary_order(config, name, len(value))
        tensors[name_in_file(name, GGUF)] = value if order is None else value[np.argsort(order)]
    keys = {"context_length": 256, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96, "attention.head_count": 4}
    keys |= {"attention.head_count_kv": 2, "attention.key_length": 16}
    metadata: dict[str, Any] = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}}
    metadata["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    metadata |= {"general.name": "naïve", **{f"general.{key}": value for key, value in more.items()}}
    write_gguf(path, metadata, tensors, more.get("alignment", 32))
    params = jax.tree_util.tree_map_with_path(lambda at, _: jax.numpy.asarray(leaves[leaf_name(at)]), model.params)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("quantization") / "tiny.gguf"
    return path, write_model(path)


def versions_of(path: Path, *types: str) -> Versions:
    return Versions(open_gguf(path), types or ("Q4_0", "Q4_1", "Q5_0", "Q8_0"), memory=1 << 30)


def chunks(count: int = 8, size: int = 32, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 95, (count, size)).tolist()


def test_the_knapsack_finds_the_best_mix() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.sort(rng.integers(10, 60, (6, 3)), axis=1)
        costs = -np.sort(-rng.exponential(1, (6, 3)), axis=1)
        room = int(sizes[:, 0].sum() + rng.integers(0, 120))
        mix = choose(costs, sizes, room)
        items = np.arange(6)
        assert sizes[items, mix].sum() <= room
        every = [np.array(m) for m in itertools.product(range(3), repeat=6)]
        best = min(costs[items, m].sum() for m in every if sizes[items, m].sum() <= room)
        assert costs[items, mix].sum() <= 1.35 * best + 1e-12  # a relaxation: near the best, not always it


def test_inputs_are_measured_where_matrices_multiply_them(written: tuple[Path, Any]) -> None:
    _, model = written
    found = mean_squares(model.params, model.config, chunks(4, 16))
    names = {leaf_name(path) for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0] if leaf.ndim == 2}
    assert set(found) == names
    embedded = np.asarray(model.params.embed)[np.array(chunks(4, 16)).reshape(-1)]
    norm = np.asarray(model.params.layers[0].attention_norm)
    normed = embedded / np.sqrt((embedded**2).mean(1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(found["layers.0.q"], (normed**2).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found["layers.0.q"], found["layers.0.v"])
    assert found["layers.1.down"].shape == (96,)


def test_an_observed_weight_multiplies_as_its_base(written: tuple[Path, Any]) -> None:
    from tars_jax import ops

    heard: list[np.ndarray] = []
    base, x = written[1].params.layers[0].down, jax.numpy.ones((3, 96), jax.numpy.float32)
    observed = quant.Observed(base, jax.numpy.int32(0), lambda index, squares: heard.append(np.asarray(squares)))
    np.testing.assert_array_equal(ops.matmul(x, observed), ops.matmul(x, base))
    jax.effects_barrier()
    np.testing.assert_allclose(heard, [np.full(96, 3.0)])


def test_the_divergence_is_that_of_the_predictions(written: tuple[Path, Any]) -> None:
    _, model = written
    other = jax.tree.map(lambda leaf: leaf * 1.02 if leaf.ndim == 2 else leaf, model.params)
    divergence = Divergence.of(model.params, model.config, chunks(2, 32))
    assert divergence(model.params) == pytest.approx(0, abs=1e-5)
    total = 0.0
    for chunk in chunks(2, 32):
        p, q = (np.asarray(jax.nn.log_softmax(dataclasses.replace(model, params=m).logits(chunk))) for m in (model.params, other))
        total += float((np.exp(p) * (p - q)).sum(1).mean()) / 2
    assert divergence(other) == pytest.approx(total, rel=2e-2)


def test_losses_are_those_of_perplexity(written: tuple[Path, Any]) -> None:
    _, model = written
    text = "".join(chr(32 + token) for chunk in chunks(3, 64) for token in chunk)
    expected = perplexity(model, text, context=64)
    assert np.exp(chunk_losses(model.params, model.config, chunks(3, 64)).mean()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("strategy", ["genetic", "annealing", "montecarlo", "hybrid"])
def test_the_limit_is_kept_to_the_byte(written: tuple[Path, Any], tmp_path: Path, strategy: str) -> None:
    path, model = written
    versions = versions_of(path)
    limit = versions.file_size([1] * len(versions.matrices)) + 77
    search = Search(versions, model.params, Settings(limit, strategy, seconds=1.0))
    outcome = search.run(chunks(), chunks(4, seed=2))
    assert all(versions.file_size(mix) <= limit for mix in search.known)
    assert all(candidate.size <= limit for candidate in outcome.candidates)
    out = tmp_path / "out.gguf"
    job.save(out, versions, outcome, search.settings, "tars")
    assert out.stat().st_size == outcome.best.size <= limit
    assert not list(tmp_path.glob("*.partial"))


def test_a_limit_with_room_for_one_exchange_is_used(written: tuple[Path, Any]) -> None:
    versions = versions_of(written[0])
    least = versions.file_size(versions.sizes.argmin(axis=1))
    search = Search(versions, written[1].params, Settings(least, seconds=0))
    outcome = search.run(chunks(), chunks(4, seed=2))
    assert outcome.best.size == least


def test_an_impossible_limit_is_refused_with_the_smallest_size(written: tuple[Path, Any]) -> None:
    versions = versions_of(written[0])
    least = versions.file_size(versions.sizes.argmin(axis=1))
    with pytest.raises(InvalidRequest, match=f"the smallest file is {least} bytes"):
        Search(versions, written[1].params, Settings(least - 1))


def test_a_sensitive_matrix_is_spared_and_beats_the_uniform_type(tmp_path: Path) -> None:
    def plant(leaf: str, value: np.ndarray) -> np.ndarray:
        """Four bits are enough for every matrix but one."""
        if leaf == "layers.2.v" or value.ndim == 1:
            return value
        decoded = decode(2, encode("Q4_0", value), value.shape)
        assert isinstance(decoded, Blocks)
        return decoded.dequantize()

    path = tmp_path / "planted.gguf"
    model = write_model(path, plant)
    versions = versions_of(path)
    limit = versions.file_size([2] * len(versions.matrices))  # that of Q5_0
    search = Search(versions, model.params, Settings(limit, seconds=1.0))
    outcome = search.run(chunks(), chunks(4, seed=2))
    best = min(search.known, key=lambda mix: search.known[mix])
    sensitive = next(i for i, matrix in enumerate(versions.matrices) if matrix.leaf == "layers.2.v")
    assert versions.type_of(sensitive, best[sensitive]) in ("Q8_0", "F32")
    uniform = search.divergence(versions.params(model.params, [2] * len(versions.matrices)))
    assert search.known[best] < 0.5 * uniform
    assert outcome.best.name in {candidate.name for candidate in outcome.candidates}
    assert outcome.best.perplexity == min(candidate.perplexity for candidate in outcome.candidates)


def test_the_file_reads_the_same_with_gguf_and_with_us(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = written
    versions = versions_of(path, "Q4_0", "Q5_1", "Q8_0", "F16", "BF16", "IQ4_NL")
    mix = [i % 7 for i in range(len(versions.matrices))]
    versions.write(tmp_path / "out.gguf", mix)
    reader, ours, source = GGUFReader(tmp_path / "out.gguf"), open_gguf(tmp_path / "out.gguf"), open_gguf(path)
    assert {tensor.name for tensor in reader.tensors} == set(source.tensors)
    for tensor in reader.tensors:
        value = ours.read(tensor.name)
        value = value.dequantize() if isinstance(value, Blocks) else value.astype(np.float32)
        theirs = gguf_dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
        np.testing.assert_allclose(value, theirs, rtol=1e-6, atol=1e-9)
    for i, matrix in enumerate(versions.matrices):
        value = versions._in_model_order(i, versions._values(i, versions.type_of(i, mix[i])))
        np.testing.assert_array_equal(versions.dense(i, mix[i]), value)
        assert TYPES[ours.tensors[matrix.info.name].type].name == versions.type_of(i, mix[i])
    for key in source.metadata:
        assert ours.raw_value(key) == source.raw_value(key)
    assert ours.metadata["general.quantization_version"] == 2


def test_a_source_in_the_chosen_type_is_copied(written: tuple[Path, Any], tmp_path: Path) -> None:
    first = versions_of(written[0], "Q4_1")
    first.write(tmp_path / "q4_1.gguf", [0] * len(first.matrices))
    again = versions_of(tmp_path / "q4_1.gguf", "Q4_1", "Q8_0")
    assert again.costs(0).tolist() == [0.0, np.inf, 0.0]  # an 8-bit copy of 4 bits would only be larger
    again.write(tmp_path / "again.gguf", [0] * len(again.matrices))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q4_1.gguf").read_bytes()
    assert searching.is_quantised(again) == ["Q4_1"]
    assert searching.is_quantised(first) == []


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "in.gguf", alignment=256, file_type=0)
    versions = versions_of(tmp_path / "in.gguf")
    mix = [i % 5 for i in range(len(versions.matrices))]
    versions.write(tmp_path / "out.gguf", mix)
    assert (tmp_path / "out.gguf").stat().st_size == versions.file_size(mix)
    written = open_gguf(tmp_path / "out.gguf")
    assert all(info.offset % 256 == 0 for info in written.tensors.values())
    assert written.metadata["general.alignment"] == 256


def test_unknown_types_are_refused(written: tuple[Path, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"Q9_9: no types that can be written; choose among Q4_0"):
        versions_of(written[0], "Q4_0", "Q9_9")


def test_an_interrupt_keeps_the_best_so_far(written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = written
    versions = versions_of(path)
    search = Search(versions, model.params, Settings(versions.file_size([1] * len(versions.matrices)), seconds=60.0))

    def interrupt(what: str, done: float, total: float) -> None:
        if what.startswith("searching") and len(search.known) > 3:
            raise KeyboardInterrupt

    search._show = interrupt
    outcome = search.run(chunks(), chunks(4, seed=2))
    assert outcome.interrupted
    assert outcome.seconds < 50
    assert {"search", "knapsack"} & {candidate.name for candidate in outcome.candidates}


def test_the_report_holds_every_candidate_and_type(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = written
    versions = versions_of(path)
    settings = Settings(versions.file_size([3] * len(versions.matrices)), seconds=0)
    outcome = Search(versions, model.params, settings).run(chunks(), chunks(4, seed=2))
    report = json.loads(job.save(tmp_path / "out.gguf", versions, outcome, settings, "tars quantize").read_text())
    assert report["size"] == (tmp_path / "out.gguf").stat().st_size
    assert len(report["types"]) == len(versions.matrices)
    names = [candidate["name"] for candidate in report["candidates"]]
    assert {"Q4_0", "Q4_1", "Q5_0", "Q8_0", "source"} <= set(names)
    assert len(list(job.rows(versions, outcome))) == len(names)


def test_a_change_is_judged_chunk_by_chunk() -> None:
    rng = np.random.default_rng(0)
    texts = rng.normal(3, 1, 12)  # chunks differ far more than models do
    a, b = (Candidate("", (), 0, losses=texts + rng.normal(shift, 0.01, 12)) for shift in (0.1, 0.0))
    mean, low, high = a.change(b)
    assert 0.08 < low < mean < high < 0.13
    assert a.interval[0] < b.perplexity < a.interval[1]


def test_chunks_come_from_all_over_a_text() -> None:
    parts = [[i] * 4 for i in range(100)]
    assert [chunk[0] for chunk in spread(parts, 16)] == [0, 25, 50, 75]
    assert len(spread(parts[:7], 64)) == 4
    assert layout(spread(parts, 16)).tokens.size == 16


def test_without_a_held_out_text_the_end_of_the_other_is_kept_back() -> None:
    text = "One two. " * 100
    searched, judged = job.texts(text, None)
    assert searched + judged == text
    assert 0.15 < len(judged) / len(text) < 0.3
    assert job.texts("a", "b") == ("a", "b")


def run_tars(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """``tars quantize`` in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["tars", "quantize", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command_writes_the_file_and_its_report(
    written: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = written
    monkeypatch.setattr(job, "open_source", lambda name, types: (model, versions_of(path, *types)))
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(32 + token) for chunk in chunks(40, 32) for token in chunk))
    out = tmp_path / "small.gguf"
    words = [str(path), "--limit", "70KB", "--text", str(text), "--out", str(out), "--seconds", "0", "--types", "q4_0,q8_0"]
    assert run_tars(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    assert out.stat().st_size <= 70_000
    assert json.loads((tmp_path / "small.report.json").read_text())["limit"] == 70_000
    assert "knapsack" in printed.out
    assert "Q4_0" in printed.out
    assert "of 70 KB allowed" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "much", "--out", "x.gguf"], "--limit: 'much' is not a size such as 100MB"),
        (["--limit", "1MB", "--out", "no/folder/x.gguf"], "give --out the name of a file in a folder that exists"),
        (["--limit", "1MB", "--out", "x.gguf", "--strategy", "luck"], "strategy 'luck' is none of genetic"),
        (["--limit", "1MB", "--out", "x.gguf", "--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
    ],
)
def test_bad_options_are_one_clear_error(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tars(monkeypatch, "model.gguf", *words) == 1
    assert message in capsys.readouterr().err
