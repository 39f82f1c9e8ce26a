"""A conversation on the command line: what is asked, with which settings, and how the answer is printed."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tars_jax.cli.output import AnswerWriter, note, timings
from tars_jax.cli.progress import show_pull
from tars_jax.errors import InvalidRequest

if TYPE_CHECKING:
    from tars_jax.cli.backends import Backend

Message = dict[str, Any]


@dataclasses.dataclass
class Session:
    """The state of ``tars run``; ``/set`` changes it."""

    backend: "Backend"
    model: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    format: Any = None
    think: bool | str | None = None
    keep_alive: str | None = None
    verbose: bool = False
    hides_thinking: bool = False
    wraps: bool = False
    keeps_history: bool = True  # of the prompts, on disk
    messages: list[Message] = dataclasses.field(default_factory=list)

    def save_as(self, name: str, adapters: Sequence[Path], models: Path) -> None:
        """Make a model of this one and adapters, in the store of this process, and go on with it."""
        if not adapters:
            raise InvalidRequest("--save keeps a model with its adapters: name one by --adapter PATH (`tars cp` copies a model)")
        from tars_jax.loaders.adapted import save_adapted
        from tars_jax.store import Store

        self._bring()
        self.model = save_adapted(Store(models), self.model, adapters, name).name.short()
        note(f"saved as '{self.model}'")

    def load(self) -> None:
        """Pull the model if it is not here, and bring it into memory."""
        self._bring()
        for _ in self.backend.chat(self._body([])):
            pass

    def _bring(self) -> None:
        if not self.backend.has(self.model):
            show_pull(self.backend.pull(self.model))

    def ask(self, prompt: str) -> None:
        """Ask, print the answer, remember both. Ctrl-C stops the answer: what had come is kept."""
        self.messages.append({"role": "user", "content": prompt})
        text = ""
        try:
            for piece in self._answer():
                text += piece
        except KeyboardInterrupt:
            note("")
        except BaseException:
            self.messages.pop()
            raise
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def _body(self, messages: list[Message]) -> dict[str, Any]:
        if messages and self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        fields = {"options": self.options, "format": self.format, "think": self.think, "keep_alive": self.keep_alive}
        return {"model": self.model, "messages": messages} | {key: value for key, value in fields.items() if value not in (None, {})}

    def _answer(self) -> Iterator[str]:
        """Print an answer and yield its text: the answer to stdout, the thinking and the measures to stderr."""
        writer, thinking = AnswerWriter(wraps=self.wraps), _ThinkingWriter(self.hides_thinking)
        try:
            with contextlib.closing(self.backend.chat(self._body(self.messages))) as chunks:
                for chunk in chunks:
                    thinking.write(chunk["message"].get("thinking", ""))
                    if text := chunk["message"]["content"]:
                        thinking.end()
                        writer.write(text)
                        yield text
                    for call in chunk["message"].get("tool_calls", []):
                        note(f"tool call: {call['function']['name']}({call['function']['arguments']})")
        finally:
            thinking.end()
            writer.end()
        if self.verbose:
            note("\n" + timings(chunk))


class _ThinkingWriter:
    """The trace of a thinking model, on stderr between two lines that say what it is."""

    def __init__(self, hides: bool) -> None:
        self._hides, self._is_open = hides, False

    def write(self, text: str) -> None:
        if not text or self._hides:
            return
        if not self._is_open:
            note("Thinking...")
            self._is_open = True
        note(text, end="")

    def end(self) -> None:
        if self._is_open:
            note("\n...done thinking.\n")
            self._is_open = False
