"""Where `tars bench` says the time goes. What it measures is not tested, only that it is measured."""

import json
import math
from typing import Any

import pytest
from typer.testing import CliRunner

from tars_jax.bench import Rate, Report, Roofline, measure_bandwidth, measure_roofline, measure_stages
from tars_jax.cli import make_app
from tests.tiny import tiny_model

STAGES = ["tokenise", "embed", "blocks", "output head and sampling", "detokenise"]


def test_every_stage_of_a_request_is_timed() -> None:
    model = tiny_model()
    for count in (1, 20):
        stages = measure_stages(model, count, repetitions=3)
        assert list(stages) == STAGES
        assert all(ms >= 0 for ms in stages.values())
        assert stages["output head and sampling"] > 0


def test_the_roofline_counts_bytes_and_products_of_the_weights() -> None:
    model = tiny_model()
    config = model.config
    in_block = (
        2 * config.hidden_size**2 + 2 * config.hidden_size * config.hidden_size // 2 + 3 * config.hidden_size * config.intermediate_size
    )
    roofline = measure_roofline(model, 8, prefill=100.0, decode=dict.fromkeys(STAGES, 1.0))
    assert roofline.macs_per_token == config.num_layers * in_block
    assert roofline.bytes_per_token == 4 * (roofline.macs_per_token + config.vocab_size * config.hidden_size)
    assert math.isclose(roofline.decode_share * roofline.bandwidth_gb, roofline.bytes_per_token / 2e-3 / 1e9)
    assert math.isclose(roofline.prefill_share * roofline.gmacs, 100.0 * roofline.macs_per_token / 1e9)


def test_bandwidth_is_a_rate() -> None:
    assert 0.1 < measure_bandwidth(megabytes=16) < 100_000


def report(prompt_tokens: int, new_tokens: int, batches: list[int]) -> Report:
    roofline = Roofline(bandwidth_gb=10, bytes_per_token=1e8, decode_share=0.5, gmacs=100, macs_per_token=1e8, prefill_share=0.5)
    decode = {batch: Rate((100.0 * batch,) * 3) for batch in batches}
    stages = {name: dict.fromkeys(STAGES, 1.0) for name in ("prefill", "decode")}
    return Report(prompt_tokens, new_tokens, Rate((1000.0, 1010.0, 1030.0)), decode, 1.5, 321.0, stages, roofline)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `tars bench` asks to be measured; nothing is."""
    found: dict[str, Any] = {}

    def measure(model: Any, **what: Any) -> Report:
        found.update(what, model=model)
        return report(what["prompt_tokens"], what["new_tokens"], what["batches"])

    monkeypatch.setattr("tars_jax.bench.measure", measure)
    monkeypatch.setattr("tars_jax.loaders.opening.load", lambda name: f"model {name}")
    return found


def test_the_command_prints_its_contract(asked: dict[str, Any]) -> None:
    result = CliRunner().invoke(make_app(), ["bench", "--model", "m", "-p", "512", "-n", "64", "-b", "1,16", "--json"])
    assert result.exit_code == 0
    assert (asked["model"], asked["prompt_tokens"], asked["new_tokens"], asked["batches"]) == ("model m", 512, 64, [1, 16])
    printed = json.loads(result.stdout)
    assert (printed["prefill_tokens_per_second"], printed["prefill_spread"]) == (1010.0, 15.0)
    assert printed["decode_tokens_per_second"] == {"1": 100.0, "16": 1600.0}
    assert (printed["startup_seconds"], printed["peak_rss_mb"]) == (1.5, 321.0)


def test_the_command_without_a_model_says_what_is_missing(asked: dict[str, Any]) -> None:
    result = CliRunner().invoke(make_app(), ["bench", "-p", "8"])
    assert result.exit_code == 2
    assert "--model" in result.stderr
    assert not asked
