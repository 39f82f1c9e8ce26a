"""From a request to the tokens the engine reads: system prompts, templates, capabilities, and turns that do not fit."""

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from api.models import Loaded
from api.schema import ChatRequest, GenerateRequest, Think, grammar
from tars_jax.chat import ChatTemplate, capabilities
from tars_jax.errors import ContextOverflow, InvalidRequest

log = logging.getLogger(__name__)

Turn = dict[str, Any]

# What Go templates have and Jinja does not: a field `{{ .X }}`, a keyword inside double braces.
_GO_TEMPLATE = re.compile(r"\{\{-?\s*(\.|\$|(if|else|end|range|with|define|block|template|json|slice|eq|and|or|not)\b)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What goes into the engine, and how its answer is to be read."""

    ids: tuple[int, ...]
    text: str
    splits_thinking: bool = False  # the answer may begin with a trace
    tools: tuple[str, ...] = ()  # names of the tools the answer may call

    @property
    def opens_thinking(self) -> bool:
        """Whether the template wrote the opening tag itself."""
        return self.splits_thinking and self.text.rstrip().endswith("<think>")


def is_go_template(source: str) -> bool:
    return bool(_GO_TEMPLATE.search(source))


def template_source(stored: str, own: str) -> str:
    """The template of a model: its stored one if that is Jinja, else the one in its file.

    A TEMPLATE layer of the Ollama registry is written in Go's language and is passed over: the file carries the original.
    """
    return stored if stored and not is_go_template(stored) else own


def chat_template(loaded: Loaded, override: str = "") -> ChatTemplate:
    """The template of a request: its own, else its model's. Raises InvalidRequest for Go's language."""
    if override and is_go_template(override):
        raise InvalidRequest("Go templates ({{ .Prompt }}) are not supported; use a Jinja template, e.g. {{ messages[0].content }}")
    own: ChatTemplate = loaded.model.chat_template
    source = override or template_source(loaded.stored.template, own.source)
    if source == own.source:
        return own
    return ChatTemplate(source, bos_token=own.bos_token, eos_token=own.eos_token)


def generate_prompt(loaded: Loaded, request: GenerateRequest) -> Prompt:
    """The prompt of /api/generate. A prompt that is too long is refused by the engine, with the numbers."""
    if request.raw:
        return Prompt(_encode(loaded, request.prompt), request.prompt)
    template = chat_template(loaded, request.template)
    _check_thinking(template, request.think, request.model)
    system = request.system or loaded.stored.system
    turns: list[Turn] = [{"role": "system", "content": system}] if system else []
    if request.context is None:
        turns += loaded.stored.messages
    turns.append({"role": "user", "content": request.prompt})
    text = _open_trace(template.render(turns, **_variables(template, request.think)), template, request)
    ids = _encode(loaded, text)
    if request.context:
        ids = (*request.context, *ids)
    return Prompt(ids, text, "thinking" in capabilities(template.source))


def chat_prompt(loaded: Loaded, request: ChatRequest) -> Prompt:
    """The prompt of /api/chat: the oldest turns are left out when the conversation does not fit the context."""
    template = chat_template(loaded)
    abilities = capabilities(template.source)
    _check_thinking(template, request.think, request.model)
    if request.tools and "tools" not in abilities:
        raise InvalidRequest(f"{loaded.stored.name} does not support tools")
    variables = _variables(template, request.think)

    def render(turns: Sequence[Turn]) -> tuple[str, tuple[int, ...]]:
        text = _open_trace(template.render(turns, tools=list(request.tools) or None, **variables), template, request)
        return text, _encode(loaded, text)

    turns = [*loaded.stored.messages, *(message.as_dict() for message in request.messages)]
    if loaded.stored.system and (not request.messages or request.messages[0].role.lower() != "system"):
        turns.insert(0, {"role": "system", "content": loaded.stored.system})
    text, ids = _fitting(turns, render, loaded.engine.config.max_context, request.truncate, request.shift)
    return Prompt(ids, text, "thinking" in abilities, tuple(str(tool.get("function", {}).get("name", "")) for tool in request.tools))


def _fitting(
    turns: list[Turn], render: Callable[[Sequence[Turn]], tuple[str, tuple[int, ...]]], limit: int, truncate: bool, shift: bool
) -> tuple[str, tuple[int, ...]]:
    """The rendered conversation without as few of its oldest turns as possible; system turns and the last one stay. ``shift``: what then
    does not fit is cut later."""
    rendered = render(turns)
    droppable = [i for i, turn in enumerate(turns[:-1]) if turn["role"] != "system"]
    if len(rendered[1]) < limit or not truncate or not droppable:
        return rendered
    low, high = 1, len(droppable)  # turns to drop: bisection, for every try renders and tokenises everything
    while low < high:
        middle = (low + high) // 2
        if len(render(_without(turns, droppable[:middle]))[1]) < limit:
            high = middle
        else:
            low = middle + 1
    text, ids = render(_without(turns, droppable[:low]))
    if len(ids) >= limit and not shift:
        raise ContextOverflow(
            f"the last message and the system prompt are {len(ids)} tokens long, but the context window is {limit}; "
            "shorten them or raise num_ctx"
        )
    return text, ids


def without_middle(prompt: Prompt, loaded: Loaded, num_keep: int) -> Prompt:
    """A prompt that does not fit, cut to its first ``num_keep`` tokens (-1: all, so that nothing can be cut) and as many of its last as
    leave about half of the rest of the context free, as Ollama does when asked to shift."""
    limit, size = loaded.engine.config.max_context, len(prompt.ids)
    keep = num_keep + bool(getattr(loaded.model.tokenizer, "add_bos", False))
    if size < limit or num_keep < 0 or keep >= limit - 1:
        return prompt  # the engine refuses it if it does not fit
    last = max((limit - keep) // 2, 1)
    log.info("a prompt of %d tokens was cut to its first %d and last %d, for a context of %d", size, keep, last, limit)
    return dataclasses.replace(prompt, ids=(*prompt.ids[:keep], *prompt.ids[-last:]))


def _without(turns: list[Turn], dropped: list[int]) -> list[Turn]:
    return [turn for i, turn in enumerate(turns) if i not in set(dropped)]


def _check_thinking(template: ChatTemplate, think: Think, name: str) -> None:
    if think and "thinking" not in capabilities(template.source):
        raise InvalidRequest(f'"{name}" does not support thinking')


def _variables(template: ChatTemplate, think: Think) -> dict[str, Any]:
    """Template variables of a request. Models that can think do so unless told not to; the names are those templates use."""
    if "thinking" not in capabilities(template.source):
        return {}
    enabled = think is None or bool(think)
    level = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"enable_thinking": enabled, "thinking": enabled, **level}


def _open_trace(text: str, template: ChatTemplate, request: GenerateRequest | ChatRequest) -> str:
    """The prompt of a constrained answer begins the trace itself, so that it is known where the free part ends."""
    thinks = request.think is not False and "thinking" in capabilities(template.source)
    if not thinks or grammar(request.format) is None or text.rstrip().endswith("<think>"):
        return text
    return text + "<think>\n"


def _encode(loaded: Loaded, text: str) -> tuple[int, ...]:
    tokenizer = loaded.model.tokenizer
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    return tuple(ids[:-1] if tokenizer.add_eos else ids)  # an end token would end the prompt before the answer
