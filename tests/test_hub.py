"""Pulling from Ollama's registry, and trying sources in order, against a server made here: nothing leaves the machine."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import CONFIG, GGUF, Web, environ, replace_gguf_reader, run, sha256, statuses

from tars_jax.errors import InvalidRequest, PullError
from tars_jax.hub import import_file, pull
from tars_jax.hub.catalog import Catalog
from tars_jax.store import Store

DEAD = "http://127.0.0.1:9"  # the discard port: refused at once


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


# the Ollama registry


def test_pull_yields_ollamas_events(store: Store, web: Web) -> None:
    web.add_model()
    events = run("tiny", store, web)
    weights, config = f"pulling {sha256(GGUF)[:12]}", f"pulling {sha256(CONFIG)[:12]}"
    assert statuses(events) == ["pulling manifest", weights, config, "verifying sha256 digest", "writing manifest", "success"]
    last = [event for event in events if event["status"] == weights][-1]
    assert last == {"status": weights, "digest": f"sha256:{sha256(GGUF)}", "total": len(GGUF), "completed": len(GGUF)}


def test_pulled_manifest_is_the_registrys_own(store: Store, web: Web) -> None:
    web.add_model(tag="q4")
    run("Tiny:Q4".lower(), store, web)
    sent = web.files["/v2/library/tiny/manifests/q4"]
    assert (store.root / "manifests/registry.ollama.ai/library/tiny/q4").read_bytes() == sent
    model = store.find("tiny:q4")
    assert model.digest == sha256(sent)
    assert model.model_path.read_bytes() == GGUF
    assert model.config["model_family"] == "llama"


def test_second_pull_downloads_no_blob(store: Store, web: Web) -> None:
    web.add_model()
    run("tiny", store, web)
    web.log.clear()
    run("tiny", store, web)
    assert [path for path, _ in web.log] == ["/v2/library/tiny/manifests/latest"]


def test_updated_model_replaces_the_old_one(store: Store, web: Web) -> None:
    web.add_model(b"old")
    run("tiny", store, web)
    web.add_model(b"new")
    assert "removing unused layers" in statuses(run("tiny", store, web))
    assert store.find("tiny").model_path.read_bytes() == b"new"
    assert not store.has_blob(f"sha256:{sha256(b'old')}")


def test_cut_connection_is_resumed_with_a_range(store: Store, web: Web) -> None:
    blob = web.add_model()
    web.cuts[blob] = [100_000, 150_000]
    run("tiny", store, web)
    assert [wanted for path, wanted in web.log if path == blob] == [None, "bytes=100000-", "bytes=250000-"]
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_server_without_ranges_is_read_from_the_start(store: Store, web: Web) -> None:
    blob = web.add_model()
    web.cuts[blob], web.ranges = [100_000], False
    run("tiny", store, web)
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_damaged_partial_is_fetched_again(store: Store, web: Web) -> None:
    web.add_model()
    with store.blobs.resume(f"sha256:{sha256(GGUF)}") as writer:
        writer.write(b"rubbish")
    run("tiny", store, web)
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_redirect_to_another_host_is_followed(store: Store, web: Web) -> None:
    blob = web.add_model()
    web.files["/cdn"] = web.files.pop(blob)
    web.redirects[blob] = f"{web.url.replace('127.0.0.1', 'localhost')}/cdn"
    run("tiny", store, web)
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_closed_pull_is_continued_by_the_next(store: Store, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tars_jax.hub.download._EVENT_SECONDS", 0.0)
    blob = web.add_model()
    events = pull("tiny", store, catalog=Catalog({}), environ=environ(web))
    received = next(event["completed"] for event in events if event.get("completed"))
    events.close()
    assert store.blobs.partial_size(f"sha256:{sha256(GGUF)}") == received < len(GGUF)
    run("tiny", store, web)
    assert (blob, f"bytes={received}-") in web.log
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_killed_pull_is_continued_by_the_next(store: Store, web: Web) -> None:
    blob = web.add_model()
    web.stalls[blob] = 200_000
    code = "import sys, pathlib, tars_jax.hub, tars_jax.store as s; list(tars_jax.hub.pull('tiny', s.Store(pathlib.Path(sys.argv[1]))))"
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)], env={**os.environ, **environ(web)}) as child:
        deadline = time.monotonic() + 20
        while store.blobs.partial_size(f"sha256:{sha256(GGUF)}") < 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert store.models() == []
    web.stalls.clear()
    run("tiny", store, web)
    first, second = (wanted for path, wanted in web.log if path == blob)
    assert first is None
    assert int(re.findall(r"\d+", second or "")[0]) >= 100_000
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_concurrent_pulls_share_one_download(store: Store, web: Web) -> None:
    blob = web.add_model()
    web.stalls[blob] = 100_000
    threads = [threading.Thread(target=run, args=("tiny", store, web)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    web.stalls.clear()
    web.released.set()
    for thread in threads:
        thread.join()
    assert [wanted for path, wanted in web.log if path == blob] == [None, "bytes=100000-"]
    assert store.find("tiny").model_path.read_bytes() == GGUF


@pytest.mark.parametrize("manifest", [b"<html>", b"{}", b'{"layers":[{"mediaType":"m","digest":"../../etc/passwd","size":1}]}'])
def test_hostile_manifest_is_refused(store: Store, web: Web, manifest: bytes) -> None:
    web.files["/v2/library/tiny/manifests/latest"] = manifest
    with pytest.raises(PullError, match="sent an unusable manifest"):
        run("tiny", store, web)
    assert not store.root.exists()


def test_broken_config_does_not_replace_a_model(store: Store, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.add_model(b"old")
    run("tiny", store, web)
    monkeypatch.setattr("hub_server.CONFIG", b"no JSON")
    web.add_model(b"new")
    with pytest.raises(PullError, match="sent an unusable config"):
        run("tiny", store, web)
    assert store.find("tiny").model_path.read_bytes() == b"old"


@pytest.mark.parametrize("sent", [GGUF[:-1] + b"!", GGUF[:-10]])
def test_damaged_blob_is_refused(store: Store, web: Web, sent: bytes) -> None:
    web.files[web.add_model()] = sent
    with pytest.raises(PullError, match=r"damaged|without sending"):
        run("tiny", store, web)
    assert store.models() == []
    assert not store.has_blob(f"sha256:{sha256(GGUF)}")


def test_endless_blob_is_cut_off(store: Store, web: Web) -> None:
    web.files[web.add_model()] = GGUF + b"more" * 1000
    with pytest.raises(PullError, match="sends more than"):
        run("tiny", store, web)


def test_name_with_a_host_goes_to_that_host(store: Store, web: Web) -> None:
    web.add_model(path="me/tiny")
    name = f"{web.url}/me/tiny"
    with pytest.raises(PullError, match="insecure protocol http"):
        pull(name, store)
    list(pull(name, store, catalog=Catalog({}), environ={}, insecure=True))
    assert store.find(f"{web.url.removeprefix('http://')}/me/tiny").model_path.read_bytes() == GGUF


def test_unknown_model_is_reported_as_ollama_does(store: Store, web: Web) -> None:
    with pytest.raises(PullError, match="pull model manifest: file does not exist"):
        run("nothing", store, web)


def test_ill_formed_name_is_refused_at_once(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="invalid model name"):
        pull("../x", store)


# sources in order

TWO_SOURCES = """
[models.tiny]
sources = [{ ollama = "tiny" }, { huggingface = "me/tiny-GGUF" }]
"""


def test_next_source_is_tried_when_one_fails(store: Store, web: Web) -> None:
    web.add_repository({"tiny-Q4_K_M.gguf": GGUF})
    run("tiny", store, web, TWO_SOURCES, TARS_REGISTRY=DEAD)
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_damaged_source_gives_way_to_the_next(store: Store, web: Web) -> None:
    web.files[web.add_model()] = b"X" * len(GGUF)
    web.add_repository({"tiny-Q4_K_M.gguf": GGUF})
    run("tiny", store, web, TWO_SOURCES)
    assert store.find("tiny").license == "mit"  # the hub's, not the registry's


def test_error_names_each_source_with_its_reason(store: Store, web: Web) -> None:
    begin = time.monotonic()
    with pytest.raises(PullError) as caught:
        run("tiny", store, web, TWO_SOURCES, TARS_REGISTRY=DEAD)
    text = str(caught.value)
    assert re.fullmatch(
        r"cannot pull tiny:latest: Ollama registry .*: cannot be reached: .*; Hugging Face \(me/tiny-GGUF\): no such .*", text
    )
    assert time.monotonic() - begin < 5


def test_source_with_other_than_the_pinned_bytes_is_passed_over(store: Store, web: Web) -> None:
    web.add_model(b"GGUF other")
    web.add_repository({"tiny.gguf": GGUF})
    pinned = f'[models.tiny]\nsources = [{{ ollama = "tiny", sha256 = "{sha256(GGUF)}" }}, {{ huggingface = "me/tiny-GGUF" }}]'
    run("tiny", store, web, pinned)
    assert store.find("tiny").model_path.read_bytes() == GGUF


def test_complete_pinned_model_needs_no_network(store: Store, web: Web, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    import_file("tiny", tmp_path / "tiny.gguf", store)
    pinned = f'[models.tiny]\nsources = [{{ huggingface = "me/tiny-GGUF", sha256 = "{sha256(GGUF)}" }}]'
    assert statuses(run("tiny", store, web, pinned))[-1] == "success"
    assert web.log == []
