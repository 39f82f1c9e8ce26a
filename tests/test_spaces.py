"""Norm gains and steering vectors: members in one pass, files, engines and devices all compute the same change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams, kernels, ops
from tars_jax.adapters import Adapter, apply_adapter
from tars_jax.engine.versions import Version, Versions
from tars_jax.errors import InvalidRequest, ModelFileError
from tars_jax.evolve import job, seed_log
from tars_jax.evolve.answers import answers
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.evolution import Evolution
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.control_vector import write_control_vector
from tars_jax.loaders.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from tars_jax.loaders.gguf_writer import write_gguf
from tars_jax.loaders.opening import read_adapter
from tars_jax.loaders.peft import write_peft
from tests.test_evolve import LINES, TEXT, check_members
from tests.tiny import CONFIG, tiny_model

SPACES = {  # and steps that are large enough for this model
    "gains": Settings(space="gains", layers="all", population=8, batch=3, slice=4, sigma=0.1, learning_rate=0.1),
    "steering": Settings(space="steering", layers="last:1", population=8, batch=3, slice=4, sigma=0.4, learning_rate=0.4),
}


def make(space: Any, **changes: Any) -> Evolution:
    model = tiny_model()
    return Evolution(model, encode_examples(LINES, model), dataclasses.replace(SPACES[space], **changes), other=TEXT)


@pytest.fixture(scope="module", params=list(SPACES))
def evolution(request: pytest.FixtureRequest) -> Evolution:
    return make(request.param)


def random_vectors(evolution: Evolution, members: int) -> jax.Array:
    return 2 * evolution.settings.sigma * jax.random.normal(jax.random.key(1), (members, evolution.space.size), jnp.float32)


def with_params(evolution: Evolution, params: Any) -> Any:
    return dataclasses.replace(evolution.model, params=params)


# Members.


def test_members_in_one_pass_score_as_they_do_alone(evolution: Evolution) -> None:
    check_members(evolution, random_vectors(evolution, 4))


def test_members_in_one_pass_answer_as_they_do_alone(evolution: Evolution) -> None:
    prompts, vectors = [example.prompt for example in evolution.examples[:3]], random_vectors(evolution, 2)
    model = evolution.model
    together = answers(evolution.space.updated(model.params, vectors), model, prompts, members=2, max_tokens=6)
    alone = [answers(evolution.space.updated(model.params, vector), model, prompts, members=1, max_tokens=6)[0] for vector in vectors]
    assert together == alone
    assert together[0] != together[1]


@pytest.mark.skipif(not kernels.available(), reason="no kernels")
@pytest.mark.parametrize("gated", [True, False])
def test_kernels_take_a_norm_and_a_bias_for_each_run_of_rows(gated: bool) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    config = dataclasses.replace(CONFIG, gated_mlp=gated)
    shapes = [(64, 64), (96, 64), (96, 64), (64, 96)]
    weights: list[Any] = [jax.tree.map(jnp.asarray, kernels.pack_tiles(np.asarray(draw(*shape)) / 8)) for shape in shapes]
    if not gated:
        weights[1] = None
    heads, residual, norms, biases = draw(6, 64), draw(6, 64), draw(3, 64), draw(3, 64)

    def run(rows: slice, norm: jax.Array, bias: jax.Array) -> jax.Array:
        return ops.output_mlp(heads[rows], residual[rows], norm, weights, (None, None, None, bias), config)

    together = run(slice(None), norms, biases)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        np.testing.assert_allclose(together[rows], run(rows, norms[i], biases[i]), rtol=1e-4, atol=1e-4)


# Files.


def test_a_reloaded_file_gives_the_same_bits(evolution: Evolution, tmp_path: Path) -> None:
    (vector,) = random_vectors(evolution, 1)
    ids = list(evolution.examples[0].prompt)
    expected = with_params(evolution, evolution.space.updated(evolution.params, vector)).logits(ids)
    adapter = evolution.adapter(vector)
    write_gguf_adapter(tmp_path / "adapter.gguf", adapter, CONFIG)
    paths = [tmp_path / "adapter.gguf", tmp_path]  # what `tars optimize` writes is such a folder
    if adapter.norms:
        write_peft(tmp_path / "peft", adapter)
        paths.append(tmp_path / "peft")
    for path in paths:
        found = with_params(evolution, apply_adapter(evolution.params, read_adapter(path, CONFIG)))
        np.testing.assert_array_equal(found.logits(ids), expected)
    assert np.abs(expected - evolution.model.logits(ids)).max() > 0.1


def test_steering_is_a_control_vector_of_llama_cpp(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    vector = np.arange(64, dtype=np.float32)
    write_gguf_adapter(tmp_path / "steering.gguf", Adapter({}, steering={1: vector}), CONFIG)
    reader = gguf.GGUFReader(tmp_path / "steering.gguf")
    fields = {name: reader.get_field(name).contents() for name in ("general.architecture", "controlvector.model_hint")}
    assert fields == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1"
    np.testing.assert_array_equal(tensor.data, vector)


def test_tuned_norms_are_named_as_peft_and_llama_cpp_name_them(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    adapter = Adapter({}, norms={"layers.1.mlp_norm": np.ones(64, np.float32), "norm": np.zeros(64, np.float32)})
    write_peft(tmp_path, adapter, "base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["base_model_name_or_path"]) == ("LN_TUNING", "base")
    assert settings["target_modules"] == ["model.layers.1.post_attention_layernorm", "model.norm"]
    names = {f"base_model.model.{module}.ln_tuning_layers.weight" for module in settings["target_modules"]}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    write_gguf_adapter(tmp_path / "norms.gguf", adapter, CONFIG)
    gguf = pytest.importorskip("gguf")
    assert {tensor.name for tensor in gguf.GGUFReader(tmp_path / "norms.gguf").tensors} == {"blk.1.ffn_norm.weight", "output_norm.weight"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.0": np.zeros(64, np.float32)}, r"direction\.0 is no vector of a layer"),
        ({"direction.2": np.zeros(64, np.float32)}, "the model has no layer 2"),
        ({"direction.1": np.zeros(32, np.float32)}, r"has the shape \[32\]"),
        ({"direction.1": np.full(64, np.nan, np.float32)}, "not finite"),
        ({"mystery": np.zeros(64, np.float32)}, "mystery is no vector"),
        ({}, "it holds no vector"),
    ],
)
def test_a_control_vector_that_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    write_gguf(tmp_path / "steering.gguf", {"general.architecture": "controlvector"}, tensors)
    with pytest.raises(ModelFileError, match=message):
        read_gguf_adapter(tmp_path / "steering.gguf", CONFIG)


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    ones = np.ones(64, np.float32)
    with pytest.raises(InvalidRequest, match="layer 0"):
        write_control_vector(tmp_path / "a.gguf", Adapter({}, steering={0: ones}), CONFIG)
    with pytest.raises(InvalidRequest, match="no GGUF file has both"):
        write_gguf_adapter(tmp_path / "a.gguf", Adapter({}, norms={"norm": ones}, steering={1: ones}), CONFIG)
    with pytest.raises(InvalidRequest, match="cannot be a PEFT adapter"):
        write_peft(tmp_path, Adapter({}, steering={1: ones}))


def test_half_an_adapters_strength_is_half_its_change() -> None:
    model, ones = tiny_model(), np.ones(64, np.float32)
    adapter = Adapter({}, norms={"norm": 3 * ones}, steering={1: 4 * ones})
    params = apply_adapter(model.params, adapter, 0.5)
    np.testing.assert_allclose(params.norm, 2.0)
    np.testing.assert_allclose(params.layers[1].down_bias, 2.0)
    np.testing.assert_allclose(apply_adapter(params, adapter).layers[1].down_bias, 6.0)


# The search.


def test_a_search_gets_better_on_what_it_is_searched_with(evolution: Evolution) -> None:
    held, state = evolution.hold_out(evolution.examples), evolution.init()
    before = evolution.evaluate(evolution.start(), held)
    for _ in range(12):
        state, _ = evolution.generation(state)
    assert evolution.evaluate(evolution.centre(state), held).loss < before.loss - 0.5
    assert 0 < evolution.drift(evolution.centre(state)) < 1


@pytest.mark.parametrize(("space", "strategy"), [("gains", "annealing"), ("steering", "montecarlo")])
def test_the_optimizers_of_the_library_search_these_spaces(space: str, strategy: str) -> None:
    evolution = make(space, strategy=strategy, horizon=6)
    held, state = evolution.hold_out(evolution.examples), evolution.init()
    before = evolution.evaluate(evolution.start(), held)
    for _ in range(6):
        state, _ = evolution.generation(state)
    assert evolution.evaluate(evolution.centre(state), held).loss < before.loss


def test_a_saved_run_goes_on_where_it_ended_and_is_rebuilt(evolution: Evolution, tmp_path: Path) -> None:
    held = evolution.hold_out(evolution.examples)

    def run(generations: int, state: Any = None) -> job.Outcome:
        *_, outcome = job.search(evolution, held, job.Budget(generations=generations, target=2.0), state)
        return dataclasses.replace(
            outcome, best=evolution.centre(outcome.state), after=outcome.before, best_generation=outcome.state.generation
        )

    outcome = run(2)
    job.save(tmp_path, evolution, outcome)
    continued = run(2, job.resume(tmp_path, evolution))
    np.testing.assert_array_equal(evolution.centre(continued.state), evolution.centre(run(4).state))
    again, vector = seed_log.rebuild(tmp_path / "seeds.json", evolution.model)
    np.testing.assert_array_equal(vector, outcome.best)
    assert again.settings.space == evolution.settings.space
    assert (tmp_path / "adapter").is_dir() == (evolution.settings.space == "gains")
    read_adapter(tmp_path / "adapter.gguf", CONFIG)


def test_a_steering_vectors_unit_is_a_quarter_of_the_streams_root_mean_square() -> None:
    model = tiny_model()
    idle = [dataclasses.replace(layer, o=0 * layer.o, down=0 * layer.down) for layer in model.params.layers]
    embed = jnp.where(model.params.embed > 0, 2.0, -2.0)
    params = dataclasses.replace(model.params, embed=embed, layers=tuple(idle))
    evolution = Evolution(model, encode_examples(LINES, model), SPACES["steering"], params=params, other=TEXT)
    np.testing.assert_allclose(evolution.adapter(jnp.full(64, 0.5)).steering[1], 0.5 * 0.25 * 2.0, rtol=1e-6)
    assert evolution.drift(jnp.full(64, 0.5)) == pytest.approx(0.5 * 0.25)


def test_layer_0_cannot_be_steered() -> None:
    with pytest.raises(InvalidRequest, match="layer 1 and later"):
        make("steering", layers="0-1")
    assert make("steering", layers="all").space.size == CONFIG.hidden_size * (CONFIG.num_layers - 1)


def test_a_space_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="space must be one of low-rank, gains, steering"):
        Settings(space="magic")  # type: ignore[arg-type]


# Serving.


def test_an_engine_takes_steering_on_and_off_between_two_steps() -> None:
    evolution = make("steering")
    engine = Engine(evolution.model, EngineConfig(max_context=128, max_rows=4, max_step_tokens=16, cache_dtype="float32"))
    greedy = SamplingParams(max_tokens=8, temperature=0)

    def say() -> str:
        return "".join(engine.generate("Say one:", greedy))

    vector = 10 * random_vectors(evolution, 1)[0]  # so much that the answer must change
    changed = evolution.space.updated(evolution.params, vector)
    first = with_params(evolution, changed).logits(evolution.model.tokenizer.encode("Say one:"))[-1].argmax()
    before, versions = say(), Versions()
    versions.add(engine, Version(kind="optimized", adapters=(evolution.adapter(vector),)))
    after = say()
    versions.roll_back(engine)
    assert say() == before != after
    assert after[0] == evolution.model.tokenizer.decode([int(first)])
    with pytest.raises(InvalidRequest, match="load norms and steering vectors with the model"):
        engine.add_adapter("evolved", evolution.adapter(vector))
    engine.close()
