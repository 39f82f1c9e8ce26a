"""The jinja2 environment of chat templates: Hugging Face's conventions, no way into Python, a bound on work.

Templates come with model files and are untrusted. Conventions: transformers ``utils/chat_template_utils.py``.
"""

import contextlib
import contextvars
import datetime
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000  # loop passes of one rendering, of which a thousand messages take some ten thousand
CALL_STEPS = 10  # a call takes as long as some ten loop passes
MAX_LENGTH = 50_000_000  # characters or items of anything a template builds with + or *
MAX_BITS = 100_000  # of a number

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps_left")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the work of the rendering inside; SecurityError once it is used up."""
    token = _steps_left.set([MAX_STEPS])
    try:
        yield
    finally:
        _steps_left.reset(token)


def _charge(steps: int) -> None:
    left = _steps_left.get([MAX_STEPS])
    left[0] -= steps
    if left[0] < 0:
        raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")


@pass_context  # so that the compiler never evaluates it beforehand
def _charged(_: Context, items: Iterable[Any]) -> Iterable[Any]:
    counted = items if isinstance(items, Sized) else list(itertools.islice(items, MAX_STEPS + 1))
    _charge(len(counted))
    return counted


class _Generation(Extension):
    """``{% generation %}`` marks what a model wrote, for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """``namespace()`` without underscored names, which could reach CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works, as in jinja2
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template cannot store the name {name!r}")


class _Dict:
    """``dict()`` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Counts loop passes and calls, and refuses to build huge values."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_charged", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as in jinja2)
        _charge(CALL_STEPS)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _too_big(operator, left, right):
            raise SecurityError("the template builds a huge value")
        return super().call_binop(context, operator, left, right)


def _too_big(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        return bits > MAX_BITS
    sizes = [len(side) if isinstance(side, Sized) else side for side in (left, right)]
    if not all(isinstance(size, int) for size in sizes):
        return False
    return bool((sizes[0] * sizes[1] if operator == "*" else sizes[0] + sizes[1]) > MAX_LENGTH)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.cache
def _environment() -> TemplateSandbox:
    sandbox = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters |= {"tojson": _tojson, "_charged": _charged}
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace}
    return sandbox


def compile_template(source: str) -> Callable[..., str]:
    """The function that renders a template with the variables given by keyword. Raises jinja2's TemplateSyntaxError."""
    return _environment().from_string(source).render
