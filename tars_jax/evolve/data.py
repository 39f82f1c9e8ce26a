"""Examples to evolve on: JSON lines of a prompt and the completion that is wanted."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tars_jax.errors import InvalidRequest, refuse

if TYPE_CHECKING:
    from tars_jax.loaders.loaded import Model

PROMPTS, COMPLETIONS = ("prompt", "input", "instruction", "question"), ("completion", "label", "output", "response", "answer")


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its completion; the texts they came from."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    prompt_text: str = ""
    completion_text: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_examples(path: Path, model: "Model") -> list[Example]:
    """Examples of a JSON Lines file. Raises InvalidRequest that lists the faulty lines by number."""
    items, numbers = read_lines(path)
    return encode_examples(items, model, source=str(path), numbers=numbers)


def read_lines(path: Path) -> tuple[list[Any], list[int]]:
    """What stands in a JSON Lines file, and in which lines. Raises InvalidRequest."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    items: list[Any] = []
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except ValueError as error:
            faults.append(f"line {number} is not JSON ({error})")
            items.append(None)
    refuse(faults, f"{path} is not JSON Lines")
    return items, [number for number, line in enumerate(lines, 1) if line.strip()]


def encode_examples(
    items: Sequence[Any], model: "Model", *, source: str = "the data", numbers: Sequence[int] | None = None
) -> list[Example]:
    """Examples of objects ``{"prompt", "completion"}``, taken as they are, or ``{"messages": [...]}``, written by the model's chat
    template; of those the last answer is the completion. Names in use elsewhere ("label", "answer", ...) are understood too.

    Raises InvalidRequest that lists the faulty items, by ``numbers`` or from 1 on.
    """
    examples, faults = [], []
    for number, item in zip(numbers or range(1, len(items) + 1), items, strict=True):
        try:
            examples.append(_encode(item, model))
        except InvalidRequest as error:
            faults.append(f"line {number} {error}")
    refuse(faults, f"{source} cannot be used")
    if not examples:
        raise InvalidRequest(f"{source} holds no examples")
    return examples


def _encode(item: Any, model: "Model") -> Example:
    if not isinstance(item, Mapping):
        raise InvalidRequest(f"is a {type(item).__name__}, not an object")
    prompt, completion = _conversation(item["messages"], model) if "messages" in item else _pair(item)
    example = Example(
        tuple(model.tokenizer.encode(prompt, add_special=True)), tuple(model.tokenizer.encode(completion)), prompt, completion
    )
    if not example.prompt or not example.completion:
        raise InvalidRequest("has an empty prompt or completion")
    if len(example) > model.config.context_length:
        raise InvalidRequest(f"has {len(example)} tokens, the model's context is {model.config.context_length}")
    return example


def _pair(item: Mapping[str, Any]) -> tuple[str, str]:
    texts = []
    for names in (PROMPTS, COMPLETIONS):
        name = next((name for name in names if name in item), None)
        if name is None:
            raise InvalidRequest(f'has no "{names[0]}"; a line is {{"prompt": ..., "completion": ...}} or {{"messages": [...]}}')
        if not isinstance(item[name], str):
            raise InvalidRequest(f'has a "{name}" that is no text')
        texts.append(item[name])
    return texts[0], texts[1]


def _conversation(messages: Any, model: "Model") -> tuple[str, str]:
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise InvalidRequest("has messages that do not end with the assistant's answer")
    return model.chat_prompt(messages[:-1]), last["content"]
