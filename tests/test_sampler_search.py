"""A search of sampler settings finds what is planted, keeps what is not beaten and goes on where it ended; its command."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.errors import InvalidRequest
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.fitness import Fitness, parse_fitness
from tars_jax.evolve.sampler_search import RANGES, STEP, Sampled, answer_scorer, defaults, modelfile, paired_gain, search_sampler
from tars_jax.optim import Box, Budget, GeneticAlgorithm
from tests.tiny import tiny_model

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LINES = [{"prompt": f"Say {word}:", "completion": "x"} for word in WORDS]
MODEL = tiny_model(scale=2.0)
EXAMPLES = encode_examples(LINES, MODEL)
TOKENS = 4


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    engine = Engine(MODEL, EngineConfig(max_context=128, max_rows=4, max_step_tokens=16, cache_dtype="float32", prompt_lookup=False))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def greedy(engine: Any) -> dict[str, str]:
    """What the model answers without chance, by prompt."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    return {line["prompt"]: "".join(engine.generate(line["prompt"], params)) for line in LINES}


def likeness(greedy: dict[str, str]) -> Any:
    """A scorer: the share of an answer that is as without chance."""
    return lambda answer, prompt, completion: sum(a == b for a, b in zip(answer, greedy[prompt], strict=True)) / TOKENS


def stop(generation: int, numbers: dict[str, float]) -> None:
    """Ctrl-C after the second generation."""
    if generation == 2:
        raise KeyboardInterrupt


def search(engine: Any, scorer: Any, generations: int = 6, **more: Any) -> Any:
    sampled = Sampled(engine, scorer, samples=2, max_tokens=TOKENS)
    optimizer = GeneticAlgorithm(pop_size=12, bounds=Box(0.0, 1.0), step=STEP)
    return search_sampler(sampled, EXAMPLES[:6], EXAMPLES[6:], optimizer, Budget(generations=generations), before=defaults(), **more)


def test_a_scorer_that_wants_no_chance_finds_low_temperatures(engine: Any, greedy: dict[str, str]) -> None:
    outcome = search(engine, likeness(greedy))
    assert outcome.accepted
    assert outcome.scores[1] > outcome.scores[0] + 0.1
    assert outcome.chosen["temperature"] < 0.3 or outcome.chosen["top_k"] == 1


def test_the_settings_stay_where_nothing_is_gained(engine: Any) -> None:
    outcome = search(engine, lambda answer, prompt, completion: float(sum(map(ord, answer)) % 2), generations=2)
    assert not outcome.accepted
    assert outcome.chosen == defaults()
    assert outcome.interval[0] <= 0


def test_the_settings_stay_where_all_score_the_same(engine: Any) -> None:
    outcome = search(engine, lambda answer, prompt, completion: 1.0, generations=12)
    assert (outcome.accepted, outcome.reason) == (False, "all settings score the same")


def test_the_same_settings_have_the_same_answers_whoever_shares_the_batch(engine: Any) -> None:
    seen: dict[str, list[str]] = {"alone": [], "together": []}

    def scores(kind: str, *candidates: dict[str, float]) -> None:
        def scorer(answer: str, prompt: str, completion: str) -> float:
            seen[kind].append(answer)
            return 0.0

        Sampled(engine, scorer, samples=2, max_tokens=TOKENS).scores(candidates, EXAMPLES[:3], seed=5)

    scores("alone", defaults())
    scores("together", {**defaults(), "temperature": 2.0}, defaults())
    assert seen["together"][6:] == seen["alone"]
    assert len(set(seen["alone"])) > 1


def test_a_search_goes_on_where_it_ended(engine: Any, greedy: dict[str, str], tmp_path: Path) -> None:
    whole = search(engine, likeness(greedy), 4)
    search(engine, likeness(greedy), 4, checkpoint=tmp_path / "search.npz", progress=stop)
    resumed = search(engine, likeness(greedy), 4, checkpoint=tmp_path / "search.npz")
    assert (resumed.best, resumed.generations, resumed.search_score) == (whole.best, 4, whole.search_score)
    assert len(resumed.curve) == 2


def test_an_interrupted_search_is_checked(engine: Any, greedy: dict[str, str]) -> None:
    outcome = search(engine, likeness(greedy), 50, progress=stop)
    assert (outcome.generations, outcome.reason) == (2, "interrupted")
    assert outcome.scores[1] >= outcome.scores[0]


@given(st.sampled_from(sorted(RANGES)), st.floats(0, 1))
def test_a_setting_is_found_again_at_its_place(name: str, u: float) -> None:
    limits = RANGES[name]
    value = limits.value(u)
    assert limits.low <= value <= limits.high
    assert limits.value(limits.place(value)) == pytest.approx(value, abs=10.0**-limits.digits)


def test_intervals_are_students() -> None:
    differences = np.array([0.5, 0.0, 0.25, 0.25, -0.25, 0.5])
    mean, (low, high) = paired_gain(differences)
    # scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((0.2083333, -0.0983761, 0.5150428), abs=1e-6)


def test_the_defaults_are_the_models_own_where_it_has_some() -> None:
    found = defaults({"temperature": 0.2, "stop": ["x"]})
    assert (found["temperature"], found["top_k"], "stop" in found) == (0.2, 40.0, False)


def test_an_exact_answer_begins_with_the_completion() -> None:
    scorer = answer_scorer(parse_fitness("exact"))
    assert [scorer(answer, "", " yes") for answer in (" yes, it is", "yes", " no")] == [1.0, 0.0, 0.0]
    with pytest.raises(InvalidRequest, match="the fitness must be exact, json"):
        answer_scorer(Fitness("label"))


def test_few_held_out_examples_prove_nothing(engine: Any) -> None:
    sampled = Sampled(engine, lambda *_: 1.0, samples=1, max_tokens=1)
    with pytest.raises(InvalidRequest, match="at least 6 held-out examples, there are 2"):
        search_sampler(sampled, EXAMPLES, EXAMPLES[:2], GeneticAlgorithm(pop_size=4), Budget(generations=1), before=defaults())


def test_a_modelfile_has_a_line_for_each_setting() -> None:
    text = modelfile("smollm2:135m", {"temperature": 0.25, "top_k": 12.0})
    assert text == "FROM smollm2:135m\nPARAMETER temperature 0.25\nPARAMETER top_k 12\n"


# The command.


@pytest.fixture
def optimize(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``tars optimize --space sampler`` on the tiny model, into the folder ``out``; gives the result."""
    from typer.testing import CliRunner

    from tars_jax.cli import make_app

    monkeypatch.setattr("tars_jax.loaders.opening.load", lambda name: MODEL)
    monkeypatch.setattr("tars_jax.evolve.sampler_search.serving", lambda *_: contextlib.nullcontext(engine))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    data = str(tmp_path / "data.jsonl")
    fixed = ["optimize", "tiny", "--space", "sampler", "--data", data, "--eval", data, "--out", str(tmp_path / "out")]
    small = ["--fitness", "regex:.*[a-m]", "--population", "4", "--batch", "2", "--generations", "1", "--max-new-tokens", "2"]
    return lambda *words: CliRunner().invoke(make_app(), [*fixed, *small, *words])


def test_the_command_writes_its_result_and_resumes(optimize: Any, tmp_path: Path) -> None:
    result = optimize()
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["generations"], report["answers"]) == (1, 4 * 2 * 2 + 2 * len(LINES) * 2)
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM tiny"
    assert len(lines) == 1 + len(RANGES)
    assert "holds the result of a run" in str(optimize().exception)
    assert "other settings: seed 0" in str(optimize("--resume", "--seed", "3").exception)
    assert optimize("--resume").exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["generations"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fitness", "label"], "the fitness must be exact"),
        (["--strategy", "eggroll"], "must be one of"),
        (["--sigma", "0.1", "--evaluate-every", "1"], "--sigma, --evaluate-every: only for a search of weights"),
    ],
)
def test_the_command_refuses_what_does_not_suit(optimize: Any, words: list[str], message: str) -> None:
    assert message in str(optimize(*words).exception)
