"""An answer's text as it comes, told apart into what is said, what is thought and which tools are called."""

import dataclasses

from api.prompts import Prompt
from tars_jax.chat import ThinkingSplitter, ToolCall, ToolCallSplitter


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking or self.tool_calls)

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.text + other.text, self.thinking + other.thinking, self.tool_calls + other.tool_calls)


class Splitter:
    """Feeds an answer through what its prompt asks for: first the thinking is taken out, then the tool calls."""

    def __init__(self, prompt: Prompt) -> None:
        self._thinking = ThinkingSplitter(opened=prompt.opens_thinking) if prompt.splits_thinking else None
        self._tools = ToolCallSplitter(prompt.tools) if prompt.tools else None

    def push(self, text: str) -> Piece:
        """What can be told of the text so far."""
        thinking, text = self._thinking.push(text) if self._thinking else ("", text)
        text, calls = self._tools.push(text) if self._tools else (text, [])
        return Piece(text, thinking, tuple(calls))

    def flush(self) -> Piece:
        """What was held back."""
        thinking, text = self._thinking.flush() if self._thinking else ("", "")
        if not self._tools:
            return Piece(text, thinking)
        shown, calls = self._tools.push(text)
        rest, more = self._tools.flush()
        return Piece(shown + rest, thinking, (*calls, *more))
