"""Modelfiles: what their instructions mean, and the models made from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from api import catalog
from api.options import read_parameters
from tars_jax.adapters import Adapter
from tars_jax.cli import make_app
from tars_jax.errors import InvalidRequest, TarsError
from tars_jax.evolve.sampler_search import RANGES, defaults, modelfile
from tars_jax.loaders.gguf_adapter import write_gguf_adapter
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.opening import read_adapter
from tars_jax.store import Store
from tars_jax.store.modelfile import Modelfile
from tests.test_adapted import CONFIG, METADATA

TEXT = '''
# A comment, and an empty line.

from base
Parameter temperature 0.25
PARAMETER stop "# no comment "
PARAMETER stop <end>
SYSTEM """You are brief.
# You are kind."""
MESSAGE user What is "it"?
MESSAGE assistant """It is
it."""
LICENSE MIT
ADAPTER ./tuned.gguf'''


def test_instructions_and_quoted_arguments_are_read() -> None:
    assert Modelfile.parse(TEXT) == Modelfile.parse(TEXT.replace("\n", "\r\n"))
    assert Modelfile.parse(TEXT) == Modelfile(
        base="base",
        adapters=("./tuned.gguf",),
        parameters=(("temperature", "0.25"), ("stop", "# no comment "), ("stop", "<end>")),
        system="You are brief.\n# You are kind.",
        messages=(("user", 'What is "it"?'), ("assistant", "It is\nit.")),
        licenses=("MIT",),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM x", "no FROM line"),
        ("FROM a\nFROM b", "more than one FROM line"),
        ("FROM a\n\nFRUM b", "line 3: 'frum' is no instruction"),
        ("FROM a\nSYSTEM", "line 2: SYSTEM has no argument"),
        ("FROM a\nPARAMETER temperature\nSYSTEM x", "line 2: PARAMETER has no argument"),
        ('FROM a\nSYSTEM """never\nclosed', 'line 2: """ is not closed'),
        ("FROM a\nMESSAGE tool x", "line 2: the role of a message is one of system, user, assistant, not 'tool'"),
    ],
)
def test_a_faulty_line_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Modelfile.parse(text)


def test_parameters_have_the_types_of_options() -> None:
    numbers = [("temperature", "1"), ("top_k", "12"), ("num_ctx", "4096"), ("num_gpu", "3")]
    found = read_parameters([*numbers, ("ignore_eos", "True"), ("stop", "1"), ("stop", "b")])
    expected = {"temperature": 1.0, "top_k": 12, "num_ctx": 4096, "num_gpu": 3, "ignore_eos": True, "stop": ["1", "b"]}
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("warmth", "1"), "unknown parameter 'warmth'"),
        (("temperature", "hot"), "parameter 'temperature' must be of type float32, got 'hot'"),
        (("top_k", "1.5"), "parameter 'top_k' must be of type integer"),
        (("temperature", "NaN"), "parameter 'temperature' must be of type float32"),
        (("ignore_eos", "1"), "parameter 'ignore_eos' must be of type bool"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(line: tuple[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_parameters([line])


# The command.


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With a model "base" whose file, beside the store, has only a header that counts; and an adapter for it."""
    store = Store(tmp_path / "models")
    tensors = {"token_embd.weight": np.zeros((64, 32), np.float32), "blk.0.ffn_gate.weight": np.zeros((64, 32), np.float32)}
    write_gguf(tmp_path / "base.gguf", METADATA, tensors)
    write_gguf_adapter(tmp_path / "tuned.gguf", Adapter({}, norms={"norm": np.ones(32, np.float32)}), CONFIG)
    with (tmp_path / "base.gguf").open("rb") as file:
        layer = store.add_layer("model", file)
    layers = [layer, store.add_layer("system", "Old."), store.add_layer("params", json.dumps({"temperature": 1.0, "top_k": 3}))]
    store.write_manifest("base", {"model_format": "gguf", "model_family": "llama"}, layers)
    return store


@pytest.fixture
def create(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``tars create new`` with a Modelfile; gives the result."""
    monkeypatch.setenv("OLLAMA_MODELS", str(store.root))

    def call(text: str, name: str = "new") -> Any:
        (tmp_path / "Modelfile").write_text(text)
        return CliRunner().invoke(make_app(), ["create", name, "-f", str(tmp_path / "Modelfile")])

    return call


def test_a_model_is_made_of_another_and_what_the_modelfile_adds(create: Any, store: Store) -> None:
    done = create(TEXT)
    assert (done.exit_code, done.stderr) == (0, "created 'new:latest'\n")
    made, base = store.find("new"), store.find("base")
    assert (made.model_path, made.layers[0].source, made.config) == (base.model_path, "base:latest", base.config)
    assert made.params == {"temperature": 0.25, "top_k": 3, "stop": ["# no comment ", "<end>"]}
    assert (made.system, made.license) == ("You are brief.\n# You are kind.", "MIT")
    assert made.messages == [{"role": "user", "content": 'What is "it"?'}, {"role": "assistant", "content": "It is\nit."}]
    assert [list(read_adapter(path, CONFIG).norms) for path in made.adapter_paths] == [["norm"]]
    assert (base.system, base.params) == ("Old.", {"temperature": 1.0, "top_k": 3})


def test_a_model_is_made_of_a_file(create: Any, store: Store) -> None:
    assert create("FROM ./base.gguf\nTEMPLATE {{ messages[0].content }}").exit_code == 0
    made = store.find("new")
    assert (made.model_path, made.layers[0].source) == (store.find("base").model_path, "")
    assert (made.template, made.system, made.config["model_family"]) == ("{{ messages[0].content }}", "", "llama")


def test_a_shown_modelfile_makes_the_model_again(create: Any, store: Store) -> None:
    create("FROM base\nSYSTEM New.\nPARAMETER stop <end>\nLICENSE MIT")
    first = store.find("new")
    assert create(catalog.show(store, "new")["modelfile"], "again").exit_code == 0
    again = store.find("again")
    assert (again.model_path, again.system, again.params, again.license) == (first.model_path, first.system, first.params, first.license)


def test_a_modelfile_of_sampler_settings_makes_a_model(create: Any, store: Store) -> None:
    settings = {**defaults(), "temperature": 0.4, "top_k": 7.0}
    assert create(modelfile("base", settings)).exit_code == 0
    params = store.find("new").params
    assert params == settings
    assert set(params) == set(RANGES)
    assert isinstance(params["top_k"], int)


def test_a_template_in_gos_language_is_kept_and_said_to_be_passed_over(create: Any, store: Store) -> None:
    assert "Go's language" in create("FROM base\nTEMPLATE {{ .Prompt }}").stderr
    assert store.find("new").template == "{{ .Prompt }}"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("FROM nobody", "new", "model 'nobody' not found"),
        ("FROM base\nADAPTER nowhere", "new", "nowhere: no such adapter"),
        ("FROM other.gguf\nADAPTER nowhere", "new", "nowhere: no such adapter"),
        ("FROM base\nPARAMETER warmth 1", "new", "unknown parameter 'warmth'"),
        ("FROM base", "not a name", "invalid model name"),
        ("FROM tuned.txt", "new", "GGUF"),
    ],
)
def test_what_cannot_be_made_leaves_the_store_as_it_was(
    create: Any, store: Store, tmp_path: Path, text: str, name: str, message: str
) -> None:
    write_gguf(tmp_path / "other.gguf", METADATA, {"token_embd.weight": np.ones((64, 32), np.float32)})
    (tmp_path / "tuned.txt").write_text("no model")
    before = set(store.root.rglob("*"))
    error = create(text, name).exception
    assert isinstance(error, TarsError)
    assert message in str(error)
    assert {path for path in store.root.rglob("*") if path.name != ".tars-lock"} == before - {store.root / ".tars-lock"}


def test_without_a_modelfile_there_is_an_error(store: Store, tmp_path: Path) -> None:
    result = CliRunner().invoke(make_app(), ["create", "new", "-f", str(tmp_path / "nowhere")])
    assert "cannot read" in str(result.exception)
