"""The default model, end to end, against what llama.cpp recorded on the same file."""

import dataclasses
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tars_jax import Engine, EngineConfig, SamplingParams, kernels, load
from tars_jax.engine.request import Output, Request, TokenLogprob, new_request_id
from tars_jax.errors import ContextOverflow, InvalidRequest, ServerBusy, TarsError
from tars_jax.perplexity import log_probabilities, perplexity

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no CPU kernels: {kernels.unavailable_reason()}")
GREEDY = SamplingParams(max_tokens=24, temperature=0)
MANY = EngineConfig(max_context=256, max_rows=40, max_step_tokens=128, cache_tokens=16384)  # one shape for all: compiled once


def collect(engine: Engine, prompt: str, params: SamplingParams) -> list[Output]:
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    engine.submit(Request(new_request_id(), tuple(engine.model.tokenizer.encode(prompt)), params, outputs.put))
    answers = [outputs.get(timeout=120)]
    while answers[-1].finish_reason is None:
        answers.append(outputs.get(timeout=120))
    return answers


@pytest.fixture(scope="module")
def dense(smollm2_path: Path) -> Any:
    return load(smollm2_path, weights="dense")


@pytest.fixture(scope="module")
def teacher_forced(smollm2: Any, golden: dict[str, Any]) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Our log-probabilities of the recorded continuations, and both records, for each of the 8 prompts."""
    result = []
    for i, entry in enumerate(golden["f16"]["greedy"]):
        for kind in golden:
            recorded = golden[kind]["greedy"][i]
            logits = smollm2.logits(recorded["prompt_ids"] + recorded["tokens"])[len(entry["prompt_ids"]) - 1 : -1]
            result.append((kind, logits, recorded))
    return result


@pytest.mark.parametrize(("kind", "limit"), [("f16", 0.01), ("q4_1", 0.05)])
def test_log_probabilities_agree_with_llama_cpp(teacher_forced: Any, kind: str, limit: float) -> None:
    differences = [
        np.abs(log_probabilities(logits, recorded["tokens"]) - [entry["logprob"] for entry in recorded["logprobs"]]).mean()
        for which, logits, recorded in teacher_forced
        if which == kind
    ]
    assert len(differences) == 8
    assert np.mean(differences) < limit


def test_first_greedy_tokens_agree_with_llama_cpp(teacher_forced: Any) -> None:
    for _, logits, recorded in teacher_forced:
        assert int(logits[0].argmax()) == recorded["tokens"][0]


@pytest.mark.parametrize("form", ["packed", pytest.param("tiled", marks=needs_kernels)])
def test_every_form_of_the_weights_gives_the_same_logits(dense: Any, smollm2_path: Path, form: Any) -> None:
    model = load(smollm2_path, weights=form)
    ids = dense.tokenizer.encode("The lighthouse at the end of the breakwater")
    assert model.nbytes < dense.nbytes / 4
    np.testing.assert_allclose(model.logits(ids), dense.logits(ids), atol=2e-3)


@needs_kernels
def test_perplexity_with_kernels_stays_near_the_plain_path(smollm2: Any) -> None:
    text = (Path(__file__).parents[1] / "golden" / "perplexity.txt").read_text()
    assert perplexity(smollm2, text, context=512, exact=False) == pytest.approx(22.466, rel=0.005)


def test_the_plain_engine_writes_llama_cpps_text(dense: Any, golden: dict[str, Any]) -> None:
    """A token a step: XLA takes 20 s for each size of step of so many plain layers."""
    entry, engine = golden["f16"]["greedy"][0], Engine(dense, EngineConfig(max_context=128, max_rows=1, max_step_tokens=1))
    text = "".join(engine.generate(entry["prompt"], SamplingParams(max_tokens=48, temperature=0)))
    engine.close()
    assert text == entry["text"]


def test_perplexity_agrees_with_llama_cpp(smollm2: Any) -> None:
    text = (Path(__file__).parents[1] / "golden" / "perplexity.txt").read_text()
    assert perplexity(smollm2, text, context=512) == pytest.approx(22.46, rel=0.003)


def test_the_engine_writes_what_the_logits_say(smollm2: Any, golden: dict[str, Any]) -> None:
    """`Model.logits` keeps keys and values in float32; so does this engine."""
    engine = Engine(smollm2, dataclasses.replace(MANY, cache_dtype="float32"))
    for entry in golden["f16"]["greedy"][:3]:
        text = "".join(engine.generate(entry["prompt"], GREEDY))
        ids = entry["prompt_ids"] + smollm2.tokenizer.encode(text)
        logits = smollm2.logits(ids, exact=False)[len(entry["prompt_ids"]) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids[len(entry["prompt_ids"]) :]
    engine.close()


def test_an_answer_is_the_same_alone_and_among_others(smollm2_engine: Engine, golden: dict[str, Any]) -> None:
    prompts = [entry["prompt"] for entry in golden["f16"]["greedy"]]
    params = [SamplingParams(max_tokens=12, temperature=0.7 if i % 2 else 0, seed=i) for i in range(len(prompts))]
    alone = ["".join(smollm2_engine.generate(*pair)) for pair in zip(prompts, params, strict=True)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda pair: "".join(smollm2_engine.generate(*pair)), zip(prompts, params, strict=True)))
    assert together == alone


@needs_kernels
def test_probabilities_are_the_same_bits_however_the_prompt_was_cut(smollm2: Any, smollm2_engine: Engine, golden: dict[str, Any]) -> None:
    """In one chunk, in chunks of 16 tokens, and beside seven others."""
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=True, top_logprobs=5)
    prompt = " ".join(entry["text"] for entry in golden["f16"]["greedy"][:2])

    def probabilities(engine: Engine) -> list[TokenLogprob]:
        return [entry for output in collect(engine, prompt, params) for entry in output.logprobs]

    alone = probabilities(smollm2_engine)
    others = [smollm2_engine.generate(entry["prompt"], GREEDY) for entry in golden["f16"]["greedy"][:7]]
    for other in others:
        next(other)
    assert probabilities(smollm2_engine) == alone
    for other in others:
        other.close()
    chunked = Engine(smollm2, dataclasses.replace(MANY, max_step_tokens=16))
    assert probabilities(chunked) == alone
    chunked.close()


WAYS = {
    "prefixes are reused": dataclasses.replace(MANY, prompt_lookup=False),
    "tokens are guessed": dataclasses.replace(MANY, prefix_cache=False),
    "prompts are cut": dataclasses.replace(MANY, max_step_tokens=32),
    "requests are preempted": dataclasses.replace(MANY, cache_tokens=512, max_step_tokens=64),
}


@pytest.fixture(scope="module")
def alone(smollm2: Any, golden: dict[str, Any]) -> list[str]:
    """Answers given one after the other, with nothing reused or guessed."""
    engine = Engine(smollm2, dataclasses.replace(MANY, prefix_cache=False, prompt_lookup=False))
    answers = ["".join(engine.generate(prompt, params)) for prompt, params in questions(golden)]
    engine.close()
    return answers


def questions(golden: dict[str, Any]) -> list[tuple[str, SamplingParams]]:
    """Golden prompts with the same beginning, greedy and sampled, one that repeats itself among them."""
    begin = "You are asked to continue a text in the style in which it begins, with words that anybody can understand. Here it is. "
    prompts = [begin + entry["prompt"] for entry in golden["f16"]["greedy"][:4]] + [begin + "one two three four " * 3]
    params = [SamplingParams(max_tokens=24, temperature=t, seed=7, ignore_eos=True) for t in (0, 0.8)]
    return [(prompt, p) for prompt in prompts for p in params]


@needs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_same_alone_and_among_32_others(smollm2: Any, golden: dict[str, Any], alone: list[str], way: str) -> None:
    engine = Engine(smollm2, WAYS[way])
    asked = questions(golden)
    others = [(prompt, dataclasses.replace(params, temperature=1.0, seed=i)) for i, (prompt, params) in enumerate(asked * 4)][:32]
    with ThreadPoolExecutor(len(asked) + len(others)) as pool:
        answers = list(pool.map(lambda pair: "".join(engine.generate(*pair)), [*others, *asked]))[len(others) :]
    stats = engine.stats()
    engine.close()
    assert answers == alone
    assert stats.free_pages == stats.num_pages - 1
    assert (stats.reused_tokens > 0) == ("guessed" not in way)
    assert (stats.preemptions > 0) == ("preempted" in way)
    assert stats.accepted_tokens > 0 or "guessed" not in way


def test_seeds_repeat_and_differ(smollm2_engine: Engine) -> None:
    def answer(seed: int) -> str:
        return "".join(smollm2_engine.generate("My favourite animal is", SamplingParams(max_tokens=12, temperature=1.0, seed=seed)))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_stop_strings_never_show(smollm2_engine: Engine) -> None:
    whole = "".join(smollm2_engine.generate("Once upon a time", GREEDY))
    stop = whole[10:14]
    assert "".join(smollm2_engine.generate("Once upon a time", SamplingParams(max_tokens=24, temperature=0, stop=(stop,)))) == whole[:10]


def test_logprobs_come_with_the_tokens(smollm2_engine: Engine, golden: dict[str, Any]) -> None:
    entry = golden["f16"]["greedy"][0]
    outputs = collect(smollm2_engine, entry["prompt"], SamplingParams(max_tokens=4, temperature=0, logprobs=True, top_logprobs=2))
    got = [logprob for output in outputs for logprob in output.logprobs]
    assert [logprob.token_id for logprob in got] == entry["tokens"][:4]
    for ours, theirs in zip(got, entry["logprobs"], strict=False):
        assert ours.logprob == pytest.approx(theirs["logprob"], abs=0.2)  # the engine's activations have 8 bits
        assert ours.top[0] == (ours.token_id, pytest.approx(ours.logprob, abs=1e-5))


def test_json_format_gives_a_json_object(smollm2_engine: Engine) -> None:
    import json

    properties = '{"name":{"type":"string","maxLength":12},"age":{"type":"integer","maximum":99}}'
    schema = f'{{"type":"object","properties":{properties},"required":["name","age"]}}'
    prompt = smollm2_engine.model.chat_prompt([{"role": "user", "content": "Who are you? Answer in JSON."}])
    for seed in range(3):
        params = SamplingParams(max_tokens=80, temperature=1.5, seed=seed, grammar=schema)
        answer = json.loads("".join(smollm2_engine.generate(prompt, params)))
        assert set(answer) == {"name", "age"}


def test_usage_counts_prompt_and_answer(smollm2_engine: Engine) -> None:
    usage = collect(smollm2_engine, "Once upon a time", SamplingParams(max_tokens=5, temperature=0))[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.output_tokens) == (4, 5)
    assert usage.prefill_seconds > 0
    assert usage.decode_seconds > 0


def test_a_cancelled_request_frees_its_pages(smollm2_engine: Engine) -> None:
    stream = smollm2_engine.generate("Once upon a time", SamplingParams(max_tokens=200, temperature=0))
    next(stream)
    stream.close()
    assert "".join(smollm2_engine.generate("Hello", SamplingParams(max_tokens=2, temperature=0)))
    stats = smollm2_engine.stats()
    assert stats.free_pages == stats.num_pages - 1


def test_a_failed_step_ends_its_requests_and_later_ones_work(smollm2_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "".join(smollm2_engine.generate("Once upon a time", GREEDY))
    monkeypatch.setattr(smollm2_engine, "_dispatch", lambda plan: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(TarsError, match="device lost"):
        list(smollm2_engine.generate("Once upon a time", GREEDY))
    monkeypatch.undo()
    assert "".join(smollm2_engine.generate("Once upon a time", GREEDY)) == before


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(smollm2_engine: Engine) -> None:
    with pytest.raises(ContextOverflow, match=r"300 tokens.*256"):
        list(smollm2_engine.generate([1] * 300, GREEDY))


def test_an_empty_prompt_and_a_foreign_token_are_refused(smollm2_engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        list(smollm2_engine.generate([], GREEDY))
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        list(smollm2_engine.generate([10**6], GREEDY))


def test_a_full_queue_refuses(smollm2: Any) -> None:
    engine = Engine(smollm2, EngineConfig(max_context=64, max_queue=0))
    with pytest.raises(ServerBusy):
        list(engine.generate("Hello", GREEDY))
    engine.close()


def test_three_devices_write_what_one_does(dense: Any, golden: dict[str, Any]) -> None:
    """The first layers of the model: all are alike to a mesh, and thirty take XLA half a minute."""
    config, params = dataclasses.replace(dense.config, num_layers=3), dense.params.replace(layers=dense.params.layers[:3])
    small, texts = dataclasses.replace(dense, config=config, params=params), []
    for devices in (1, 3):
        engine = Engine(small, EngineConfig(max_context=128, max_rows=1, prompt_lookup=False, tensor_parallel=devices))
        texts.append("".join(engine.generate(golden["f16"]["greedy"][0]["prompt_ids"], SamplingParams(max_tokens=12, temperature=0))))
        engine.close()
    assert texts[0] == texts[1]
