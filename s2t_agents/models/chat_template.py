"""Chat templates, rendered so that the origin of every character is known (``traced``).

The environment is that of ``apply_chat_template``: same extensions, filters and functions, in Jinja's sandbox.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from types import FunctionType
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import ConfigError
from .traced import Traced, blurred, concat, followed, own

_SELECTING = frozenset({
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
    "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
})  # fmt: skip
"""Filters that give back pieces of what they were given."""

_EXACT = frozenset({"replace", "trim"})
"""Filters that call one method of ``Traced``."""


class ChatTemplate:
    """A chat template's source, compiled.

    Args:
        source: Jinja, as in ``tokenizer.chat_template``.
        as_json: last change to the JSON text of a value from outside, which must leave it the same value.

    Raises:
        ConfigError: a source that is no template.
    """

    def __init__(self, source: str, *, as_json: Callable[[str], str] = lambda text: text) -> None:
        environment = _Environment(as_json)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, SyntaxError, RecursionError) as error:
            raise ConfigError(
                f"The chat template cannot be compiled: {error}", hint="Correct tokenizer.chat_template."
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text; strings from outside are known in it by what ``traced.Sources`` made of them.

        Raises:
            Exception: whatever the template raises; ``jinja2.TemplateError`` where it refuses on purpose.
        """
        return self._template.render(**variables)


def json_text(value: Any, *, ensure_ascii: bool = False, **layout: Any) -> str:
    """A value as JSON; where it holds text from outside, all of it counts as such."""
    return blurred(json.dumps(value, ensure_ascii=ensure_ascii, **layout), value)


class _Code(CodeGenerator):
    """Jinja's code, but for ``~``, which joins plain strings there."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words in training; here they are printed as they are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], body).set_lineno(line)

    def _printed(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    concat = staticmethod(concat)
    intercepted_binops = frozenset({"%"})

    def __init__(self, as_json: Callable[[str], str]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_printable
        )
        self.filters = {name: _traced_filter(name, body) for name, body in self.filters.items()}
        self.filters["tojson"] = functools.partial(_to_json, as_json)
        self.filters["join"] = _join
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return followed(self.binop_table[operator], left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped by the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        call = super().call
        if not isinstance(owner, str):
            return call(__context, __obj, *args, **kwargs)
        if isinstance(vars(Traced).get(name), FunctionType):
            return call(__context, getattr(own(owner), name), *args, **kwargs)

        def plainly(text: str, *given: Any, **named: Any) -> Any:
            return call(__context, __self.getattr(str.__str__(text), name), *given, **named)

        return followed(plainly, owner, *args, **kwargs)


class _Dict:
    """``dict`` without its other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"Chat templates cannot store {name!r} in a namespace.")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _printable(value: Any) -> Any:
    """What ``{{ value }}`` prints."""
    return followed(str, value) if isinstance(value, dict | list | tuple) else value


def _traced_filter(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    if name in _SELECTING | _EXACT:
        return body

    @functools.wraps(body)  # and with it Jinja's mark of filters that take the context
    def traced(*args: Any, **kwargs: Any) -> Any:
        return followed(body, *args, **kwargs)

    return traced


@pass_environment
def _join(environment: Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    parts = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return own(str(d)).join(map(str, parts))


def _to_json(as_json: Callable[[str], str], x: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    text = json_text(x, ensure_ascii=ensure_ascii, **layout)
    return blurred(as_json(str.__str__(text)), text) if isinstance(text, Traced) else text
