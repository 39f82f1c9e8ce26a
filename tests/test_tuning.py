"""Tuning: noise changes nothing, a real gain is found and proven, its file reaches the server or is refused."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from api.settings import Settings
from tars_jax import cli
from tars_jax.config import EngineConfig
from tars_jax.errors import InvalidRequest
from tars_jax.intervals import mean_interval
from tars_jax.load_test.workload import Lengths
from tars_jax.tuning.knobs import KNOBS, Value, read_knobs, write_knobs
from tars_jax.tuning.measure import Engines, Load, Measurement
from tars_jax.tuning.tuner import Outcome, Tuner, rows
from tests.tiny import tiny_model


class FakeMachine:
    """Rates by setting, with noise and a drift; a measurement takes a second of its own clock."""

    def __init__(self, gains: Mapping[tuple[str, Value], float], *, noise: float = 0.05, gaps: Mapping[str, float] | None = None) -> None:
        self.gains, self.noise, self.gaps = gains, noise, gaps or {}
        self.random, self.now = np.random.default_rng(0), 0.0

    def measure(self, knobs: Mapping[str, Value], seed: int) -> Measurement:
        self.now += 1.0
        rate = 100.0 * math.prod(self.gains.get(item, 1.0) for item in knobs.items())
        drift = 1 + 0.3 * math.sin(self.now / 40)  # the machine is shared: pairs see it alike
        noise = math.exp(self.noise * self.random.standard_normal())
        return Measurement(rate * drift * noise, max([0.05, *(self.gaps.get(name, 0.0) for name in knobs)]))

    def tune(self, seconds: float = 300.0, **settings: float) -> Outcome:
        return Tuner(self.measure, seconds=seconds, clock=lambda: self.now, **settings).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_keeps_the_defaults(seed: int) -> None:
    machine = FakeMachine({})
    machine.random = np.random.default_rng(100 + seed)
    outcome = machine.tune(seed=seed)
    assert outcome.knobs == {}
    assert outcome.searched > 5
    assert outcome.trials  # the search had its suspicions
    assert all(trial.refused for trial in outcome.trials)


def test_a_planted_gain_is_taken_with_its_interval() -> None:
    outcome = FakeMachine({("page_size", 32): 1.3}).tune()
    assert outcome.knobs == {"page_size": 32}
    trial = next(trial for trial in outcome.trials if trial.knobs == {"page_size": 32})
    assert trial.interval[0] < 1.3 < trial.interval[1]
    assert trial.interval[0] > 1.1


def test_gains_are_proven_together_too() -> None:
    outcome = FakeMachine({("page_size", 32): 1.3, ("prompt_lookup", False): 1.25}).tune(600)
    assert outcome.knobs == {"page_size": 32, "prompt_lookup": False}
    assert outcome.trials[-1].knobs == outcome.knobs
    assert outcome.trials[-1].ratio == pytest.approx(1.3 * 1.25, rel=0.1)


def test_a_gain_that_breaks_the_latency_bound_is_none() -> None:
    outcome = FakeMachine({("page_size", 32): 2.0}, gaps={"page_size": 0.5}).tune()
    assert "page_size" not in outcome.knobs
    assert "page_size" in FakeMachine({("page_size", 32): 2.0}, gaps={"page_size": 0.5}).tune(max_gap=1.0).knobs


def test_without_time_for_the_proof_the_default_stays() -> None:
    outcome = FakeMachine({("page_size", 32): 1.3}).tune(12)
    assert outcome.knobs == {}
    assert outcome.seconds < 20


def test_an_interrupt_keeps_what_is_proven() -> None:
    machine = FakeMachine({("page_size", 32): 1.3, ("prompt_lookup", False): 1.25})
    proven: list[str] = []

    def progress(what: str, seconds: float) -> None:
        proven.append(what)
        if len({line.split(":")[0] for line in proven if line.startswith("proving")}) > 1:
            raise KeyboardInterrupt

    outcome = Tuner(machine.measure, seconds=600, clock=lambda: machine.now, progress=progress).run()
    assert outcome.interrupted
    assert len(outcome.trials) == 1


def test_every_knob_has_a_row() -> None:
    outcome = FakeMachine({("page_size", 32): 1.3}).tune()
    shown = " ".join(row[0] for row in rows(outcome))
    assert all(knob.name in shown for knob in KNOBS)


def test_the_defaults_are_among_the_values_tried() -> None:
    assert all(knob.default in knob.values for knob in KNOBS)
    assert all(knob.allows(value) for knob in KNOBS for value in knob.values)


@pytest.mark.parametrize("strategy", ["annealing", "montecarlo", "hybrid"])
def test_other_strategies_find_the_gain(strategy: str) -> None:
    machine = FakeMachine({("page_size", 32): 1.5})
    outcome = Tuner(machine.measure, seconds=400, clock=lambda: machine.now, strategy=strategy).run()
    assert outcome.knobs.get("page_size") == 32


def test_settings_come_back_from_their_file_and_reach_the_engine(tmp_path: Path) -> None:
    knobs: dict[str, Value] = {"max_step_tokens": 256, "prompt_lookup": False, "target_inter_token_ms": 50.0}
    path = tmp_path / "tuned.toml"
    write_knobs(path, 'a "model"\\', knobs, ["SETTING  95 %", ""])
    assert read_knobs(path) == knobs
    engine = Settings.from_environ({"TARS_TUNED": str(path)}).engine(512)
    assert (engine.max_step_tokens, engine.prompt_lookup, engine.target_inter_token_ms, engine.max_context) == (256, False, 50.0, 512)


def test_an_environment_variable_of_its_own_beats_the_file(tmp_path: Path) -> None:
    write_knobs(tmp_path / "tuned.toml", "m", {"prompt_lookup": False, "target_inter_token_ms": 50.0})
    environ = {"TARS_TUNED": str(tmp_path / "tuned.toml"), "TARS_PROMPT_LOOKUP": "1", "TARS_INTER_TOKEN_MS": "70"}
    engine = Settings.from_environ(environ).engine(512)
    assert (engine.prompt_lookup, engine.target_inter_token_ms) == (True, 70)


def test_without_a_file_the_engine_has_its_defaults() -> None:
    assert Settings().engine(512) == EngineConfig(max_context=512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nmax_rows = 3\nspeed = 9", "unknown setting 'max_rows'.*unknown setting 'speed'"),
        ("[engine]\npage_size = 17", "page_size must be a power of two between 8 and 256, got 17"),
        ("[engine]\npage_size = true", "page_size must be a power of two"),
        ("[engine]\nprompt_lookup = 1", "prompt_lookup must be true or false, got 1"),
        ("[engine]\ntarget_inter_token_ms = nan", "target_inter_token_ms must be a number"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("engine = 3", "engine must be a table"),
        ("engine = [", "is no file of engine settings"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tuned.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        Settings.from_environ({"TARS_TUNED": str(path)})


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read /nowhere/x\.toml: No such file"):
        Settings.from_environ({"TARS_TUNED": "/nowhere/x.toml"})


def test_a_bad_request_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="strategy 'luck' is none of genetic"):
        Tuner(lambda knobs, seed: Measurement(1, 1), strategy="luck")
    with pytest.raises(InvalidRequest, match="must be above 0"):
        Tuner(lambda knobs, seed: Measurement(1, 1), seconds=0)


def test_the_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = mean_interval(values)
    assert (low, high) == pytest.approx((2.5 - 3.182446 * 1.290994 / 2, 2.5 + 3.182446 * 1.290994 / 2), abs=1e-5)  # a table's t, 3 degrees
    assert mean_interval(values[:1]) == (-math.inf, math.inf)


def test_an_engine_is_measured_under_its_settings() -> None:
    model, load = tiny_model(), Load(clients=2, requests=3, input=Lengths.parse("4..8"), output=Lengths.parse("3..5"))
    with Engines(model, load).closing() as engines:
        found = engines.measure({"max_step_tokens": 4}, 1)
        assert found.rate > 0
        assert found.gap > 0
        assert [engine.config.max_step_tokens for engine in engines._engines.values()] == [4]
    assert not engines._engines


def test_loads_of_other_seeds_ask_other_things() -> None:
    model, load = tiny_model(), Load(clients=2, requests=3)
    assert load.prompts(model, 1) == load.prompts(model, 1)
    assert load.prompts(model, 1) != load.prompts(model, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "model", "--out", "no/folder/x.toml"], "give --out the name of a file in a folder that exists"),
        (["tune", "model", "--input", "many"], "lengths are given as 128"),
        (["serve", "--tuned", "wrong.toml"], "unknown setting 'speed'"),
    ],
)
def test_bad_options_are_one_clear_error(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("[engine]\nspeed = 9\n")
    monkeypatch.setattr(sys, "argv", ["tars", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
