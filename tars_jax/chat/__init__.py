"""Messages to prompt text by the model's own chat template, and what models write back, told apart (:mod:`tars_jax.chat.splitters`)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tars_jax.chat.splitters import ThinkingSplitter, ToolCall, ToolCallSplitter
from tars_jax.errors import InvalidRequest, ModelFileError

__all__ = ["CHATML", "ChatTemplate", "ThinkingSplitter", "ToolCall", "ToolCallSplitter", "capabilities"]

# For models whose file has no template, as llama.cpp does.
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's trace; templates read the first


class ChatTemplate:
    """A compiled chat template. Raises ModelFileError if ``source`` is no valid template."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        from jinja2 import TemplateError  # 0.07 s, which commands without a chat need not pay

        from tars_jax.chat.sandbox import compile_template

        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        try:
            self._render = compile_template(source)
        except (TemplateError, RecursionError) as error:
            line = f" (line {number})" if (number := getattr(error, "lineno", None)) else ""
            raise ModelFileError(f"the model's chat template is not valid: {error}{line}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt text of a conversation.

        ``extra`` holds further template variables. Raises InvalidRequest for messages the template refuses, with its own words.
        """
        from tars_jax.chat.sandbox import bounded

        variables = {"bos_token": self.bos_token, "eos_token": self.eos_token, "documents": None} | extra
        plain = {name: _plain(value) for name, value in variables.items()}
        turns = [_with_reasoning(message) for message in map(_plain, messages)]
        try:
            with bounded():
                return self._render(
                    **plain | {"messages": turns, "tools": _plain(tools) or None, "add_generation_prompt": add_generation_prompt}
                )
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise InvalidRequest(_reason(error)) from error


def _reason(error: Exception) -> str:
    from jinja2 import TemplateError

    if type(error) is TemplateError:  # what raise_exception() raises
        return str(error)
    return f"the model's chat template cannot render these messages: {error or type(error).__name__}"


def _with_reasoning(message: Any) -> dict[str, Any]:
    """The message with its trace under every name that templates read."""
    if not isinstance(message, dict):
        raise InvalidRequest(f"a message must be an object with a role and a content, got {type(message).__name__}")
    trace = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if trace is None else {"thinking": trace, **message, "reasoning_content": trace}


def _plain(value: Any) -> Any:
    """A copy made of plain JSON types: objects with methods have no place in an untrusted template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # enums and the like
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def capabilities(source: str) -> frozenset[str]:
    """What a template shows its model can do, as Ollama tells it: ``tools`` if it mentions them, ``thinking`` if it handles a trace."""
    found = set()
    if "tools" in source or "tool_call" in source:
        found.add("tools")
    if ("<think>" in source and "</think>" in source) or re.search(r"""split\(\s*['"]</think>""", source):
        found.add("thinking")
    return frozenset(found)
