"""The model store: names, Ollama's layout, atomic writes, hostile manifests."""

import hashlib
import io
import json
import os
import signal
import string
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_jax.errors import InvalidRequest, ModelFileError, ModelNotFound
from tars_jax.store import Layer, ModelName, Store, StoredModel
from tars_jax.store.blobs import BlobBusyError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def add_model(store: Store, name: str, weights: bytes = b"weights", **texts: str) -> StoredModel:
    layers = [store.add_layer("model", io.BytesIO(weights)), *(store.add_layer(kind, text) for kind, text in texts.items())]
    return store.write_manifest(name, {"model_format": "gguf", "model_family": "llama"}, layers)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest_path(store: Store, name: str) -> Path:
    return store.root / "manifests" / ModelName.parse(name).path


# names


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("llama3.2", "registry.ollama.ai/library/llama3.2:latest", "llama3.2:latest"),
        ("smollm2:135m", "registry.ollama.ai/library/smollm2:135m", "smollm2:135m"),
        ("me/Model_1:Q4.0-x", "registry.ollama.ai/me/Model_1:Q4.0-x", "me/Model_1:Q4.0-x"),
        ("hf.co/owner/repo:Q8_0", "hf.co/owner/repo:Q8_0", "hf.co/owner/repo:Q8_0"),
        ("http://localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b:latest"),
        ("REGISTRY.ollama.ai/Library/m:t", "REGISTRY.ollama.ai/Library/m:t", "m:t"),
        ("m" * 80, f"registry.ollama.ai/library/{'m' * 80}:latest", f"{'m' * 80}:latest"),
    ],
)
def test_name_gets_defaults_and_a_display_form(text: str, full: str, short: str) -> None:
    name = ModelName.parse(text)
    assert (str(name), name.short()) == (full, short)


_EMPTY_PART = ["m:", ":t", "/m", "n/", "n//m", "/n/m", "h//m", "https://m"]
_FORBIDDEN = ["-m", ".m", "..", "../m", "a/../m", "m:..", "m:a/b", "a/b/c/d", "n.s/m", "mé", "a\\b", "m:t:u", "m m", "m\n", "m\0"]
_TOO_LONG = ["m" * 81, "m:" + "t" * 81, "n" * 81 + "/m", "h" * 351 + "/n/m"]


@pytest.mark.parametrize("text", ["", *_EMPTY_PART, *_FORBIDDEN, *_TOO_LONG])
def test_ill_formed_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^invalid model name$"):
        ModelName.parse(text)


_WORD = string.ascii_letters + string.digits + "_"


def _part(more: str) -> st.SearchStrategy[str]:
    return st.builds(str.__add__, st.sampled_from(_WORD), st.text(_WORD + more, max_size=12))


@given(_part("-.:"), _part("-"), _part("-."), _part("-."))
def test_name_survives_a_round_trip(host: str, namespace: str, model: str, tag: str) -> None:
    name = ModelName(host=host, namespace=namespace, model=model, tag=tag)
    assert ModelName.parse(str(name)) == name


@given(st.text("./\\:ab\0-_", max_size=20))
def test_no_name_escapes_its_folder(text: str) -> None:
    try:
        parts = ModelName.parse(text).path.parts
    except InvalidRequest:
        return
    assert len(parts) == 4
    assert not {"..", ".", "", "/"} & set(parts)


# layout


def test_new_store_creates_nothing_before_a_write(store: Store) -> None:
    assert store.models() == []
    with pytest.raises(ModelNotFound, match=r"^model 'x' not found$"):
        store.delete("x")
    assert not store.root.exists()


def test_layout_is_ollamas(store: Store) -> None:
    add_model(store, "me/tiny:q4", b"weights", system="Be brief.")
    path = store.root / "manifests/registry.ollama.ai/me/tiny/q4"
    manifest = json.loads(path.read_bytes())
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    assert manifest["layers"] == [
        {"mediaType": "application/vnd.ollama.image.model", "digest": sha256(b"weights"), "size": 7},
        {"mediaType": "application/vnd.ollama.image.system", "digest": sha256(b"Be brief."), "size": 9},
    ]
    digests = {layer["digest"].replace(":", "-") for layer in [manifest["config"], *manifest["layers"]]}
    assert {blob.name for blob in (store.root / "blobs").iterdir()} == digests
    assert (store.root / "blobs" / sha256(b"weights").replace(":", "-")).read_bytes() == b"weights"


def test_digest_and_size_are_those_of_the_manifest(store: Store) -> None:
    model = add_model(store, "tiny", b"weights")
    data = manifest_path(store, "tiny").read_bytes()
    assert model.digest == hashlib.sha256(data).hexdigest()
    assert model.size == 7 + json.loads(data)["config"]["size"]


def test_stored_texts_are_read_back(store: Store) -> None:
    add_model(store, "tiny", template="{{ .Prompt }}", system="S", license="L", params='{"stop":["a"]}', messages='[{"role":"user"}]')
    model = store.find("tiny")
    assert (model.template, model.system, model.license) == ("{{ .Prompt }}", "S", "L")
    assert (model.params, model.messages, model.adapter_paths) == ({"stop": ["a"]}, [{"role": "user"}], [])
    assert model.model_path.read_bytes() == b"weights"
    assert model.config["model_family"] == "llama"


def test_models_are_listed_newest_first(store: Store) -> None:
    for age, name in enumerate(["new", "old"]):
        add_model(store, name)
        os.utime(manifest_path(store, name), (1_000_000 - age, 1_000_000 - age))
    assert [model.name.model for model in store.models()] == ["new", "old"]


def test_lookup_ignores_case(store: Store) -> None:
    add_model(store, "Foo:Q4")
    assert store.find("foo:q4").name == ModelName(model="Foo", tag="Q4")


def test_writing_another_case_overwrites(store: Store) -> None:
    add_model(store, "foo", b"one")
    add_model(store, "Foo", b"two")
    assert [(model.name.model, model.model_path.read_bytes()) for model in store.models()] == [("foo", b"two")]


def test_parts_of_a_new_name_take_the_existing_spelling(store: Store) -> None:
    add_model(store, "Foo:a")
    assert str(add_model(store, "foo:B").name) == "registry.ollama.ai/library/Foo:B"


# copy and delete


def test_copy_shares_blobs_and_delete_keeps_shared_ones(store: Store) -> None:
    add_model(store, "one")
    store.copy("one", "two")
    store.delete("one")
    assert store.find("two").model_path.read_bytes() == b"weights"
    store.delete("TWO:latest")
    assert list((store.root / "blobs").iterdir()) == []
    assert list((store.root / "manifests").iterdir()) == []


def test_copy_of_an_unknown_model_is_refused(store: Store) -> None:
    with pytest.raises(ModelNotFound):
        store.copy("none", "two")


def test_replacing_a_model_removes_its_unused_blobs(store: Store) -> None:
    add_model(store, "tiny", b"old")
    add_model(store, "tiny", b"new")
    assert not store.has_blob(sha256(b"old"))
    assert store.has_blob(sha256(b"new"))


# blobs


def test_blob_with_other_bytes_is_not_stored(store: Store) -> None:
    with pytest.raises(InvalidRequest, match=r'^digest mismatch, expected "sha256:.*", got "sha256:.*"$'):
        store.add_blob(io.BytesIO(b"evil"), sha256(b"good"))
    assert list((store.root / "blobs").iterdir()) == []


@pytest.mark.parametrize("digest", ["../../etc/passwd", "sha256:../x", "sha256:" + "a" * 63, "md5:" + "a" * 64, "sha256:" + "g" * 64, ""])
def test_ill_formed_digest_is_refused(store: Store, digest: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^invalid digest format$"):
        store.blob_path(digest)


def test_adding_a_file_reports_progress(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    seen: list[int] = []
    assert store.add_blob(tmp_path / "f", on_progress=seen.append) == sha256(b"x" * 3_000_000)
    assert seen == sorted(seen)
    assert seen[-1] == 3_000_000


def test_failing_stream_leaves_nothing(store: Store) -> None:
    def stream() -> object:
        yield b"some"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        store.add_blob(stream())  # type: ignore[arg-type]
    assert list((store.root / "blobs").iterdir()) == []


def test_killed_writer_leaves_no_blob_and_is_cleaned_up_later(store: Store) -> None:
    code = (
        "import sys, time, pathlib; from tars_jax.store import Store\n"
        "def slow():\n    yield b'x' * 100_000\n    print('half', flush=True)\n    time.sleep(60)\n"
        "Store(pathlib.Path(sys.argv[1])).add_blob(slow())"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    (left,) = (store.root / "blobs").iterdir()
    assert left.name.startswith("incoming-")
    os.utime(left, (0, 0))
    add_model(store, "tiny")
    assert not left.exists()
    assert [model.name.model for model in store.models()] == ["tiny"]


def test_partial_is_continued(store: Store) -> None:
    digest = sha256(b"first second")
    with store.blobs.resume(digest) as writer:
        writer.write(b"first ")
    assert not store.has_blob(digest)
    with store.blobs.resume(digest) as writer:
        assert writer.size == 6
        writer.write(b"second")
        writer.commit()
    assert store.blob_path(digest).read_bytes() == b"first second"


def test_second_writer_of_a_partial_is_refused(store: Store) -> None:
    with store.blobs.resume(sha256(b"x")), pytest.raises(BlobBusyError):
        store.blobs.resume(sha256(b"x"))


def test_concurrent_writers_of_a_blob_do_not_disturb_each_other(store: Store) -> None:
    data = os.urandom(500_000)
    threads = [threading.Thread(target=store.add_blob, args=(io.BytesIO(data),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [blob.read_bytes() for blob in (store.root / "blobs").iterdir()] == [data]


# broken and hostile manifests

_GOOD_LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": sha256(b"weights"), "size": 7}


@pytest.mark.parametrize(
    "manifest",
    [
        b"{not json",
        b"[" * 100_000,
        b"[]",
        b'{"schemaVersion":2}',
        json.dumps({"layers": [_GOOD_LAYER | {"digest": "../../etc"}]}).encode(),
        json.dumps({"layers": [_GOOD_LAYER | {"digest": "sha256:../../../../etc/passwd"}]}).encode(),
        json.dumps({"layers": [_GOOD_LAYER | {"size": -1}]}).encode(),
        json.dumps({"layers": ["x"]}).encode(),
        json.dumps({"layers": [], "config": _GOOD_LAYER | {"digest": sha256(b"absent")}}).encode(),
    ],
)
def test_broken_manifest_is_skipped_named_and_deletable(store: Store, manifest: bytes) -> None:
    add_model(store, "good")
    path = manifest_path(store, "bad")
    path.parent.mkdir(parents=True)
    path.write_bytes(manifest)
    assert [model.name.model for model in store.models()] == ["good"]
    with pytest.raises(ModelFileError):
        store.find("bad")
    store.delete("bad")
    assert store.find("good").model_path.is_file()


def test_manifest_with_a_missing_blob_is_not_written(store: Store) -> None:
    with pytest.raises(ModelFileError, match="is missing"):
        store.write_manifest("tiny", {}, [Layer("application/vnd.ollama.image.model", sha256(b"absent"), 6)])
    assert store.models() == []


def test_stray_files_are_no_models(store: Store) -> None:
    add_model(store, "tiny")
    manifest_path(store, "tiny").with_name(".DS_Store").write_bytes(b"x")
    (store.root / "manifests" / "README").write_text("x")
    assert len(store.models()) == 1
