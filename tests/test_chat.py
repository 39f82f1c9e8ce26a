import itertools
import json
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transformers.utils.chat_template_utils import render_jinja_template

from tars_jax.chat import CHATML, ChatTemplate, ThinkingSplitter, ToolCall, ToolCallSplitter, capabilities
from tars_jax.errors import InvalidRequest, ModelFileError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2-q4_1.json").read_text())["chat"]

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string|default('26 Jul 2024') + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content|string + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n<tool_call>\\n{\\"name\\": <function-name>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last_query_index or (loop.last and reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + message.content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
  {% else %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {% if loop.last %}{% break %}{% endif %}
  {% endif %}
{% endfor %}"""

CONVENTIONS = """{# a comment #}
{% set d = dict(a=1, b="<é>") %}
    {% for key, value in d.items() if key != 'c' %}
{{ key }}={{ value | tojson }} {{ loop.length }}{% if not loop.last %},{% endif %}
    {% endfor %}
{{ messages | map(attribute='role') | join('|') }} {{ strftime_now('%Y') }} {{ messages | tojson(indent=2, sort_keys=true) }}
{% for number in range(3) %}{{ number }}{% endfor %} {{ documents is none }} {{ tools is none }}"""

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"ort": "Köln & <Bonn>"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Why is the sky <blue> & 'bright'?"}],
    "conversation": [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!", "thinking": "They greet."},
        {"role": "user", "content": "日本語 🚀"},
    ],
    "system": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Name a fruit."}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "12 °C"},
    ],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "conventions": CONVENTIONS}
few = settings(max_examples=80, deadline=None)


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_smollm2_prompts_are_those_of_llama_cpp(smollm2_path: Path, case: dict[str, Any]) -> None:
    from tars_jax.loaders.gguf import open_gguf

    template = ChatTemplate(open_gguf(smollm2_path).metadata["tokenizer.chat_template"])
    assert template.render(case["messages"]) == case["prompt"]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_equal_those_of_transformers(name: str, chat: str, prompt: bool) -> None:
    tools = TOOLS if chat == "tools" else None
    extra = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}

    def rendered() -> str:
        return ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>").render(
            CHATS[chat], tools=tools, add_generation_prompt=prompt, enable_thinking=False
        )

    if (name, chat) in {("mistral", "system"), ("mistral", "tools")}:
        with pytest.raises(InvalidRequest, match=r"^Conversation roles must alternate"):
            rendered()
        return
    expected, _ = render_jinja_template([CHATS[chat]], tools, None, TEMPLATES[name], add_generation_prompt=prompt, **extra)
    assert rendered() == expected[0]


def test_a_template_that_does_not_parse_is_a_broken_model() -> None:
    with pytest.raises(ModelFileError, match=r"chat template is not valid.*line 2"):
        ChatTemplate("\n{% if %}")


def test_what_a_template_raises_is_what_the_user_reads() -> None:
    with pytest.raises(InvalidRequest, match=r"^no such role$"):
        ChatTemplate("{{ raise_exception('no such role') }}").render([])


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": {"a": 1}}])
def test_messages_a_template_cannot_render_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot render these messages"):
        ChatTemplate(CHATML).render([message])


def test_a_message_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be an object"):
        ChatTemplate(CHATML).render(["hi"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}x{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}{{ raise_exception.__globals__.keys() }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ messages.append({}) }}",
        "{{ self.__init__.__globals__.keys() }}",
        "{% include '/etc/passwd' %}",
        "{{ [messages] | map(attribute='__class__.__mro__') | first | list }}",
    ],
)
def test_templates_cannot_reach_into_python(source: str) -> None:
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    except InvalidRequest:
        return
    assert "<class" not in text
    assert "built-in" not in text
    assert "root:" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% set x = range(9999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    ],
)
def test_templates_that_work_without_end_are_stopped(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render([])
    assert time.monotonic() - started < 5


def test_a_long_conversation_is_within_the_bound() -> None:
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 1000
    assert ChatTemplate(QWEN3).render(chat, tools=TOOLS).count("<|im_start|>") == 2002


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, set()),
        (LLAMA3, {"tools"}),
        (QWEN3, {"tools", "thinking"}),
        ("{{ message.content.split('</think>')[-1] }}", {"thinking"}),
        ("{{ '</think>' }}", set()),
    ],
)
def test_capabilities_are_read_off_the_template(source: str, expected: set[str]) -> None:
    assert capabilities(source) == expected


def chunks(text: str, cuts: list[int]) -> list[str]:
    """The text cut at these places."""
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


def split_thinking(parts: list[str], **options: Any) -> tuple[str, str]:
    splitter = ThinkingSplitter(**options)
    pieces = [*map(splitter.push, parts), splitter.flush()]
    return "".join(thinking for thinking, _ in pieces), "".join(content for _, content in pieces)


def split_calls(parts: list[str], **options: Any) -> tuple[str, list[ToolCall]]:
    splitter = ToolCallSplitter(**options)
    pieces = [*map(splitter.push, parts), splitter.flush()]
    return "".join(content for content, _ in pieces), [call for _, calls in pieces for call in calls]


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "content"),
    [
        ("<think>\nLet me see.\n</think>\n\nBlue.", False, "Let me see.\n", "Blue."),
        ("\n <think></think>Blue.", False, "", "Blue."),
        ("Blue, <think>not</think> red.", False, "", "Blue, <think>not</think> red."),
        ("hm</think>\nBlue.", True, "hm", "Blue."),
        ("<think>a < b </thin", False, "a < b </thin", ""),
        ("  <thi", False, "", "  <thi"),
        (" Blue", False, "", " Blue"),
    ],
)
def test_thinking_is_told_from_content(text: str, opened: bool, thinking: str, content: str) -> None:
    assert split_thinking([text], opened=opened) == (thinking, content)
    assert split_thinking(list(text), opened=opened) == (thinking, content)


def test_content_is_not_held_back_longer_than_needed() -> None:
    splitter = ThinkingSplitter()
    assert splitter.push("<think>a<") == ("a", "")
    assert splitter.push("b") == ("<b", "")
    assert splitter.push("</think>c<") == ("", "c<")


@few
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", " ", "\n", "a", "</", "é🚀"]), max_size=8).map("".join),
    st.lists(st.integers(0, 60)),
    st.booleans(),
)
def test_thinking_does_not_depend_on_the_chunks(text: str, cuts: list[int], opened: bool) -> None:
    assert split_thinking(chunks(text, cuts), opened=opened) == split_thinking([text], opened=opened)


WEATHER = ToolCall("weather", {"ort": "Köln } ]"})
ARGUMENTS = '{"ort": "Köln } ]"}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
BARE = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
OPENAI = f'{{"type": "function", "function": {{"name": "weather", "parameters": {ARGUMENTS}}}}}'
STRINGS = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}]'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HERMES, "", 1),
        (f"I look.\n{HERMES}\n{HERMES}\n", "I look.\n", 2),
        (f"{HERMES} Done.", "Done.", 1),
        (HERMES.removesuffix("</tool_call>"), "", 1),
        (HERMES.removesuffix("_call>"), "", 1),
        (BARE, "", 1),
        (f"\n{OPENAI}\n{BARE}", "", 2),
        (f"Like this: {BARE}", f"Like this: {BARE}", 0),
        (f"[TOOL_CALLS][{BARE}, {BARE}]", "", 2),
        (STRINGS, "", 1),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', 0),
        ('{"answer": 42', '{"answer": 42', 0),
        ("{}", "{}", 0),
        ("<tool_call>{'name': 1}</tool_call>", "<tool_call>{'name': 1}</tool_call>", 0),
        ("<tool_call>\n<function=f>\n</tool_call>", "<tool_call>\n<function=f>\n</tool_call>", 0),
        ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', 0),
        (HERMES.replace("}\n<", "} and\n<"), HERMES.replace("}\n<", "} and\n<"), 0),
        ("[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", 0),
        ("a <tool", "a <tool", 0),
        ("  ", "  ", 0),
    ],
)
def test_calls_are_told_from_content(text: str, content: str, calls: int) -> None:
    assert split_calls([text]) == (content, [WEATHER] * calls)
    assert split_calls(list(text)) == (content, [WEATHER] * calls)


def test_calls_of_other_tools_are_content() -> None:
    assert split_calls([BARE], names={"clock"}) == (BARE, [])
    assert split_calls([BARE], names={"weather"}) == ("", [WEATHER])


def test_an_answer_in_json_is_not_held_back() -> None:
    splitter = ToolCallSplitter()
    assert splitter.push('{"answer"') == ('{"answer"', [])
    assert splitter.push(": 42") == (": 42", [])


def test_text_before_a_possible_call_is_not_held_back() -> None:
    splitter = ToolCallSplitter()
    assert splitter.push("I see. <tool") == ("I see. ", [])
    assert splitter.push("s>") == ("<tools>", [])


FRAGMENTS = [
    HERMES,
    BARE,
    STRINGS,
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "{",
    "}",
    "[",
    '"',
    "\\",
    '{"name":',
    " ",
    "\n",
    "a",
    "<",
]


@few
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), st.lists(st.integers(0, 300)))
def test_calls_do_not_depend_on_the_chunks(text: str, cuts: list[int]) -> None:
    whole = split_calls([text])
    assert split_calls(chunks(text, cuts)) == whole
    if not whole[1]:
        assert whole[0] == text
