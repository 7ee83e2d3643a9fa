"""A Jinja environment for untrusted chat templates, with limits of time and memory.

transformers renders in Jinja's immutable sandbox, which restricts access but not computation: ``9**999999999``, nested
loops or ``x ~ x`` in a loop do not end. Here

* every loop iteration, call, filter and operator checks the thread's CPU time;
* the size of every text, list and number that a step makes is limited, each one and all together;
* operations whose result can be much larger than their input (powers, repetitions, paddings, replacements) are checked
  before they run.

So a template ends within ``MAX_CPU_SECONDS`` plus one step over values of bounded size.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import ConfigError

MAX_CPU_SECONDS = 2.0
"""CPU time of one rendering in seconds; real ones take milliseconds."""

MAX_VALUE_SIZE = 16_000_000
"""Characters or elements of one value, in addition to those of the input."""

TOTAL_FACTOR = 16
"""Factor of that limit for all values of one rendering together."""

MAX_INT_BITS = 4096
"""Bits of an integer."""

MAX_WIDTH = 1000
"""Characters of an indentation or a padding."""

_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})|\d{5}")
_REMOVED_FILTERS = {"urlize", "wordwrap", "striptags", "xmlattr", "pprint"}
_WIDTH_FILTERS = {"indent", "center", "truncate", "round", "tojson", "batch", "slice"}


class TemplateTooCostly(ConfigError):
    """A chat template that exceeds the limits of time or memory."""


def _limit_error(what: str) -> TemplateTooCostly:
    return TemplateTooCostly(f"The chat template {what}.", hint="Give another one as chat_template=...")


class RenderLimits:
    """Remaining time and memory of one rendering.

    Args:
        given: characters and elements of the input.
    """

    def __init__(self, given: int = 0) -> None:
        self._largest = MAX_VALUE_SIZE + 8 * given
        self._left = TOTAL_FACTOR * self._largest
        self._until = time.thread_time() + MAX_CPU_SECONDS
        self._sizes: dict[int, tuple[Any, int]] = {}  # by id(); keeps the values alive so that no id is reused

    def tick(self) -> None:
        """Check the CPU time before a step."""
        if time.thread_time() > self._until:
            raise _limit_error(f"takes more than {MAX_CPU_SECONDS:.0f} s")

    def expect(self, size: int) -> None:
        """Check the size of a value, in characters or elements, before it is made."""
        if size > self._largest:
            raise _limit_error(f"makes a text or list of more than {self._largest:,} characters")

    def made(self, value: Any) -> Any:
        """Count a value that a step has made, and return it."""
        size = self.size(value)
        self.expect(size)
        self._left -= size
        if self._left < 0:
            raise _limit_error("makes more text than any conversation needs")
        return value

    def size(self, value: Any) -> int:
        """Characters and elements of a value, nested ones included."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise _limit_error(f"makes a number of more than {MAX_INT_BITS} bits")
            return 1
        if isinstance(value, KeysView | ValuesView | ItemsView):
            value = list(value)
        if not isinstance(value, list | tuple | dict):
            return 1
        if id(value) not in self._sizes:
            held = [*value, *value.values()] if isinstance(value, dict) else value
            self._sizes[id(value)] = value, 1 + sum(1 + self.size(each) for each in held)
        return self._sizes[id(value)][1]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits. A subclass adds its filters first and then calls ``wrap_filters``."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = threading.local()
        del self.globals["lipsum"]

    def wrap_filters(self) -> None:
        """Apply the limits to every filter and to rendered values."""
        self.filters = {
            name: self._limited_filter(name, each)
            for name, each in self.filters.items()
            if name not in _REMOVED_FILTERS
        }
        self.filters |= {"s2t_tick": self._tick_filter, "s2t_made": lambda value: self.limits.made(value)}
        printable = self.finalize or (lambda value: value)
        self.finalize = lambda value: printable(self.limits.made(value))

    @contextmanager
    def rendering(self, given: Mapping[str, Any]) -> Iterator[None]:
        """One set of limits for what this thread renders in this block."""
        limits = RenderLimits()
        self._local.limits = RenderLimits(limits.size(dict(given)))
        try:
            yield
        finally:
            self._local.limits = None

    @property
    def limits(self) -> RenderLimits:
        """The limits of the current rendering; new ones while a template is compiled (constant folding)."""
        return getattr(self._local, "limits", None) or RenderLimits()

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Sandboxed as before, and measured."""
        limits = __self.limits
        limits.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = __self._check_text_method(__obj.__name__, owner, args, kwargs)
        return limits.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Sandboxed as before, and measured."""
        limits = self.limits
        limits.tick()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 1) > MAX_INT_BITS:
            raise _limit_error(f"makes a number of more than {MAX_INT_BITS} bits")
        if operator == "*" and not numbers:
            times = [each for each in (left, right) if isinstance(each, int)]
            limits.expect(max(times, default=1) * max(limits.size(left), limits.size(right)))
        if operator == "%" and isinstance(left, str):
            refuse_wide_format(left)
        return limits.made(self.apply_operator(operator, left, right))

    def apply_operator(self, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator whose size was checked."""
        return self.binop_table[operator](left, right)

    def check_joined(self, parts: Iterable[str]) -> list[str]:
        """The parts of a concatenation, after a check of the total size."""
        texts = list(parts)
        self.limits.expect(sum(map(len, texts)))
        return texts

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """Called by ``select`` and similar filters for each value."""
        self.limits.tick()
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` with limited padding."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            for text in (value.__self__, *map(str, args), *map(str, kwargs.values())):
                if "{" in value.__self__ and ":" in value.__self__:
                    refuse_wide_format(text)
            self.limits.expect(sum(map(self.limits.size, (*args, *kwargs.values()))) * (1 + value.__self__.count("{")))
            return self.limits.made(wrapped(*args, **kwargs))  # type: ignore[no-any-return]

        return checked

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Jinja's hook before code generation: inserts the checks into the syntax tree."""
        _LimitInserter().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    @pass_context
    def _tick_filter(self, context: Context, chars: int) -> str:
        self.limits.tick()
        self.limits.made("x" * chars)
        return ""

    def _limited_filter(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with checks of time and size."""
        passed = 1 if hasattr(made, "jinja_pass_arg") else 0

        @functools.wraps(made)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            limits = self.limits
            limits.tick()
            lead, values = args[:passed], args[passed:]
            if name in _WIDTH_FILTERS and any(
                type(each) is int and each > MAX_WIDTH for each in (*values[1:], *kwargs.values())
            ):
                raise _limit_error(f"asks the filter {name} for more than {MAX_WIDTH}")
            if values and isinstance(values[0], str):
                values = (values[0], *self._check_text_method(name, values[0], values[1:], kwargs))
            elif name == "join" and values and not isinstance(values[0], jinja2.Undefined):
                items = list(values[0])
                limits.expect(limits.size(items) + len(items) * sum(limits.size(each) for each in values[1:2]))
                values = (items, *values[1:])
            elif name == "sum" and (len(values) > 2 or "start" in kwargs):
                items = list(values[0])
                limits.expect(len(items) * limits.size(items))  # each addition copies what it has so far
                values = (items, *values[1:])
            return limits.made(made(*lead, *values, **kwargs))

        return bounded

    def _check_text_method(
        self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments of a string method, or of the filter of that name, after a check of the result's size."""
        expect, size = self.limits.expect, self.limits.size
        given = (*args, *kwargs.values())
        if name == "replace" and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            expect((text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join" and args:
            items = list(args[0])
            expect(size(items) + len(items) * len(text))
            return (items, *args[1:])
        elif name in {"ljust", "rjust", "center", "zfill"}:
            expect(max((each for each in given if isinstance(each, int)), default=0))
        elif name in {"expandtabs", "indent"}:
            width = max((each if isinstance(each, int) else size(each) for each in given), default=8)
            expect(len(text) + (text.count("\t") + text.count("\n") + 1) * width)
        elif name == "translate":
            expect(len(text) * max(map(size, given), default=1))
        elif name == "format":
            refuse_wide_format(text)
            expect(len(text) + text.count("%") * sum(map(size, given)))
        return args


class _LimitInserter(NodeTransformer):
    """Inserts the checks into a template's syntax tree."""

    def visit_For(self, node: Any) -> nodes.Node:
        chars = sum(len(each.data) for part in node.body for each in _template_data_in(part))
        self.generic_visit(node)
        tick = _filter("s2t_tick", nodes.Const(chars, lineno=node.lineno))
        node.body = [nodes.ExprStmt(tick, lineno=node.lineno), *node.body]
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_For

    def visit_List(self, node: nodes.Node) -> nodes.Node:
        return _filter("s2t_made", self.generic_visit(node))

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter("s2t_made", node) if node.ctx == "load" else node


def _template_data_in(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def refuse_wide_format(text: str) -> None:
    """Refuse a format string with a padding of 5 or more digits."""
    if _WIDE_FORMAT.search(text):
        raise _limit_error("pads a text to more than any line")
