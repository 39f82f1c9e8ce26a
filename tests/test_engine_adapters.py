"""Requests with different adapters, or none, share steps; each gets what its own adapters alone would give it."""

import dataclasses
import queue
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams
from tars_jax.adapters import Adapter, Update, apply_adapter
from tars_jax.engine.adapters import AdapterSlots
from tars_jax.engine.request import Output
from tars_jax.errors import InvalidRequest
from tars_jax.model import leaf_name, spec
from tars_jax.perplexity import log_probabilities
from tests.test_engine import finish
from tests.test_engine import start as start_request
from tests.tiny import CONFIG as MODEL
from tests.tiny import tiny_model

GREEDY = SamplingParams(max_tokens=16, temperature=0, logprobs=True)
CONFIG = EngineConfig(max_context=128, max_rows=4, max_step_tokens=16, cache_dtype="float32")
PROMPT = "tell me a story about"
MATRICES = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(spec(MODEL))[0] if len(leaf.shape) == 2}
PARTS = ("q", "v", "o", "gate", "down")


def adapter(seed: int, rank: int = 4, parts: tuple[str, ...] = PARTS) -> Adapter:
    rng = np.random.default_rng(seed)
    names = [name for name in MATRICES if name.rsplit(".", 1)[-1] in parts]
    shapes = {name: MATRICES[name] for name in names}
    return Adapter(
        {
            name: Update(rng.normal(size=(o, rank)).astype(np.float32), rng.normal(size=(rank, k)).astype(np.float32), 0.2 / rank)
            for name, (o, k) in shapes.items()
        }
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(tiny_model(), CONFIG)
    yield engine
    engine.close()


def start(engine: Engine, *adapters: tuple[str, float], params: SamplingParams = GREEDY) -> "queue.SimpleQueue[Output]":
    return start_request(engine, PROMPT, params, adapters)


def answer(outputs: "queue.SimpleQueue[Output]") -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities."""
    found = finish(outputs)
    assert found[-1].finish_reason == "length"
    logprobs = [entry for output in found for entry in output.logprobs]
    return [entry.token_id for entry in logprobs], [entry.logprob for entry in logprobs]


def check(model: Any, found: tuple[list[int], list[float]], *adapters: tuple[Adapter, float]) -> None:
    """The greedy answer and its log-probabilities are those of the model whose weights have these adapters for good."""
    params = model.params
    for one, strength in adapters:
        params = apply_adapter(params, one, strength)
    prompt = model.tokenizer.encode(PROMPT)
    logits = dataclasses.replace(model, params=params).logits(prompt + found[0])[len(prompt) - 1 : -1]
    assert logits.argmax(1).tolist() == found[0]
    np.testing.assert_allclose(log_probabilities(logits, found[0]), found[1], atol=1e-3)


def test_every_row_has_its_own_adapters(engine: Engine) -> None:
    first, second = adapter(1, rank=4), adapter(2, rank=2, parts=("k", "up", "down"))
    engine.add_adapter("first", first)
    engine.add_adapter("second", second)
    streams = [
        start(engine),
        start(engine, ("first", 1.0)),
        start(engine, ("second", 0.5)),
        start(engine, ("second", 1.0), ("first", -0.5)),
    ]
    answers = [answer(stream) for stream in streams]
    assert len({tuple(ids) for ids, _ in answers}) == 4  # each adapter matters
    check(engine.model, answers[0])
    check(engine.model, answers[1], (first, 1.0))
    check(engine.model, answers[2], (second, 0.5))
    check(engine.model, answers[3], (second, 1.0), (first, -0.5))


def test_a_first_adapter_changes_no_bit_of_other_streams(engine: Engine) -> None:
    long = SamplingParams(max_tokens=90, temperature=0, logprobs=True)
    expected = answer(start(engine, params=long))
    outputs = start(engine, params=long)
    head = outputs.get(timeout=120)
    engine.add_adapter("first", adapter(1))
    neighbour = start(engine, ("first", 1.0))
    ids, logprobs = answer(outputs)
    assert ([*head.token_ids, *ids], [head.logprobs[0].logprob, *logprobs]) == expected
    finish(neighbour)
    assert answer(start(engine, params=long)) == expected


def test_adding_another_within_the_ranks_compiles_nothing(engine: Engine) -> None:
    engine.add_adapter("first", adapter(1, rank=4))
    programs = engine._runner._weights.compiled.steps
    engine.add_adapter("second", adapter(2, rank=4))
    assert engine._runner._weights.compiled.steps is programs
    engine.add_adapter("third", adapter(3, rank=4))
    assert engine._runner._weights.compiled.steps is not programs


def test_a_removed_adapter_serves_those_under_way_and_nobody_else(engine: Engine) -> None:
    engine.add_adapter("first", adapter(1))
    long = SamplingParams(max_tokens=90, temperature=0, logprobs=True)
    expected = answer(start(engine, ("first", 1.0), params=long))
    outputs = start(engine, ("first", 1.0), params=long)
    head = outputs.get(timeout=120)
    engine.remove_adapter("first")
    engine.add_adapter("second", adapter(2))  # must not take the first one's place yet
    with pytest.raises(InvalidRequest, match="no adapter 'first'; it has second"):
        start(engine, ("first", 1.0))
    ids, _ = answer(outputs)
    assert [*head.token_ids, *ids] == expected[0]
    check(engine.model, answer(start(engine, ("second", 1.0))), (adapter(2), 1.0))


def test_prefixes_are_shared_within_one_set_of_adapters(engine: Engine) -> None:
    """Keys and values depend on the adapters: an answer with one must not begin with pages of another."""
    engine.add_adapter("first", adapter(1))
    check(engine.model, answer(start(engine)))
    check(engine.model, answer(start(engine, ("first", 1.0))), (adapter(1), 1.0))
    engine.add_adapter("first", adapter(2))
    check(engine.model, answer(start(engine, ("first", 1.0))), (adapter(2), 1.0))
    other = tiny_model(seed=1)
    assert engine.swap(other.params) == 2
    check(other, answer(start(engine, ("first", 1.0))), (adapter(2), 1.0))


def test_an_adapter_of_another_model_is_refused(engine: Engine) -> None:
    wrong = Adapter({"layers.0.q": Update(np.ones((8, 1), np.float32), np.ones((1, 8), np.float32))})
    with pytest.raises(InvalidRequest, match="does not fit this model"):
        engine.add_adapter("wrong", wrong)


def test_slots_are_reused_when_nobody_needs_them() -> None:
    slots = AdapterSlots().adding("a", adapter(1, rank=4), ()).adding("b", adapter(2, rank=4), ())
    assert [(slot.start, slot.stop) for slot in slots.named.values()] == [(0, 4), (4, 8)]
    held = slots.removing("a").adding("c", adapter(3, rank=3), {1})
    assert (held.named["c"].start, held.ranks) == (8, 16)
    free = slots.removing("a").adding("c", adapter(3, rank=3), ())
    assert (free.named["c"].start, free.ranks) == (0, 8)
