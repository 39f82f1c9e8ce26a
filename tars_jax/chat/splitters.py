"""What models write, told apart while it streams: thinking from content, tool calls from both.

Any chunking of a text gives the same result. Only what may be the beginning of a tag or of a call is held back.
"""

import dataclasses
import json
import re
from collections.abc import Collection
from typing import Any, Literal

_TAGS = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": ""}  # what opens calls, and what closes them
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_JSON_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)
# What the text of a call begins like, as far as it goes: after a tag any JSON object or array; bare, an object whose first key is
# one of a call, so that an answer in JSON is not held back.
_PROMISING = {
    True: re.compile(r"\s*(?:[{\[]|\Z)"),
    False: re.compile(r'\{\s*(?:\Z|"(?:[a-z]{0,10}\Z|(?:name|type|id|function|parameters|arguments)"))'),
}

# Tokens that splitters look for; some models mark them as control tokens, which a TextStream hides unless told to keep them.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call a model asks for."""

    name: str
    arguments: dict[str, Any]


def _held(text: str, tag: str) -> int:
    """How many of the last characters of ``text`` may be the beginning of ``tag``."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)


class ThinkingSplitter:
    """Takes the trace between ``tags`` out of an answer that begins with one.

    ``opened``: the prompt ended inside the trace already, as some templates have it. White space around the tags is dropped.
    """

    def __init__(self, *, opened: bool = False, tags: tuple[str, str] = ("<think>", "</think>")) -> None:
        self._open, self._close = tags
        self._state: Literal["start", "thinking", "content"] = "thinking" if opened else "start"
        self._after_tag = opened  # white space is to be dropped
        self._text = ""

    def push(self, text: str) -> tuple[str, str]:
        """(thinking, content) that is certain now."""
        self._text += text
        if self._state == "start":
            self._start()
        thinking = self._thinking() if self._state == "thinking" else ""
        return thinking, self._content() if self._state == "content" else ""

    def flush(self) -> tuple[str, str]:
        """(thinking, content) held back at the end of the answer."""
        rest, self._text = self._text, ""
        return (rest, "") if self._state == "thinking" else ("", rest)

    def _start(self) -> None:
        begin = self._text.lstrip()
        if begin.startswith(self._open):
            self._state, self._after_tag, self._text = "thinking", True, begin[len(self._open) :]
        elif begin and not self._open.startswith(begin):
            self._state = "content"

    def _thinking(self) -> str:
        self._drop_space()
        trace, close, rest = self._text.partition(self._close)
        if close:
            self._state, self._after_tag, self._text = "content", True, rest
            return trace
        cut = len(trace) - _held(trace, self._close)
        self._text = trace[cut:]
        return trace[:cut]

    def _content(self) -> str:
        self._drop_space()
        content, self._text = self._text, ""
        return content

    def _drop_space(self) -> None:
        if self._after_tag:
            self._text = self._text.lstrip()
            self._after_tag = not self._text


class ToolCallSplitter:
    """Takes tool calls out of an answer, each only when it is whole.

    Understands ``<tool_call>{json}</tool_call>`` (Hermes, Qwen), ``[TOOL_CALLS][...]`` (Mistral), and at the beginning a bare JSON object
    with a name and ``parameters`` or ``arguments`` (Llama 3). With ``names``, only calls of these tools count. What turns out not to be
    a call is content, unchanged; only white space around calls is dropped.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self._text = ""
        self._bare = True  # no content came yet
        self._after_call = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Content and calls that are certain now."""
        self._text += text
        return self._take(final=False)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Content and calls held back at the end of the answer."""
        content, calls = self._take(final=True)
        rest, self._text = self._text, ""
        return content + rest, calls

    def _take(self, final: bool) -> tuple[str, list[ToolCall]]:
        content, calls = "", list[ToolCall]()
        while self._skip_space():
            place = self._candidate()
            lead = self._text[:place]
            if lead and not (self._bare and lead.isspace()):
                size, found = place, list[ToolCall]()
            else:
                size, found = self._read(self._text[place:], final)
                if not size:
                    break
                size += place
            content += "" if found else self._text[:size]
            calls += found
            self._text = self._text[size:]
            self._after_call = bool(found)
            self._bare = self._bare and bool(found)
        return content, calls

    def _skip_space(self) -> bool:
        if self._after_call:
            self._text = self._text.lstrip()
        return bool(self._text)

    def _candidate(self) -> int:
        """Where in the text a call begins or may begin; its length if nowhere."""
        start = len(self._text) - len(self._text.lstrip())
        if self._bare and self._text[start : start + 1] in ("", "{"):
            return start
        tag = _TAG.search(self._text)
        return tag.start() if tag else len(self._text) - max(_held(self._text, text) for text in _TAGS)

    def _read(self, text: str, final: bool) -> tuple[int, list[ToolCall]]:
        """The length of the call or of the content ``text`` begins with, and the calls; 0: more text is needed."""
        tag = _TAG.match(text)
        if tag:
            begin, close = tag.end(), _TAGS[tag[0]]
        elif text.startswith("{"):
            begin, close = 0, ""
        else:
            return 0, []
        refused = begin or 1  # characters of content if this is no call
        if not _PROMISING[bool(tag)].match(text[begin:]):
            return refused, []
        end = _json_end(text, begin)
        size = _closed(text, end, close, final) if end else 0
        if size <= 0:
            return refused if final or size < 0 else 0, []
        calls = self._calls(text[begin:end], needs_arguments=not tag)
        return (size, calls) if calls else (refused, [])

    def _calls(self, body: str, needs_arguments: bool) -> list[ToolCall]:
        """The calls a JSON text stands for; none unless every entry is a call."""
        try:
            value = json.loads(body)
            entries = value if isinstance(value, list) else [value]
            calls = [_call(entry, needs_arguments) for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        return calls if self._names is None or all(call.name in self._names for call in calls) else []


def _json_end(text: str, begin: int) -> int:
    """Where the JSON object or array that begins at ``begin`` ends; 0 if it does not yet."""
    depth = 0
    for mark in _JSON_MARKS.finditer(text, begin):
        if mark[0] == '"':
            return 0  # inside a string
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] in "}]":
            return mark.end()
    return 0


def _closed(text: str, end: int, close: str, final: bool) -> int:
    """Where the tag after the JSON at ``end`` ends; 0 if it is not complete, -1 if something else stands there."""
    after = text[end:].lstrip()
    if after.startswith(close):
        return len(text) - len(after) + len(close) if close else end
    if close.startswith(after):
        return len(text) if final else 0  # a call whose closing tag was cut off is whole
    return -1


def _call(entry: Any, needs_arguments: bool) -> ToolCall:
    """Read ``{"name", "arguments" or "parameters"}``, perhaps under ``function``. Raises KeyError, TypeError or ValueError."""
    if not isinstance(entry, dict):
        raise TypeError
    entry = entry["function"] if isinstance(entry.get("function"), dict) else entry
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is None and not needs_arguments:
        arguments = {}
    if not isinstance(arguments, dict) or not isinstance(entry["name"], str):
        raise TypeError
    return ToolCall(entry["name"], arguments)
