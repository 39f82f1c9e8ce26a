"""Strict jax in every test: no silent promotion of types or ranks, eight fake devices; and the real model, pulled once."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"
MODEL = "smollm2:135m"
MOST_MAPPINGS = 10_000


@pytest.fixture(scope="session", autouse=True)
def compile_cache(pytestconfig: pytest.Config) -> None:
    """Compiled programs are kept between runs, beside pytest's own cache."""
    jax.config.update("jax_compilation_cache_dir", str(pytestconfig.cache.mkdir("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> Iterator[None]:
    """What lives before a file of tests is left out of its garbage collections: a server that unloads a model collects, which took
    0.2 s and more a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Compiled programs are let go after a file of tests that leaves many: each takes memory mappings, Linux gives a process 65,530 of
    them, and XLA's compiler crashes when there are no more."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def smollm2_store(pytestconfig: pytest.Config) -> Any:
    """A store with the default model in it; pulled on the first run (about 93 MB) and kept.

    Only the sources whose bytes are pinned count: the golden values belong to these.
    """
    from tars_jax.hub import pull
    from tars_jax.hub.catalog import Catalog, load_catalog
    from tars_jax.store import ModelName, Store

    entry = load_catalog({}).find(ModelName.parse(MODEL))
    pinned = dataclasses.replace(entry, sources=tuple(source for source in entry.sources if source.sha256))

    store = Store(Path(os.environ.get("TARS_TEST_MODELS") or pytestconfig.cache.mkdir("models")))
    for _ in pull(MODEL, store, catalog=Catalog({MODEL: pinned})):
        pass
    return store


@pytest.fixture(scope="session")
def smollm2_path(smollm2_store: Any) -> Path:
    return smollm2_store.find(MODEL).model_path


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Any:
    from tars_jax import load

    return load(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_engine(smollm2: Any) -> Iterator[Any]:
    from tars_jax import Engine, EngineConfig

    engine = Engine(smollm2, EngineConfig(max_context=256, max_rows=40, max_step_tokens=128, cache_tokens=16384))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What llama.cpp answered, with the weights in float16 ("f16") and on the Q4_1 file itself ("q4_1")."""
    return {kind: json.loads((GOLDEN / f"smollm2-{kind}.json").read_text()) for kind in ("f16", "q4_1")}
