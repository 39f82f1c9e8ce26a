"""Structured output: which tokens may come next so that the answer matches a JSON schema (by llguidance)."""

import json
from typing import Any

import llguidance
import numpy as np

from tars_jax.errors import InvalidRequest
from tars_jax.tokenizer import Tokenizer

# Between JSON tokens, as llama.cpp's grammars have it: enough to indent, too little to go on for ever.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"


class Constraint:
    """One answer's progress through its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, allowed: np.ndarray) -> None:
        """Write the bits of the tokens that may come next: uint32 [ceil(V / 32)], contiguous."""
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)

    def consume(self, token_id: int) -> None:
        """Advance by a token that `fill` allowed."""
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"token {token_id} does not match the grammar: {self._matcher.get_error()}")


class GrammarCompiler:
    """Makes `Constraint`s for one model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=vocab_size)

    def compile(self, grammar: str) -> Constraint:
        """A constraint for "json" (any JSON object) or a JSON schema as text. Raises InvalidRequest."""
        schema = {"type": "object"} if grammar == "json" else _parse(grammar)
        try:
            compiled = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
            matcher = llguidance.LLMatcher(self._tokenizer, compiled)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"format: this JSON schema cannot be enforced: {error}") from None
        if matcher.is_error():
            raise InvalidRequest(f"format: this JSON schema cannot be enforced: {matcher.get_error()}")
        return Constraint(matcher)


def _parse(grammar: str) -> dict[str, Any]:
    try:
        schema = _closed(json.loads(grammar))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(f"format: not a valid JSON schema: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"format: a JSON schema is an object, not {type(schema).__name__}")
    return schema


def _closed(schema: Any) -> Any:
    """The schema with every object limited to its listed properties, unless it says otherwise: llama.cpp's reading, and what
    people mean. Parts of an ``allOf`` stay open, since each lists only some of the properties."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in ("items", "prefixItems", "anyOf", "oneOf"):
        if key in schema:
            closed[key] = _closed(schema[key])
    for key in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _closed(part) for name, part in schema[key].items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object"
    if is_object and not {"additionalProperties", "patternProperties", "allOf", "$ref"} & schema.keys():
        closed["additionalProperties"] = False
    return closed


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.eog_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
