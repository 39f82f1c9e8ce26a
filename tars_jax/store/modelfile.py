"""Modelfiles, as Ollama writes them: what a model is made of, an instruction and its argument at a time.

    FROM smollm2:135m
    PARAMETER temperature 0.3
    SYSTEM "Be brief."

Instructions are read in any case. An argument ends with its line, unless it stands between one or three double quotes: then with them.
Lines that begin with # are comments.
"""

import re
from dataclasses import dataclass

from tars_jax.errors import InvalidRequest

INSTRUCTIONS = ("from", "license", "template", "system", "adapter", "parameter", "message")
ROLES = ("system", "user", "assistant")
_WORD = re.compile(r"[ \t]*(\S+)[ \t]*")


@dataclass(frozen=True)
class Modelfile:
    """What the instructions say. base, adapters: names or paths as they stand there; parameters: name and text each, in order; template,
    system: empty where there is none; messages: role and content each."""

    base: str
    adapters: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    template: str = ""
    system: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    licenses: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Modelfile":
        """Raises InvalidRequest that names the line."""
        found: dict[str, list[tuple[str, ...]]] = {name: [] for name in INSTRUCTIONS}
        for name, words in _instructions(text):
            found[name].append(words)
        if not found["from"]:
            raise InvalidRequest("no FROM line: a Modelfile says what its model is made of")
        if len(found["from"]) > 1:
            raise InvalidRequest("more than one FROM line: a model is made of one other")
        last = {name: found[name][-1][0] if found[name] else "" for name in ("from", "template", "system")}
        return cls(
            base=last["from"],
            adapters=tuple(path for (path,) in found["adapter"]),
            parameters=tuple((name.lower(), value) for name, value in found["parameter"]),
            template=last["template"],
            system=last["system"],
            messages=tuple((role, content) for role, content in found["message"]),
            licenses=tuple(license for (license,) in found["license"]),
        )


def _instructions(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Instructions in lower case, each with its argument; parameters and messages have a name or role before it."""
    found, rest = [], text.removeprefix("\ufeff").replace("\r\n", "\n")
    while rest := rest.lstrip():
        line = text.count("\n") - rest.count("\n") + 1
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, rest = _word(rest)
        name = name.lower()
        if name not in INSTRUCTIONS:
            raise InvalidRequest(f"line {line}: {name!r} is no instruction; one is {', '.join(INSTRUCTIONS)}")
        words: tuple[str, ...] = ()
        if name in ("parameter", "message"):
            word, rest = _word(rest)
            words = (word,)
        argument, rest = _argument(rest, line)
        if not argument or "" in words:
            raise InvalidRequest(f"line {line}: {name.upper()} has no argument")
        if name == "message" and words[0] not in ROLES:
            raise InvalidRequest(f"line {line}: the role of a message is one of {', '.join(ROLES)}, not {words[0]!r}")
        found.append((name, (*words, argument)))
    return found


def _word(text: str) -> tuple[str, str]:
    """The next word of this line, and what follows it; empty where the line has none."""
    match = _WORD.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _argument(text: str, line: int) -> tuple[str, str]:
    """What is quoted, or the rest of the line; and what follows it."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            end = re.compile(re.escape(quotes) + r"[ \t]*(\n|\Z)").search(text, len(quotes))
            if end is None:
                raise InvalidRequest(f"line {line}: {quotes} is not closed")
            return text[len(quotes) : end.start()], text[end.end() :]
    argument, _, rest = text.partition("\n")
    return argument.strip(), rest
