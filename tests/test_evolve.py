"""Evolution on a tiny model: what its pieces compute, and that a run can be stopped, resumed and rebuilt."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tars_jax.adapters import apply_adapter
from tars_jax.errors import InvalidRequest
from tars_jax.evolve import job, seed_log
from tars_jax.evolve.answers import answers
from tars_jax.evolve.basis import contrast
from tars_jax.evolve.batches import layout, repeat, round_up, score_batch
from tars_jax.evolve.data import Example, encode_examples, read_examples
from tars_jax.evolve.evaluation import Evaluation, refusal, wilson
from tars_jax.evolve.evolution import Evolution, State
from tars_jax.evolve.fitness import parse_fitness
from tars_jax.evolve.low_rank import matrix_names
from tars_jax.evolve.report import as_html, as_json, verdict
from tars_jax.evolve.scoring import score, trunk
from tars_jax.evolve.searched import DIRECTIONS, combined, searched
from tars_jax.evolve.sentiment import HELD_OUT_ADJECTIVES, HELD_OUT_NOUNS, TRAIN_ADJECTIVES, TRAIN_NOUNS, sentiment_task
from tars_jax.evolve.settings import Settings
from tars_jax.evolve.space import choose_layers
from tars_jax.evolve.strategy import Eggroll, RandomSearch, standardised
from tars_jax.perplexity import log_probabilities
from tests.tiny import CONFIG, tiny_model

TEXT = "All that is gold does not glitter, not all those who wander are lost. " * 8
WORDS = ("one", "two", "three", "four", "five", "six")
LINES = [{"prompt": f"Say {word}:", "completion": (" no", " yes")[i % 2]} for i, word in enumerate(WORDS)]
SETTINGS = Settings(layers="last:1", population=8, batch=3, rank=2, slice=4)


@pytest.fixture(scope="module")
def evolution() -> Evolution:
    model = tiny_model()
    return Evolution(model, encode_examples(LINES, model), SETTINGS, other=TEXT)


def random_vectors(evolution: Evolution, members: int, scale: float = 0.3) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(1), (members, evolution.space.size), jnp.float32)


# Data.


def test_lines_of_every_form_become_examples(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"input": "c", "label": "d"}\n')
    found = read_examples(path, tiny_model())
    assert [(e.prompt_text, e.completion_text) for e in found] == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"prompt": "a"}', 'line 2 has no "completion"'),
        ('{"prompt": 1, "completion": "b"}', 'line 2 has a "prompt" that is no text'),
        ('{"prompt": "a", "completion": ""}', "line 2 has an empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2 has messages that do not end"),
        (json.dumps({"prompt": "a" * 300, "completion": "b"}), "line 2 has 301 tokens"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(InvalidRequest, match=message):
        read_examples(path, tiny_model())


def test_the_task_shares_no_words_between_training_and_held_out() -> None:
    train, held_out = sentiment_task(seed=3)
    assert len(held_out) >= 200
    assert not set(TRAIN_NOUNS) & set(HELD_OUT_NOUNS)
    for label in ("positive", "negative"):
        assert not set(TRAIN_ADJECTIVES[label]) & set(HELD_OUT_ADJECTIVES[label])
        assert sum(line["completion"] == f" {label}" for line in train) == len(train) // 2


# Scoring.


def test_scores_are_the_models_own(evolution: Evolution) -> None:
    examples = evolution.examples
    batch = score_batch(examples)
    states = trunk(evolution.params, batch.rows, config=CONFIG, dtype="float32", first=1)
    found = score(evolution.params, states, batch, config=CONFIG, first=1, members=1)
    for i, example in enumerate(examples):
        logits = evolution.model.logits([*example.prompt, *example.completion])[len(example.prompt) - 1 : -1]
        np.testing.assert_allclose(found.log_probability[0, i], log_probabilities(logits, list(example.completion)).mean(), rtol=1e-4)
        assert found.exact[0, i] == float((logits.argmax(axis=1) == example.completion).all())


def test_a_population_scores_as_its_members_alone(evolution: Evolution) -> None:
    check_members(evolution, random_vectors(evolution, 4))


def check_members(evolution: Evolution, vectors: jax.Array) -> None:
    """Four members differ, and score in one pass as they do alone."""
    _, batch, states = evolution._generation_batch(0)
    together = evolution._score(evolution.space.updated(evolution.params, vectors), batch, states, 4)
    for i, vector in enumerate(vectors):
        alone = evolution._score(evolution.space.updated(evolution.params, vector), batch, states, 1)
        np.testing.assert_allclose(together.log_probability[i], alone.log_probability[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(np.asarray(together.log_probability), axis=0).min() > 1e-3


def test_exact_means_that_greedy_decoding_writes_the_completion(evolution: Evolution) -> None:
    model, prompt = evolution.model, evolution.examples[0].prompt
    (((answer),),) = answers(model.params, model, [prompt], members=1, max_tokens=5)
    right = Example(prompt, tuple(model.tokenizer.encode(answer)))
    wrong = dataclasses.replace(right, completion=(*right.completion[:-1], (right.completion[-1] + 1) % 90))
    batch = score_batch([right, wrong])
    states = trunk(model.params, batch.rows, config=CONFIG, dtype="float32", first=1)
    assert score(model.params, states, batch, config=CONFIG, first=1, members=1).exact.tolist() == [[1.0, 0.0]]


def test_answers_are_those_of_the_members(evolution: Evolution) -> None:
    model, prompts = evolution.model, [example.prompt for example in evolution.examples[:3]]
    vectors = random_vectors(evolution, 2)
    found = answers(evolution.space.updated(model.params, vectors), model, prompts, members=2, max_tokens=6)
    for vector, texts in zip(vectors, found, strict=True):
        changed = dataclasses.replace(model, params=apply_adapter(model.params, evolution.adapter(vector)))
        for prompt, text in zip(prompts, texts, strict=True):
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(changed.logits(ids)[-1].argmax()))
            assert text == model.tokenizer.decode(ids[len(prompt) :])


def test_batches_have_few_sizes() -> None:
    sizes = {round_up(count) for count in range(1, 1025)}
    assert len(sizes) < 30
    assert all(count <= round_up(count) <= max(1.26 * count, count + 15) for count in range(1, 1025))


def test_copies_of_a_batch_do_not_share_pages() -> None:
    rows = repeat(layout([[1, 2, 3], [4, 5]]), 3)
    assert len(np.unique(rows.page_tables)) == rows.page_tables.size
    assert rows.query_starts.tolist() == [0, 3, 16, 19, 32, 35, 48]


# Where it searches.


def test_contrast_finds_what_the_other_text_does_not_use() -> None:
    rng = np.random.default_rng(0)
    other = rng.normal(size=(200, 16)) * np.where(np.arange(16) < 8, 3.0, 0.1)
    task = rng.normal(size=(20, 16)) * 0.1
    task[:, 0] += 3.0  # as loud as in the other text
    task[:, 12] += 2.0  # not so loud, but the task's alone
    direction = np.abs(contrast(task.astype(np.float32), other.astype(np.float32), 2)[0])
    assert direction.argmax() == 12
    assert direction[12] > 5 * np.delete(direction, 12).max()


@pytest.mark.parametrize("count", [5, 40])
def test_contrast_agrees_with_the_generalised_eigenvectors(count: int) -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    task, other = rng.normal(size=(6, 12)), rng.normal(size=(count, 12))
    covariance = other.T @ other / count + 0.1 * np.mean(other**2) * np.eye(12)
    _, vectors = scipy_linalg.eigh(task.T @ task, covariance)
    for ours, theirs in zip(contrast(task, other, 3), vectors.T[::-1], strict=False):
        assert abs(ours @ theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("spec", "layers"), [("all", [0, 1]), ("last:1", [1]), ("last:9", [0, 1]), ("0", [0]), ("0-1", [0, 1])])
def test_layers_are_chosen(spec: str, layers: list[int]) -> None:
    assert choose_layers(spec, CONFIG) == layers


@pytest.mark.parametrize("spec", ["2", "0-7x", "", "last:0", "first"])
def test_layers_that_are_not_there_are_refused(spec: str) -> None:
    with pytest.raises(InvalidRequest, match="layers"):
        choose_layers(spec, CONFIG)


def test_matrices_that_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no such matrix: 'gate'"):
        matrix_names([0], ["gate"], dataclasses.replace(CONFIG, gated_mlp=False))


def test_an_adapter_computes_what_was_evaluated(evolution: Evolution) -> None:
    (vector,) = random_vectors(evolution, 1)
    ids = list(evolution.examples[0].prompt)
    whole = dataclasses.replace(evolution.model, params=evolution.space.updated(evolution.params, vector))
    exported = dataclasses.replace(evolution.model, params=apply_adapter(evolution.params, evolution.adapter(vector)))
    np.testing.assert_array_equal(whole.logits(ids), exported.logits(ids))


# Strategies.


def sphere(strategy: Any, generations: int, size: int = 12) -> float:
    """Mean squared distance from a target one unit away, after so many generations."""
    goal = jnp.ones(size)
    state = strategy.init(jax.random.key(0), jnp.zeros(size))
    for _ in range(generations):
        members = jnp.concatenate([strategy.members(state, at, 2) for at in range(0, strategy.population, 2)])
        state = strategy.tell(state, strategy.reduce(-np.square(np.asarray(members - goal[None]))))
    return float(jnp.mean(jnp.square(strategy.centre(state) - goal)))


def test_eggroll_climbs() -> None:
    assert sphere(Eggroll(16, sigma=0.05, learning_rate=0.05), 60) < 0.05


def test_eggroll_takes_any_solver_of_optax() -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        assert sphere(Eggroll(16, sigma=0.05, solver=optax.adam(0.05)), 60) < 0.05


def test_random_search_keeps_the_best_and_climbs_less() -> None:
    few, many = (sphere(RandomSearch(16, sigma=0.3), n) for n in (1, 60))
    assert 0.2 < many < few < 1


@pytest.mark.parametrize("name", ["genetic", "hybrid"])
def test_the_optimizers_of_the_library_are_strategies(name: Any) -> None:
    strategy = searched(Settings(strategy=name, population=16, sigma=0.3, horizon=40))
    assert sphere(strategy, 40) < 0.6


def test_directions_are_signs_of_which_amounts_give_the_deviation() -> None:
    size, many = 5001, searched(Settings(strategy="genetic", population=8, sigma=0.5))
    state = many.init(jax.random.key(3), jnp.full(size, 2.0))
    n = state.asked.shape[1]
    assert n == DIRECTIONS
    directions = np.asarray(combined(state.key, jnp.zeros(size), n**0.5 * jnp.eye(n)[:40]))  # one each, more than a draw's bits give
    np.testing.assert_allclose(np.abs(directions), 1, rtol=1e-5)
    overlaps = directions @ directions.T / size
    assert np.abs(overlaps - np.eye(40)).max() < 5 / size**0.5
    members = many.members(state, 0, 8)
    found, asked = np.std(members - 2, axis=1), np.sqrt(np.mean(np.square(state.asked), axis=1))
    np.testing.assert_allclose(found, asked, rtol=0.1)
    np.testing.assert_allclose(many.members(state, 4, 2), members[4:6], rtol=1e-5)


def test_members_come_in_antithetic_pairs() -> None:
    strategy = Eggroll(8, sigma=0.1)
    state = strategy.init(jax.random.key(0), jnp.full(5, 2.0))
    members = np.asarray(strategy.members(state, 0, 8))
    np.testing.assert_allclose(members[0::2] + members[1::2], 4.0, rtol=1e-6)
    assert len(np.unique(members, axis=0)) == 8
    np.testing.assert_array_equal(strategy.members(state, 4, 2), members[4:6])


def test_noise_differs_between_generations() -> None:
    strategy = Eggroll(4, sigma=0.1, learning_rate=1e-9)
    state = strategy.init(jax.random.key(0), jnp.zeros(5))
    later = strategy.tell(state, np.array([1, -1, 0, 0], np.float32))
    assert not np.allclose(strategy.members(state, 0, 4), strategy.members(later, 0, 4))


def test_the_step_is_the_weighted_noise() -> None:
    strategy = Eggroll(4, sigma=1.0, learning_rate=0.5, decay=0.1)
    state = strategy.init(jax.random.key(0), jnp.ones(5))
    noise = np.asarray(strategy.members(state, 0, 4)) - 1
    weights = np.array([1.5, -0.5, -1.0, 0.0], np.float32)
    expected = 0.9 + 0.5 * (weights @ noise) / 2  # sqrt of the population
    np.testing.assert_allclose(strategy.tell(state, weights).mean, expected, rtol=1e-5)


def test_fitness_is_compared_on_the_same_example() -> None:
    fitness = np.array([[0.0, 10.0], [1.0, 11.0], [0.0, 10.0], [1.0, 11.0]])
    np.testing.assert_allclose(standardised(fitness), [-1, 1, -1, 1], atol=1e-4)
    np.testing.assert_array_equal(standardised(np.ones((4, 2))), np.zeros(4))


# A run.


def test_a_generation_improves_and_is_the_same_in_any_slices(evolution: Evolution) -> None:
    whole = Evolution(evolution.model, evolution.examples, dataclasses.replace(SETTINGS, slice=8), other=TEXT)
    ours, metrics = evolution.generation(evolution.init())
    theirs, _ = whole.generation(whole.init())
    assert metrics.generation == 1
    assert metrics.best > metrics.mean
    np.testing.assert_allclose(evolution.centre(ours), whole.centre(theirs), rtol=1e-2, atol=1e-4)


def test_a_step_is_a_slice(evolution: Evolution) -> None:
    state, metrics = evolution.step(evolution.init())
    assert metrics is None
    assert [len(part) for part in state.scored] == [4]
    state, metrics = evolution.step(state)
    assert metrics is not None
    assert (state.generation, state.scored) == (1, ())


def test_a_search_gets_better_on_what_it_is_searched_with() -> None:
    model = tiny_model()
    settings = dataclasses.replace(SETTINGS, layers="all", population=32, batch=6, rank=4, sigma=0.05, learning_rate=0.05, slice=32)
    evolution = Evolution(model, encode_examples(LINES, model), settings, other=TEXT)
    held = evolution.hold_out(evolution.examples)
    state = evolution.init()
    before = evolution.evaluate(evolution.start(), held)
    for _ in range(12):
        state, _ = evolution.generation(state)
    assert evolution.evaluate(evolution.centre(state), held).loss < before.loss - 1


@pytest.mark.parametrize("name", ["genetic", "annealing", "montecarlo"])  # of which "hybrid" is made
def test_the_optimizers_of_the_library_search_low_rank_updates(name: Any) -> None:
    model = tiny_model()
    chosen = dataclasses.replace(SETTINGS, strategy=name, horizon=8, sigma=0.1)
    evolution = Evolution(model, encode_examples(LINES, model), chosen, other=TEXT)
    held, state = evolution.hold_out(evolution.examples), evolution.init()
    before = evolution.evaluate(evolution.start(), held)
    for _ in range(8):
        state, _ = evolution.generation(state)
    assert evolution.evaluate(evolution.centre(state), held).loss < before.loss


def test_replay_makes_the_same_state(evolution: Evolution) -> None:
    state = evolution.init()
    for _ in range(3):
        state, _ = evolution.generation(state)
    np.testing.assert_array_equal(evolution.centre(evolution.replay(state.log)), evolution.centre(state))


def outcome_of(evolution: Evolution, generations: int, state: State | None = None) -> job.Outcome:
    held = evolution.hold_out(evolution.examples[:4])
    *_, outcome = job.search(evolution, held, job.Budget(generations=generations, target=2.0), state)
    return outcome


def test_a_saved_run_goes_on_where_it_ended(evolution: Evolution, tmp_path: Path) -> None:
    job.save(tmp_path, evolution, outcome_of(evolution, 2))
    continued = outcome_of(evolution, 2, job.resume(tmp_path, evolution))
    np.testing.assert_array_equal(evolution.centre(continued.state), evolution.centre(outcome_of(evolution, 4).state))


def accepted(evolution: Evolution) -> job.Outcome:
    """An outcome whose last update counts as the best, whatever the guard would say of it."""
    outcome = outcome_of(evolution, 2)
    return dataclasses.replace(outcome, best=evolution.centre(outcome.state), after=outcome.before, best_generation=2)


def test_the_seed_log_gives_the_adapter_again(evolution: Evolution, tmp_path: Path) -> None:
    outcome = accepted(evolution)
    path = tmp_path / "seeds.json"
    assert outcome.best is not None
    seed_log.write_seed_log(path, evolution, outcome.state, 2, outcome.best)
    record = seed_log.read_seed_log(path)
    again = Evolution(evolution.model, record["basis_examples"], record["settings"], other=TEXT)
    np.testing.assert_array_equal(again.centre(again.replay(record["log"])), outcome.best)
    assert path.stat().st_size < 8192


def test_results_are_read_back(evolution: Evolution, tmp_path: Path) -> None:
    from tars_jax.loaders.opening import read_adapter

    outcome = accepted(evolution)
    assert outcome.best is not None
    job.save(tmp_path, evolution, outcome, "tars optimize <tiny>")
    expected = evolution.adapter(outcome.best)
    for path in (tmp_path / "adapter", tmp_path / "adapter.gguf"):
        found = read_adapter(path, CONFIG)
        for name, update in expected.updates.items():
            product = update.scale * update.a @ update.b
            np.testing.assert_allclose(found.updates[name].scale * found.updates[name].a @ found.updates[name].b, product, atol=1e-6)


def test_reports_say_what_came_of_it(evolution: Evolution) -> None:
    outcome = accepted(evolution)
    record = json.loads(as_json(evolution, outcome, "tars"))
    assert record["accepted"]
    assert len(record["curves"]) == 2
    page = as_html(evolution, outcome, "<script>")
    assert "<script>" not in page
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rank": 3}, "other settings: rank 2"), ({"seed": 5}, "other settings: seed 0")],
)
def test_another_run_cannot_be_resumed(evolution: Evolution, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    job.save(tmp_path, evolution, outcome_of(evolution, 1))
    other = Evolution(evolution.model, evolution.examples, dataclasses.replace(SETTINGS, **change), other=TEXT)
    with pytest.raises(InvalidRequest, match=message):
        job.resume(tmp_path, other)


def test_other_examples_cannot_be_resumed_with(evolution: Evolution, tmp_path: Path) -> None:
    job.save(tmp_path, evolution, outcome_of(evolution, 1))
    with pytest.raises(InvalidRequest, match="other examples"):
        job.resume(tmp_path, Evolution(evolution.model, evolution.examples[1:], SETTINGS, other=TEXT))


@pytest.mark.parametrize("content", ["", "{}", '{"format": "x"}', '{"format": "tars seed log 2", "settings": 3}'])
def test_what_is_no_seed_log_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "seeds.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match="not a seed log"):
        seed_log.read_seed_log(path)


def test_a_scorer_judges_answers() -> None:
    model = tiny_model()
    settings = dataclasses.replace(SETTINGS, fitness="regex:.*[a-m]", max_new_tokens=4)
    fitness = parse_fitness(settings.fitness, trusted=True)
    evolution = Evolution(model, encode_examples(LINES, model), settings, fitness=fitness, other=TEXT)
    state, metrics = evolution.generation(evolution.init())
    assert 0 <= metrics.mean <= metrics.best <= 1
    found = evolution.evaluate(evolution.centre(state), evolution.hold_out(evolution.examples))
    assert found.score == found.fitness


def test_a_fitness_that_tells_no_members_apart_is_named(evolution: Evolution) -> None:
    outcome = outcome_of(evolution, 2)
    same = [dataclasses.replace(p, metrics=dataclasses.replace(p.metrics, best=0.0, mean=0.0)) for p in outcome.points]
    for points, named in ((outcome.points, False), (tuple(same), True)):
        found = verdict(dataclasses.replace(outcome, points=points, after=None, best=None, refused="it is not better"))
        assert ("all members scored the same" in found, "it is not better" in found) == (named, not named)


# The command.


@pytest.fixture
def optimize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``tars optimize`` on the tiny model, into the folder ``out``; gives the result."""
    from typer.testing import CliRunner

    from tars_jax.cli import make_app

    monkeypatch.setattr("tars_jax.loaders.opening.load", lambda name: tiny_model())
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    fixed = ["optimize", "tiny", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"), "--layers", "last:1"]
    small = ["--population", "4", "--batch", "2", "--generations", "1", "--target", "2"]
    return lambda *words: CliRunner().invoke(make_app(), [*fixed, *small, *words])


def test_optimize_writes_its_result_and_resumes(optimize: Any, tmp_path: Path) -> None:
    assert optimize().exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["generations"] == 1
    assert (tmp_path / "out" / "report.html").is_file()
    assert "holds the result of a run" in str(optimize().exception)
    assert optimize("--resume").exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["generations"] == 2


def test_optimize_stopped_at_once_leaves_nothing(optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evolution, "generation", stopped)
    assert optimize().exit_code == 130
    assert not (tmp_path / "out").exists()


def test_optimize_stopped_later_keeps_what_it_has(optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Evolution.generation

    def stopped(self: Evolution, state: State) -> Any:
        if state.generation:
            raise KeyboardInterrupt
        return whole(self, state)

    monkeypatch.setattr(Evolution, "generation", stopped)
    assert optimize("--generations", "5").exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["generations"] == 1
    assert report["curves"][0]["evaluation"] is not None


def test_optimize_whose_fitness_fails_later_keeps_what_it_has(optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Evolution.generation

    def failing(self: Evolution, state: State) -> Any:
        if state.generation:
            raise InvalidRequest("fitness: it failed")
        return whole(self, state)

    monkeypatch.setattr(Evolution, "generation", failing)
    ended = optimize("--generations", "5")
    assert "it failed; what was found before is in" in str(ended.exception)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["generations"] == 1
    monkeypatch.setattr(Evolution, "generation", whole)
    assert optimize("--generations", "5", "--resume").exit_code == 0


# What is allowed.


def evaluation(score: float, general: float) -> Evaluation:
    return Evaluation(score, score, score, (0, 1), 1.0, general, 100)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (evaluation(0.9, 3.05), None),
        (evaluation(0.1, 3.0), "not better"),
        (evaluation(0.9, 3.07), "other text"),
        (evaluation(0.9, float("nan")), "other text"),
    ],
)
def test_an_update_must_be_better_and_leave_other_text_alone(after: Evaluation, reason: str | None) -> None:
    found = refusal(evaluation(0.1, 3.0), after)
    assert found is None if reason is None else reason in str(found)


def test_wilson_intervals() -> None:
    low, high = wilson(90, 100)  # statsmodels.stats.proportion.proportion_confint(90, 100, method="wilson")
    assert (low, high) == pytest.approx((0.825633, 0.944771), abs=1e-5)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("spec", ["regex:(a+)+$", "os:system", "exec"])
def test_a_request_cannot_name_code(spec: str) -> None:
    with pytest.raises(InvalidRequest, match="fitness must be"):
        parse_fitness(spec)


@pytest.mark.parametrize("spec", ["regex:(", "no_such_module:f", "math:nothing", "math:pi", "words"])
def test_a_fitness_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(InvalidRequest, match="fitness"):
        parse_fitness(spec, trusted=True)


SCORERS = """
def ratio(answer, prompt, completion): return len(answer) / len(completion)
def raising(answer, prompt, completion): return 1 / 0
def text(answer, prompt, completion): return "good"
def nothing(answer, prompt, completion): return float("nan")
"""


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a function of a module in the working folder, as a scorer."""
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name, module="my_scorers": parse_fitness(f"{module}:{name}", trusted=True).scorer
    sys.modules.pop("my_scorers", None)


def test_a_function_in_the_working_folder_scores(scorers: Any) -> None:
    assert scorers("ratio")("abc", "", "abcdef") == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "my_scorers:raising raised ZeroDivisionError: division by zero, for the answer 'abc'"),
        ("text", "my_scorers:text must give a finite number, got 'good' for the answer 'abc'"),
        ("nothing", "must give a finite number, got nan"),
    ],
)
def test_a_function_that_gives_no_score_is_an_error_with_its_answer(scorers: Any, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        scorers(name)("abc", "", "x")


def test_a_module_that_cannot_be_imported_is_an_error(scorers: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot import f from my_broken: division by zero"):
        scorers("f", "my_broken")


def test_json_fitness() -> None:
    scorer = parse_fitness("json").scorer
    assert scorer is not None
    assert [scorer(text, "", "") for text in ('{"a": 1}', "nothing", "[" * 100_000)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("change", [{"population": 5}, {"sigma": 0.0}, {"strategy": "magic"}, {"rank": 0}, {"matrices": ()}])
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(change))):
        Settings(**change)
