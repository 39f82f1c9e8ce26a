"""Requests: environment, durations, JSON decoding, options."""

import json
import math
import re
from typing import Any

import pytest

from api.decode import decode
from api.durations import expiry, parse_duration
from api.options import merge_options
from api.schema import BadOption, ChatRequest, GenerateRequest, grammar
from api.settings import Address, Settings, parse_host
from tars_jax.errors import InvalidRequest


def generate(**fields: Any) -> GenerateRequest:
    return decode(GenerateRequest, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", Address("http", "127.0.0.1", 11434)),
        ("example.com", Address("http", "example.com", 11434)),
        ("example.com:1234", Address("http", "example.com", 1234)),
        (":1234", Address("http", "", 1234)),
        ("http://h", Address("http", "h", 80)),
        ("https://h/path", Address("https", "h", 443)),
        ("[::1]:5", Address("http", "::1", 5)),
        ("::1", Address("http", "::1", 11434)),
        ("h:66000", Address("http", "h", 11434)),
        ("h:x", Address("http", "h", 11434)),
    ],
)
def test_host(text: str, address: Address) -> None:
    assert parse_host(text) == address


def test_clients_reach_every_interface_through_loopback() -> None:
    assert parse_host("0.0.0.0:1").url == parse_host(":1").url == "http://127.0.0.1:1"
    assert parse_host("[::]:1").url == "http://[::1]:1"


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("OLLAMA_KEEP_ALIVE", "10m", "keep_alive", 600.0),
        ("OLLAMA_KEEP_ALIVE", " '90' ", "keep_alive", 90.0),
        ("OLLAMA_KEEP_ALIVE", "-1", "keep_alive", math.inf),
        ("OLLAMA_KEEP_ALIVE", "soon", "keep_alive", 300.0),
        ("OLLAMA_CONTEXT_LENGTH", "8192", "context_length", 8192),
        ("OLLAMA_CONTEXT_LENGTH", "0", "context_length", 4096),
        ("OLLAMA_MAX_QUEUE", "many", "max_queue", 512),
        ("OLLAMA_MAX_LOADED_MODELS", "0", "max_loaded_models", 3),
        ("OLLAMA_ORIGINS", "http://a, http://b", "origins", ("http://a", "http://b")),
        ("TARS_TRUSTED_PROXIES", "10.0.0.1, fd00::/8", "trusted_proxies", ("10.0.0.1/32", "fd00::/8")),
        ("TARS_TRUSTED_PROXIES", "nginx", "trusted_proxies", ()),
        ("OLLAMA_DEBUG", "true", "debug", 1),
        ("OLLAMA_DEBUG", "2", "debug", 2),
        ("OLLAMA_NOHISTORY", "anything", "no_history", True),
        ("OLLAMA_NOHISTORY", "F", "no_history", False),
    ],
)
def test_environment(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings.from_environ({name: text}), field) == value


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("10m", 600), ("1h30m", 5400), ("500ms", 0.5), ("1.5s", 1.5), ("-1m", -60), ("+2s", 2), (".5s", 0.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", 'time: invalid duration "x"'),
        ("", 'time: invalid duration ""'),
        ("1s!", 'time: unknown unit "s!" in duration "1s!"'),
        ("300", 'time: missing unit in duration "300"'),
        ("3y", 'time: unknown unit "y" in duration "3y"'),
    ],
)
def test_bad_durations(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_duration(text)


def test_forever_is_292_years() -> None:
    assert 2300 < int(expiry(math.inf)[:4]) < 2500


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b'{"model": "m"', "unexpected EOF"),
        (b'{"model": "m', "unexpected EOF"),
        (b"{", "unexpected EOF"),
        (b"nonsense", "invalid character 'n' looking for beginning of value"),
        (b"{model: 1}", "invalid character 'm' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"options": {"x": NaN}}', "invalid character 'N' looking for beginning of value"),
        (b"[]", "json: cannot unmarshal array into Go value of type api.GenerateRequest"),
        (b'{"prompt": 1}', "json: cannot unmarshal number into Go struct field GenerateRequest.prompt of type string"),
        (b'{"stream": "x"}', "json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool"),
        (b'{"context": "x"}', "json: cannot unmarshal string into Go struct field GenerateRequest.context of type []int"),
        (b'{"top_logprobs": 1.5}', "json: cannot unmarshal number 1.5 into Go struct field GenerateRequest.top_logprobs of type int"),
        (b'{"top_logprobs": true}', "json: cannot unmarshal bool into Go struct field GenerateRequest.top_logprobs of type int"),
        (b'{"options": []}', "json: cannot unmarshal array into Go struct field GenerateRequest.options of type map[string]interface {}"),
        (b'{"images": ["a!=="]}', "illegal base64 data at input byte 1"),
        (b'{"images": ["abcde"]}', "illegal base64 data at input byte 4"),
        (b'{"keep_alive": "x"}', 'time: invalid duration "x"'),
        (b'{"keep_alive": "300"}', 'time: missing unit in duration "300"'),
        (b'{"keep_alive": true}', "Unsupported type: 'bool'"),
        (b'{"think": "very"}', 'invalid think value: "very" (must be "high", "medium", "low", "max", true, or false)'),
        (b'{"think": 1}', 'think must be a boolean or string ("high", "medium", "low", "max", true, or false)'),
        (b"[" * 100_000, "exceeded max depth"),
        (b'{"options":' + b'{"a":' * 300 + b"1" + b"}" * 301, "exceeded max depth"),
        (b'{"context": [' + b"9" * 5000 + b"]}", None),
    ],
)
def test_bad_bodies(body: bytes, message: str | None) -> None:
    with pytest.raises(InvalidRequest) as error:
        decode(GenerateRequest, body)
    assert error.value.status == 400
    assert message is None or str(error.value) == message


def test_nested_fields_are_named_from_the_root() -> None:
    with pytest.raises(InvalidRequest, match=r"array into Go struct field ChatRequest\.messages\.content of type string"):
        decode(ChatRequest, b'{"messages": [{"content": []}]}')


def test_unknown_fields_nulls_case_and_trailing_bytes() -> None:
    request = decode(GenerateRequest, b'{"MODEL": "m", "prompt": null, "what": 1, "stream": false} trailing')
    assert (request.model, request.prompt, request.stream) == ("m", "", False)


def test_broken_utf8_and_lone_surrogates_become_replacement_characters() -> None:
    assert decode(GenerateRequest, b'{"prompt": "\xff"}').prompt == "\ufffd"
    assert decode(GenerateRequest, b'{"prompt": "\\ud800!"}').prompt == "\ufffd!"
    assert decode(GenerateRequest, b'{"prompt": "\\ud83d\\ude00"}').prompt == "\U0001f600"


@pytest.mark.parametrize(
    ("value", "seconds"), [(5, 5), (1.5, 1.5), ("10m", 600), (-1, math.inf), ("-1m", math.inf), (0, 0), (10**400, math.inf)]
)
def test_keep_alive(value: Any, seconds: float) -> None:
    assert generate(keep_alive=value).keep_alive == seconds


def test_messages_become_template_turns() -> None:
    body = {"messages": [{"role": "Tool", "content": "5", "tool_name": "add"}, {"role": "assistant", "tool_calls": [{"function": {}}]}]}
    tool, call = (message.as_dict() for message in decode(ChatRequest, json.dumps(body).encode()).messages)
    assert tool == {"role": "tool", "content": "5", "tool_name": "add", "name": "add"}
    assert call == {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}


def test_request_over_model_over_default() -> None:
    options = merge_options({"temperature": 0, "stop": "a"}, {"temperature": 1, "top_k": 7.0, "num_ctx": 99, "stop": ["b", "c"]})
    assert (options.sampling.temperature, options.sampling.top_k, options.sampling.top_p) == (0, 7, 0.9)
    assert (options.sampling.stop, options.num_ctx) == (("a",), 99)


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("num_predict", -1, "max_tokens", None),
        ("num_predict", 5.9, "max_tokens", 5),
        ("seed", -1, "seed", None),
        ("seed", 42, "seed", 42),
        ("temperature", -3, "temperature", 0),
        ("top_k", -1, "top_k", 0),
        ("top_p", 7, "top_p", 1),
        ("min_p", 2, "min_p", 1),
        ("repeat_last_n", -9, "repeat_last_n", -1),
        ("temperature", None, "temperature", 0.8),
        ("mirostat", 2, "mirostat", 2),
        ("mirostat_tau", 4, "mirostat_tau", 4.0),
        ("typical_p", 0, "typical_p", 1e-9),
        ("num_keep", 24, "num_keep", 24),
        ("xtc_probability", 0.5, "xtc_probability", 0.5),
        ("dry_sequence_breakers", ["\n"], "dry_sequence_breakers", ("\n",)),
        ("top_n_sigma", -1, "top_n_sigma", 0),
        ("tfs_z", "anything", "temperature", 0.8),
        ("unknown", {}, "temperature", 0.8),
    ],
)
def test_options(option: str, value: Any, field: str, expected: Any) -> None:
    assert getattr(merge_options({option: value}, {}).sampling, field) == expected


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("num_predict", "5", "integer"),
        ("top_k", True, "integer"),
        ("temperature", "hot", "float32"),
        ("stop", [1], "array"),
        ("num_ctx", [], "integer"),
    ],
)
def test_options_of_the_wrong_type(option: str, value: Any, kind: str) -> None:
    with pytest.raises(BadOption) as error:
        merge_options({option: value}, {})
    assert (str(error.value), error.value.status) == (f'option "{option}" must be of type {kind}', 500)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mirostat", 3, "mirostat must be between 0 and 2, got 3"),
        ("xtc_threshold", 1.5, "xtc_threshold must be between 0 and 1, got 1.5"),
        ("dry_base", 0.5, "dry_base must be 1 or more, got 0.5"),
        ("repeat_penalty", 0, "repeat_penalty must be above 0, got 0"),
        ("presence_penalty", 1e7, "presence_penalty must be a finite number, got 1"),
    ],
)
def test_options_no_sampler_can_use(option: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as error:
        merge_options({option: value}, {})
    assert error.value.status == 400


def test_num_ctx_is_at_least_4() -> None:
    assert merge_options({"num_ctx": 1}, {}).num_ctx == 4


def test_format() -> None:
    assert grammar("") is grammar(None) is None
    assert grammar("json") == "json"
    assert json.loads(grammar({"type": "object"}) or "") == {"type": "object"}


@pytest.mark.parametrize("value", ["xml", 1, []])
def test_bad_format(value: Any) -> None:
    with pytest.raises(BadOption) as error:
        grammar(value)
    shown = json.dumps(json.dumps(value))
    assert str(error.value) == f'invalid format: {shown}; expected "json" or a valid JSON Schema object'
    assert error.value.status == 500
