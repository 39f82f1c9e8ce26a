"""The default model learns to answer in one word, keeps its other text, and an engine with the exported adapter does the same."""

import dataclasses
from pathlib import Path
from typing import Any

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.adapters import apply_adapter
from tars_jax.evolve import job
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.evaluation import MAX_GENERAL_RISE
from tars_jax.evolve.evolution import Evolution
from tars_jax.evolve.sentiment import sentiment_task
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.opening import read_adapter


def test_the_default_model_learns_a_format(smollm2: Any, tmp_path: Path) -> None:
    train, lines = sentiment_task()
    evolution = Evolution(smollm2, encode_examples(train, smollm2), Settings())
    held_out = evolution.hold_out(encode_examples(lines, smollm2))
    *_, outcome = job.search(evolution, held_out, job.Budget(generations=6, target=0.95))
    assert outcome.before.exact < 0.05
    assert outcome.after is not None
    assert outcome.after.exact >= 0.9
    assert outcome.after.general_loss <= outcome.before.general_loss * (1 + MAX_GENERAL_RISE)
    job.save(tmp_path, evolution, outcome)
    params = apply_adapter(smollm2.params, read_adapter(tmp_path / "adapter.gguf", smollm2.config))
    engine = Engine(dataclasses.replace(smollm2, params=params), EngineConfig(max_context=256, max_rows=1, max_step_tokens=64))
    greedy = SamplingParams(temperature=0, max_tokens=1)
    right = sum("".join(engine.generate(line["prompt"], greedy)) == line["completion"] for line in lines[:40])
    engine.close()
    assert right >= 34
