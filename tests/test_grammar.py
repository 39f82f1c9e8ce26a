"""Grammars on a vocabulary of bytes: whatever is chosen among the allowed tokens, the text matches."""

import json
import re
from typing import Any

import numpy as np
import pytest

from tars_jax.errors import InvalidRequest
from tars_jax.grammar import Constraint, GrammarCompiler, fill

EOS = 256
WORDS = 9  # of a mask


class ByteTokenizer:
    """A token a byte, and an end of text."""

    vocab_size = EOS + 1
    bos_id = None
    eos_id = EOS
    eog_ids = control_ids = frozenset({EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<end>"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer: Any = ByteTokenizer()
    return GrammarCompiler(tokenizer, ByteTokenizer.vocab_size)


def allowed(constraint: Constraint) -> np.ndarray:
    bits = np.zeros((1, WORDS), np.uint32)
    fill([(constraint, 0)], bits)
    return np.nonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: ByteTokenizer.vocab_size])[0]


def walk(constraint: Constraint, seed: int, limit: int = 400) -> str | None:
    """A random text of the grammar; None if it did not end. Printable bytes only, so that it is short."""
    random, text = np.random.default_rng(seed), bytearray()
    for _ in range(limit):
        choices = allowed(constraint)
        if EOS in choices and random.random() < 0.5:
            return text.decode()
        choices = [c for c in choices if 32 <= c < 127 and c != ord("\\")] or [c for c in choices if c != EOS]
        if not choices:
            return text.decode()
        token = int(random.choice(choices))
        constraint.consume(token)
        text.append(token)
    return None


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}, "c": {"type": "boolean"}},
    "required": ["a", "b", "c"],
}


def test_a_schema_gives_its_objects(compiler: GrammarCompiler) -> None:
    for seed in range(20):
        text = walk(compiler.compile(json.dumps(SCHEMA)), seed)
        value = json.loads(text or "null")
        assert set(value) == {"a", "b", "c"}
        assert 0 <= value["a"] <= 99
        assert value["b"] in ("x", "yes")


@pytest.mark.parametrize("pattern", [r"[a-c]{2}-\d{1,3}", "(yes|no)( please)?", r"\d{4}-[01]\d"])
def test_a_regular_expression_gives_its_matches(compiler: GrammarCompiler, pattern: str) -> None:
    texts = [walk(compiler.compile(pattern, "regex"), seed) for seed in range(20)]
    assert all(text is not None and re.fullmatch(pattern, text) for text in texts)


def test_a_gbnf_grammar_gives_its_sentences(compiler: GrammarCompiler) -> None:
    grammar = 'root ::= sum "!"\nsum ::= digit ("+" digit){1,3}\ndigit ::= [1-4]'
    texts = [walk(compiler.compile(grammar, "gbnf"), seed) for seed in range(20)]
    assert all(text is not None and re.fullmatch(r"[1-4](\+[1-4]){1,3}!", text) for text in texts)


def test_a_lark_grammar_gives_its_sentences(compiler: GrammarCompiler) -> None:
    grammar = 'start: "<" inner ">"\ninner: /[a-b]/ | "<" inner ">"'
    texts = [walk(compiler.compile(grammar, "lark"), seed) for seed in range(20)]
    assert all(text is not None and text.count("<") == text.count(">") > 0 for text in texts)


@pytest.mark.parametrize(
    ("grammar", "kind", "why"),
    [
        ('{"type": "object", "properties": {"a": {"not": {}}}}', "json", 'JSON schema cannot be enforced: Unimplemented keys: ."not".'),
        ('{"contains": {}, "type": "array"}', "json", '"contains"'),
        ("[1", "json", "JSON schema cannot be enforced: Expecting"),
        ("3", "json", "a JSON schema is an object, not int"),
        ("(a", "regex", "regular expression cannot be enforced: .*unclosed group"),
        ("root ::= missing", "gbnf", "GBNF grammar cannot be enforced: .*'missing' not found"),
        ("start: nope", "lark", 'Lark grammar cannot be enforced: .*unknown name: "nope"'),
    ],
)
def test_what_cannot_be_enforced_is_named(compiler: GrammarCompiler, grammar: str, kind: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s){why}") as error:
        compiler.compile(grammar, kind)
    assert error.value.status == 400


def test_masks_made_together_are_those_made_alone(compiler: GrammarCompiler) -> None:
    constraints = [compiler.compile(pattern, "regex") for pattern in ("[a-c]x", "z", "[0-9]+")]
    together = np.zeros((4, WORDS), np.uint32)
    fill([(constraint, 3 - i) for i, constraint in enumerate(constraints)], together)
    for i, constraint in enumerate(constraints):
        alone = np.zeros((1, WORDS), np.uint32)
        fill([(constraint, 0)], alone)
        np.testing.assert_array_equal(together[3 - i], alone[0])
    assert not together[0].any()
