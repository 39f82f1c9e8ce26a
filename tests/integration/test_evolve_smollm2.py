"""The default model learns to answer in one word and keeps its other text; a server that loads the exported adapter answers the same."""

import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import serving

from api.app import create_app
from api.models import Models
from api.settings import Settings as ServerSettings
from tars_jax import Engine, EngineConfig
from tars_jax.evolve import job
from tars_jax.evolve.data import encode_examples
from tars_jax.evolve.evaluation import MAX_GENERAL_RISE
from tars_jax.evolve.evolution import Evolution
from tars_jax.evolve.scoring import score
from tars_jax.evolve.sentiment import sentiment_task
from tars_jax.evolve.settings import Settings
from tars_jax.loaders.adapted import save_adapted
from tars_jax.store import Store


def right(url: str, model: str, lines: list[dict[str, str]]) -> int:
    """Held-out prompts whose answer of one token is the completion."""
    count = 0
    with httpx.Client(base_url=url, timeout=300) as client:
        for line in lines:
            body = {"model": model, "prompt": line["prompt"], "raw": True, "stream": False, "options": {"temperature": 0, "num_predict": 1}}
            count += client.post("/api/generate", json=body).json()["response"] == line["completion"]
    return count


def test_the_default_model_learns_a_format(smollm2: Any, smollm2_store: Store, tmp_path: Path) -> None:
    train, lines = sentiment_task()
    evolution = Evolution(smollm2, encode_examples(train, smollm2), Settings())
    held_out = evolution.hold_out(encode_examples(lines, smollm2))
    *_, outcome = job.search(evolution, held_out, job.Budget(generations=6, target=0.95))
    assert outcome.before.exact < 0.05
    assert outcome.after is not None
    assert outcome.after.exact >= 0.9
    assert outcome.after.general_loss <= outcome.before.general_loss * (1 + MAX_GENERAL_RISE)
    job.save(tmp_path / "found", evolution, outcome)

    shutil.copytree(smollm2_store.root, tmp_path / "models", copy_function=os.link)
    store = Store(tmp_path / "models")
    save_adapted(store, "smollm2:135m", [tmp_path / "found" / "adapter.gguf"], "tuned")
    small = EngineConfig(max_context=256, max_rows=1, max_step_tokens=32)
    models = Models(store, ServerSettings(context_length=256), make_engine=lambda model, config: Engine(model, small))
    with serving(create_app(models.settings, models)) as url:
        before, after = (right(url, model, lines[:60]) for model in ("smollm2:135m", "tuned"))
    print(f"through /api/generate: {before} of 60 right before, {after} after")
    assert before <= 6
    assert after >= 54


def test_random_search_falls_behind_at_the_same_number_of_evaluations(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, lines = (encode_examples(items, smollm2) for items in sentiment_task())
    scored: list[tuple[int, int]] = []  # members and examples of every slice

    def count(*args: Any, members: int, **fixed: Any) -> Any:
        if members > 1:  # held-out examples have one
            scored.append((members, len(args[2].sizes)))
        return score(*args, members=members, **fixed)

    monkeypatch.setattr("tars_jax.evolve.evolution.score", count)
    found, evaluations = {}, {}
    for name, sigma in (("eggroll", 0.02), ("random", 0.05)):  # 0.05 is random search's best of 0.02, 0.05 and 0.1
        scored.clear()
        evolution = Evolution(smollm2, train, Settings(strategy=name, sigma=sigma))  # type: ignore[arg-type]
        state = evolution.init()
        for _ in range(6):
            state, _ = evolution.generation(state)
        evaluations[name] = sum(members * examples for members, examples in scored)
        found[name] = evolution.evaluate(evolution.centre(state), evolution.hold_out(lines)).exact
    print(f"after {evaluations} evaluations: {found}")
    assert evaluations == dict.fromkeys(found, 6 * 32 * 6)
    assert found["eggroll"] > 0.9
    assert found["random"] < 0.75
