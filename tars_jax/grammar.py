"""Structured output: which tokens may come next so that the answer matches a JSON schema, a regular expression, a GBNF or a Lark
grammar (by llguidance)."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from tars_jax.config import GrammarKind
from tars_jax.errors import InvalidRequest
from tars_jax.tokenizer import Tokenizer

# Between JSON tokens, as llama.cpp's grammars have it: enough to indent, too little to go on for ever.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"


class Constraint:
    """One answer's progress through its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, executor: llguidance.LLExecutor) -> None:
        self.matcher, self.executor = matcher, executor

    def consume(self, token_id: int) -> None:
        """Advance by a token that `fill` allowed."""
        if not self.matcher.consume_token(token_id):
            raise RuntimeError(f"token {token_id} does not match the grammar: {self.matcher.get_error()}")


def fill(constraints: Sequence[tuple[Constraint, int]], allowed: np.ndarray) -> None:
    """Write the bits of the tokens that may come next into each constraint's row of ``allowed``, uint32 [R, ceil(V / 32)], contiguous.
    Several at once are computed in parallel."""
    if len(constraints) == 1:
        constraint, row = constraints[0]
        constraint.matcher.unsafe_compute_mask_ptr(allowed[row].ctypes.data, allowed[row].nbytes)
    elif constraints:
        matchers = [(constraint.matcher, row) for constraint, row in constraints]
        constraints[0][0].executor.unsafe_compute_mask_ptr(matchers, allowed.ctypes.data, allowed.strides[0], len(allowed))


class GrammarCompiler:
    """Makes `Constraint`s for one model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=vocab_size)
        self._executor = llguidance.LLExecutor()

    def compile(self, grammar: str, kind: GrammarKind = "json") -> Constraint:
        """A constraint for one grammar. Raises InvalidRequest that says what cannot be enforced."""
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, _READERS[kind](grammar))
        except (ValueError, TypeError, RecursionError) as error:
            raise _refusal(kind, str(error)) from None
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        return Constraint(matcher, self._executor)


def _refusal(kind: GrammarKind, why: str) -> InvalidRequest:
    why = why.partition("\n<state>")[0].strip()
    return InvalidRequest(f"format: this {_NAMES[kind]} cannot be enforced: {why}")


def _read_json(text: str) -> str:
    schema = {"type": "object"} if text == "json" else _closed(json.loads(text))
    if not isinstance(schema, dict):
        raise TypeError(f"a JSON schema is an object, not {type(schema).__name__}")
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})


def _read_gbnf(text: str) -> str:
    try:
        return llguidance.grammar_from("gbnf", text)
    except Exception as error:  # its parser raises whatever comes
        raise ValueError(error) from None


_NAMES: Mapping[GrammarKind, str] = {"json": "JSON schema", "regex": "regular expression", "gbnf": "GBNF grammar", "lark": "Lark grammar"}
_READERS: Mapping[GrammarKind, Callable[[str], str]] = {
    "json": _read_json,
    "regex": lambda text: llguidance.grammar_from("regex", text),
    "gbnf": _read_gbnf,
    "lark": lambda text: llguidance.grammar_from("lark", text),
}


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
