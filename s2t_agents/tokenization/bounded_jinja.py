"""Jinja as chat templates use it, in bounded time and memory: a template comes with a model, from whoever made it.

transformers renders in Jinja's immutable sandbox, which keeps a template from reaching out and sets no limit on what it
computes: ``9**999999999``, nested loops or ``x ~ x`` in a loop never end. Here

* every loop turn, call, filter and operator looks at the thread's CPU clock;
* every text, list and number that a step makes is measured: each one, and all together;
* what grows beyond that in one step (powers, repetitions, paddings, replacements) is reckoned before it is done.

So a template ends within ``SECONDS`` and one more step over values of bounded size, whatever it says.
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

SECONDS = 2.0
"""CPU time of one rendering; real ones take milliseconds."""

LARGEST = 16_000_000
"""Characters, or elements, of one value, beside those of what is rendered."""

IN_ALL = 16
"""Times that much for all values of one rendering together."""

BITS = 4096
"""Of the largest integer."""

WIDTH = 1000
"""Of an indentation or a padding."""

_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})|\d{5}")
_DROPPED = {"urlize", "wordwrap", "striptags", "xmlattr", "pprint"}
_WIDTHS = {"indent", "center", "truncate", "round", "tojson", "batch", "slice"}


class TooCostly(ConfigError):
    """A chat template that takes more time or memory than any rendering needs."""


def _refused(what: str) -> TooCostly:
    return TooCostly(f"The chat template {what}.", hint="Give another one as chat_template=...")


class Meter:
    """What one rendering may still cost.

    Args:
        given: characters and elements of what is rendered.
    """

    def __init__(self, given: int = 0) -> None:
        self._largest = LARGEST + 8 * given
        self._left = IN_ALL * self._largest
        self._until = time.thread_time() + SECONDS
        self._sizes: dict[int, tuple[Any, int]] = {}  # by id; the values are kept so that no id comes twice

    def tick(self) -> None:
        """One more step."""
        if time.thread_time() > self._until:
            raise _refused(f"takes more than {SECONDS:.0f} s")

    def expect(self, size: int) -> None:
        """A step is about to make a value of so many characters or elements."""
        if size > self._largest:
            raise _refused(f"makes a text or list of more than {self._largest:,} characters")

    def made(self, value: Any) -> Any:
        """A step has made this value."""
        size = self.size(value)
        self.expect(size)
        self._left -= size
        if self._left < 0:
            raise _refused("makes more text than any conversation needs")
        return value

    def size(self, value: Any) -> int:
        """Characters and elements, those of what it holds included."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > BITS:
                raise _refused(f"makes a number of more than {BITS} bits")
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
    """Jinja's sandbox with limits. Whoever inherits it adds its own filters and calls ``bound`` last."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = threading.local()
        del self.globals["lipsum"]

    def bound(self) -> None:
        """Put every filter, and what is printed, under the meter."""
        self.filters = {name: self._bounded(name, each) for name, each in self.filters.items() if name not in _DROPPED}
        self.filters |= {"s2t_tick": self._tick_filter, "s2t_made": self._made}
        printable = self.finalize or (lambda value: value)
        self.finalize = lambda value: printable(self.meter.made(value))

    @contextmanager
    def rendering(self, given: Mapping[str, Any]) -> Iterator[None]:
        """What this thread renders in this block has one meter."""
        meter = Meter()
        self._local.meter = Meter(meter.size(dict(given)))
        try:
            yield
        finally:
            self._local.meter = None

    @property
    def meter(self) -> Meter:
        """Of the rendering under way; of its own when a template is compiled and its constants are folded."""
        return getattr(self._local, "meter", None) or Meter()

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Sandboxed as before, and measured."""
        meter = __self.meter
        meter.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = __self._checked(__obj.__name__, owner, args, kwargs)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Sandboxed as before, and measured."""
        meter = self.meter
        meter.tick()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 1) > BITS:
            raise _refused(f"makes a number of more than {BITS} bits")
        if operator == "*" and not numbers:
            times = [each for each in (left, right) if isinstance(each, int)]
            meter.expect(max(times, default=1) * max(meter.size(left), meter.size(right)))
        if operator == "%" and isinstance(left, str):
            refuse_widths(left)
        return meter.made(self.operated(operator, left, right))

    def operated(self, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, once it is known to be of bounded size."""
        return self.binop_table[operator](left, right)

    def joined(self, parts: Iterable[str]) -> list[str]:
        """Parts that are to be one text, once it is known to be of bounded size."""
        told = list(parts)
        self.meter.expect(sum(map(len, told)))
        return told

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """By ``select`` and its kin, over many values."""
        self.meter.tick()
        return super().call_test(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` without paddings of any width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            for text in (value.__self__, *map(str, args), *map(str, kwargs.values())):
                if "{" in value.__self__ and ":" in value.__self__:
                    refuse_widths(text)
            self.meter.expect(sum(map(self.meter.size, (*args, *kwargs.values()))) * (1 + value.__self__.count("{")))
            return self.meter.made(wrapped(*args, **kwargs))  # type: ignore[no-any-return]

        return checked

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Jinja's hook before code is made of a template."""
        _Metered().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def _made(self, value: Any) -> Any:
        return self.meter.made(value)

    @pass_context
    def _tick_filter(self, context: Context, chars: int) -> str:
        self.meter.tick()
        self.meter.made("x" * chars)
        return ""

    def _bounded(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that looks at clock and sizes."""
        passed = 1 if hasattr(made, "jinja_pass_arg") else 0

        @functools.wraps(made)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.tick()
            lead, values = args[:passed], args[passed:]
            if name in _WIDTHS and any(type(each) is int and each > WIDTH for each in (*values[1:], *kwargs.values())):
                raise _refused(f"asks the filter {name} for more than {WIDTH}")
            if values and isinstance(values[0], str):
                values = (values[0], *self._checked(name, values[0], values[1:], kwargs))
            elif name == "join" and values and not isinstance(values[0], jinja2.Undefined):
                items = list(values[0])
                meter.expect(meter.size(items) + len(items) * sum(meter.size(each) for each in values[1:2]))
                values = (items, *values[1:])
            elif name == "sum" and (len(values) > 2 or "start" in kwargs):
                items = list(values[0])
                meter.expect(len(items) * meter.size(items))  # each addition copies what it has so far
                values = (items, *values[1:])
            return meter.made(made(*lead, *values, **kwargs))

        return bounded

    def _checked(self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a text's method, or of the filter of that name, once its result cannot be too large."""
        expect, size = self.meter.expect, self.meter.size
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
            refuse_widths(text)
            expect(len(text) + text.count("%") * sum(map(size, given)))
        return args


class _Metered(NodeTransformer):
    """Puts the meter into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filter("s2t_made", self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filter("s2t_made", self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter("s2t_made", node) if node.ctx == "load" else node

    def _ticking(self, node: Any) -> nodes.Node:
        chars = sum(len(each.data) for part in node.body for each in _data_in(part))
        self.generic_visit(node)
        tick = _filter("s2t_tick", nodes.Const(chars, lineno=node.lineno))
        node.body = [nodes.ExprStmt(tick, lineno=node.lineno), *node.body]
        return node  # type: ignore[no-any-return]


def _data_in(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def refuse_widths(text: str) -> None:
    """Refuse a format that pads a text to more than any line."""
    if _WIDE.search(text):
        raise _refused("pads a text to more than any line")
