"""`tars bench optim`, and that `tars bench` alone still measures a model."""

import json

import pytest
from typer.testing import CliRunner

from tars_jax.cli import make_app


def test_bench_optim_prints_percentiles_of_every_stage_and_their_sum() -> None:
    result = CliRunner().invoke(make_app(), ["bench", "optim", "--cycles", "20", "--population", "8", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert list(report["ms"]) == ["genetic algorithm", "simulated annealing", "Monte Carlo", "cycle"]
    assert all(0 < row["p50"] <= row["p95"] <= row["p99"] for row in report["ms"].values())
    assert [row["limit"] for row in report["ms"].values()] == [5, 3, 2, 10]
    assert report["last"] < report["first"]


@pytest.mark.parametrize(("arguments", "code"), [(["bench"], 2), (["bench", "optim", "--cycles", "3"], 1)])
def test_bench_says_what_is_missing(arguments: list[str], code: int) -> None:
    assert CliRunner().invoke(make_app(), arguments).exit_code == code
