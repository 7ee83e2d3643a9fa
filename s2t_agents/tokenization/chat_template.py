"""Chat templates, rendered with taint tracking: the origin of every character is known (``traced_text``).

The Jinja environment is that of ``apply_chat_template`` (extensions, filters, functions, sandbox), with limits of time
and memory (``bounded_jinja``).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Namespace

from ..errors import ConfigError, first_line
from .bounded_jinja import BoundedEnvironment, TemplateTooCostly, refuse_wide_format
from .traced_text import TracedStr, as_traced, concat, tainted, traced_call

_SELECTING_FILTERS = frozenset({
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
    "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
})  # fmt: skip
"""Filters that return parts of their input, which keep their origins."""

_TRACED_FILTERS = frozenset({"replace", "trim"})
"""Filters that call a method of ``TracedStr``, which tracks origins."""


MAX_TEMPLATE_CHARS = 500_000
"""Maximum length of a template's source; real ones have up to about 20,000 characters."""

NOT_VARIABLES = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "messages", "tokenize", "tools"}
)
"""Names that cannot be given to a template: what every call gives itself, and what ``apply_chat_template`` keeps."""

_HINT = "Mend it, or give another one as chat_template=..."


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as in ``tokenizer.chat_template``.

    Raises:
        ConfigError: an invalid template.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
            raise ConfigError(f"The chat template is no text of at most {MAX_TEMPLATE_CHARS:,} characters.", hint=_HINT)
        self._environment = _TracingEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template cannot be compiled, line {error.lineno}: {error.message}.", hint=_HINT
            ) from error
        except Exception as error:  # Python's compiler has limits too
            raise ConfigError(f"The chat template cannot be compiled: {first_line(error)}.", hint=_HINT) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text, with the origins of the strings that ``traced_text.Sources`` made.

        Raises:
            TemplateError: the template refuses these variables, fails on them, or renders nothing.
            TemplateTooCostly: it exceeds the limits of time or memory.
        """
        try:
            with self._environment.rendering(variables):
                rendered = self._template.render(**variables)
        except (TemplateTooCostly, TemplateError):
            raise
        except Exception as error:  # any Python error of the template's operations
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from error
        if not rendered.strip():
            raise TemplateError("it writes nothing")
        return rendered


def chat_template_of(given: str | Path | None) -> str | None:
    """A ``chat_template`` setting as a template's source.

    Args:
        given: the source itself, recognized by a brace or a line break, or the path of a file that holds it.

    Raises:
        ConfigError: no such file; not UTF-8; a source that cannot be compiled.
    """
    if given is None:
        return None
    source = str(given)
    if isinstance(given, Path) or not any(mark in source for mark in "{\n"):
        try:
            file = Path(given).expanduser()
            if not file.is_file():
                raise OSError("no such file")
            source = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template is {str(given)!r}: {first_line(error)}.",
                hint="Give a Jinja template as text, or a file that holds one.",
            ) from error
    _check_compiles(source)
    return source


def check_template_args(given: Mapping[str, Any]) -> None:
    """Refuse template variables that would have no effect.

    Raises:
        ConfigError: one of ``NOT_VARIABLES``.
    """
    for name, value in given.items():
        if name in NOT_VARIABLES and value is not None:
            raise ConfigError(
                f"template_args holds {name!r}, which is no variable that a template can be given.",
                hint="Leave it out. Messages and tools come from the call, another template as chat_template=...",
            )


@lru_cache(maxsize=32)
def _check_compiles(source: str) -> None:
    ChatTemplate(source)


def json_text(value: Any, *, ensure_ascii: bool = False, **layout: Any) -> str:
    """A value as JSON; if it contains text from outside, the whole result is tainted."""
    return tainted(json.dumps(value, ensure_ascii=ensure_ascii, **layout), value)


class _TracingCodeGenerator(CodeGenerator):
    """Jinja's code generator with a traced ``~`` operator."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.filters['s2t_made'](environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))))")


class _GenerationTag(Extension):
    """``{% generation %}``, which marks assistant text for training; its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], body).set_lineno(line)

    def _printed(self, caller: Callable[[], str]) -> str:
        return caller()


class _TracingEnvironment(BoundedEnvironment):
    code_generator_class = _TracingCodeGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_to_printable
        )
        self.filters = {name: _traced_filter(name, body) for name, body in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _PlainDict(),
            "namespace": _SafeNamespace,
        }
        self.wrap_filters()

    def concat(self, parts: Iterable[str]) -> str:
        return concat(self.check_joined(parts))

    def apply_operator(self, operator: str, left: Any, right: Any) -> Any:
        operation = self.binop_table[operator]
        return traced_call(operation, left, right) if operator == "%" else operation(left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = inspect.unwrap(__obj) if callable(__obj) else __obj  # str.format comes wrapped by the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        call = super().call
        if not isinstance(owner, str):
            return call(__context, __obj, *args, **kwargs)
        if isinstance(vars(TracedStr).get(name), FunctionType):
            return call(__context, getattr(as_traced(owner), name), *args, **kwargs)

        def plainly(text: str, *given: Any, **named: Any) -> Any:
            return call(__context, __self.getattr(str.__str__(text), name), *given, **named)

        return traced_call(plainly, owner, *args, **kwargs)


class _PlainDict:
    """``dict`` for templates, with ``fromkeys`` as its only attribute."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """Jinja's ``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # its values may be recursive


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"Chat templates cannot store {name!r} in a namespace.")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    refuse_wide_format(layout)
    return datetime.now().strftime(layout)


def _to_printable(value: Any) -> Any:
    """The value that ``{{ value }}`` renders."""
    return traced_call(str, value) if isinstance(value, dict | list | tuple) else value


def _traced_filter(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    if name in _SELECTING_FILTERS | _TRACED_FILTERS:
        return body

    @functools.wraps(body)  # and with it Jinja's mark of filters that take the context
    def traced(*args: Any, **kwargs: Any) -> Any:
        return traced_call(body, *args, **kwargs)

    return traced


@pass_environment
def _join(environment: Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    parts = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return as_traced(str(d)).join(map(str, parts))


def _to_json(x: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json_text(x, ensure_ascii=ensure_ascii, **layout)
