"""The memory plan against reality: loaded weights, allocated caches, XLA's own analysis; and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_jax import Engine, EngineConfig, kernels, load, planning, sharding
from tars_jax.engine.pages import PageAllocator
from tars_jax.engine.runner import Runner
from tars_jax.engine.sizing import resolve
from tars_jax.engine.step import init_state
from tars_jax.errors import InvalidRequest, NotEnoughMemory
from tars_jax.kernels import native, pack_tiles
from tars_jax.loaders.blocks import TYPES, data_size, decode
from tars_jax.loaders.opening import ModelFile, choose_form
from tars_jax.loaders.params import WeightForm, _to_weight, stored_as
from tars_jax.model import init
from tars_jax.planning import MemoryPlan, Storage
from tests.tiny import CONFIG, tiny_model

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no CPU kernels")
FORMS: list[Any] = [pytest.param("tiled", marks=needs_kernels), "packed", "dense"]


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("type_id", TYPES, ids=lambda type_id: TYPES[type_id].name)
def test_a_matrix_of_any_type_takes_what_is_planned(type_id: int, form: WeightForm) -> None:
    shape = (24, 512)  # a tile and a half
    value = decode(type_id, np.zeros(data_size(type_id, shape), np.uint8), shape)
    assert stored_as(TYPES[type_id], form, "bfloat16").nbytes(shape) == nbytes(_to_weight(value, form, "bfloat16", pack_tiles))


def test_the_weights_of_a_file_take_what_is_planned(smollm2: Any) -> None:
    file = ModelFile.open(smollm2.path)
    stored = file.stored(choose_form(file.config, smollm2.dtype), smollm2.dtype)
    assert planning.weights_nbytes(file.config, stored) == smollm2.nbytes


@pytest.mark.parametrize("is_tiled", [False, pytest.param(True, marks=needs_kernels)])
def test_devices_share_the_weights_as_planned(is_tiled: bool) -> None:
    config = dataclasses.replace(CONFIG, intermediate_size=128, tie_embeddings=False)
    params = init(jax.random.key(0), config)
    if is_tiled:
        params = jax.tree.map(lambda x: jax.tree.map(jnp.asarray, pack_tiles(x)) if x.ndim == 2 else x, params)
    params = sharding.shard(params, config, sharding.make_mesh(2))
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert planning.weights_nbytes(config, Storage(32, tiled=is_tiled), 2) == on_first


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="num_kv_heads of 2 cannot be split over 4"):
        planning.weights_nbytes(CONFIG, Storage(16), 4)


def test_a_tied_embedding_counts_once() -> None:
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    assert planning.num_parameters(untied) - planning.num_parameters(CONFIG) == 96 * 64
    assert planning.num_parameters(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(init(jax.random.key(0), CONFIG)))


# cache and activations


@pytest.mark.parametrize("dtype", planning.CACHE_DTYPES)
def test_the_cache_takes_what_is_planned(dtype: Any) -> None:
    engine = EngineConfig(cache_dtype=dtype, cache_tokens=320 - 16, max_context=64)  # and page 0
    assert nbytes(init_state(CONFIG, engine).cache) == 320 * planning.cache_nbytes_per_token(CONFIG, dtype)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_the_cache_holds_what_the_processor_multiplies(isa: str) -> None:
    before = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        chosen, multiplies = resolve(EngineConfig(), tiny_model()).cache_dtype, native.multiplies_bf16()
    finally:
        native.use_isa(before)
    assert chosen == ("bfloat16" if multiplies else "float16")
    assert isa in ("avx512", "amx") or not multiplies
    assert resolve(EngineConfig(cache_dtype="float32"), tiny_model()).cache_dtype == "float32"


def test_devices_share_the_cache() -> None:
    assert planning.cache_nbytes_per_token(CONFIG, "float16", 2) * 2 == planning.cache_nbytes_per_token(CONFIG, "float16")


WIDE = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "intermediate_size": 2048}


@pytest.mark.parametrize(
    ("shape", "tokens", "rows"), [(WIDE, 256, 8), ({"vocab_size": 20_000}, 16, 16)], ids=["wide blocks", "large vocabulary"]
)
def test_activations_are_estimated_from_above_and_closely(shape: dict[str, int], tokens: int, rows: int) -> None:
    model = tiny_model(num_layers=1, **shape)  # one: layers follow each other
    config = resolve(EngineConfig(max_context=128, cache_tokens=1024, max_step_tokens=tokens, max_rows=rows), model)
    runner = Runner(model, config)
    step, sampler = runner._weights.compiled.steps.get(tokens), runner._weights.compiled.samplers.get((rows, True))
    buffers = [program.memory_analysis().temp_size_in_bytes for program in (step, sampler)]  # as XLA has planned them
    needed = max(buffers)
    assert needed <= planning.activations_nbytes(model.config, config) <= 1.5 * needed


# the pool


@given(
    st.builds(MemoryPlan, st.integers(0, 10**10), st.integers(1, 10**6), st.integers(0, 10**9), st.integers(0, 10**9)),
    st.integers(1, 64),
    st.integers(1, 10_000),
    st.integers(0, 10**11),
    st.booleans(),
    st.floats(0.1, 1.0),
)
def test_a_pool_fits_and_holds_a_request(plan: MemoryPlan, rows: int, context: int, free: int, all_rows: bool, share: float) -> None:
    engine = EngineConfig(max_rows=rows)
    try:
        tokens = planning.pool_tokens(plan, engine, context, free, for_all_rows=all_rows, share=share)
    except NotEnoughMemory:
        assert plan.total(context) > free
        return
    assert context <= tokens <= max(rows * context, planning.min_pool(context))
    assert plan.total(tokens) <= free


def fake_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(planning, "free_device_bytes", lambda devices=1: free)


@needs_kernels
def test_a_pool_serves_every_row_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_memory(monkeypatch, 10**10)
    config = resolve(EngineConfig(max_rows=100), tiny_model())
    assert (config.cache_tokens, config.kept_tokens) == (100 * 256, 8192)


def test_a_draft_models_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = tiny_model(), tiny_model(num_layers=1)
    plan = planning.make_plan(model.config, EngineConfig(), 0, draft=draft.config)
    assert plan.cache_per_token == 1.5 * planning.cache_nbytes_per_token(model.config, "float16")
    fake_memory(monkeypatch, plan.total(2000))
    assert resolve(EngineConfig(), model, draft).cache_tokens == 960


def test_a_pool_shrinks_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    plan = planning.make_plan(model.config, EngineConfig(), 0)
    fake_memory(monkeypatch, plan.total(2000))
    assert resolve(EngineConfig(), model).cache_tokens == 960  # half of it, in steps of 64


def test_an_engine_without_room_for_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_memory(monkeypatch, 10**5)
    with pytest.raises(NotEnoughMemory, match=r"requires more system memory \(.* MiB\) than is available \(0.1 MiB\)"):
        Engine(tiny_model())


def test_a_given_pool_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_memory(monkeypatch, 10**7)
    with pytest.raises(NotEnoughMemory, match=r"a KV cache of 100000 tokens 24\.4 MiB"):
        resolve(EngineConfig(cache_tokens=100_000), tiny_model())


# loading


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_memory(monkeypatch, 64 << 20)
    monkeypatch.setattr("tars_jax.loaders.opening.build_params", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(NotEnoughMemory, match=r"weights .* MiB; take a smaller model or quantisation, lower num_ctx"):
        load(smollm2_path)


def test_the_context_to_be_served_counts(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_memory(monkeypatch, 480 << 20)
    monkeypatch.setattr("tars_jax.loaders.opening.build_params", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(NotEnoughMemory, match=r"a KV cache of 8192 tokens 180.0 MiB, activations .* the process itself 256.0 MiB"):
        load(smollm2_path, weights="tiled", engine=EngineConfig(max_context=100_000))


def test_xla_expands_packed_weights(monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    file = ModelFile.open(smollm2_path)
    packed = planning.expanded_nbytes(file.config, file.stored("packed", "float32"))
    assert packed == pytest.approx(4 * planning.num_parameters(file.config), rel=0.001)  # all but the vectors
    assert planning.expanded_nbytes(file.config, file.stored("dense", "float32")) == 0
    fake_memory(monkeypatch, packed)
    with pytest.raises(NotEnoughMemory):
        load(smollm2_path, weights="packed")


def resident() -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_a_large_pool_is_not_touched_before_it_is_used(smollm2: Any) -> None:
    before = resident()
    engine = Engine(smollm2, EngineConfig(max_context=4096, cache_tokens=65_536))  # 1.5 GB
    assert engine.stats().nbytes > 1.5e9
    assert resident() - before < 0.5e9
    engine._runner._weights.compiled.steps.get(1)  # a process must not end while its threads compile
    engine.close()


def test_a_limit_of_kept_pages_bounds_the_pages_ever_used() -> None:
    pages, used = PageAllocator(100, 2, max_kept=6), set[int]()
    for request in range(50):
        taken, (_, node) = pages.allocate(4), pages.match([], root=1)
        for place, page in enumerate(taken):
            node = pages.share(node, (request, place), page)
        used |= set(taken)
        pages.free(taken)
        assert pages.num_kept <= 6
    assert len(used) == 6 + 4
    assert pages.num_free == 99
    assert len(pages.match([49, 0, 49, 1, 49, 2, 49, 3, 0], root=1)[0]) == 4  # the last request's pages are there
