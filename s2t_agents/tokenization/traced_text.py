"""Taint tracking for strings: the origin of every character of a rendered template.

A chat template mixes its own control tokens with text from outside (messages, tools, documents), and a tokenizer cannot
tell them apart afterwards. So text from outside is passed to the template as ``TracedStr``, which behaves like the
plain string; every string made from it records which characters are the template's own and which come from which text.
This also shows text that was not rendered (``Sources.left_out``).

If an operation cannot be tracked by character, its whole result counts as text from outside.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex, cast

from ..errors import InputError
from .bounded_jinja import MAX_INT_BITS


class Span(NamedTuple):
    """Consecutive characters of one origin.

    Attributes:
        length: in characters.
        sources: numbers of the texts from outside that they come from; empty for the template's own.
        start: offset in the source; None if the characters cannot be matched one by one.
    """

    length: int
    sources: frozenset[int] = frozenset()
    start: int | None = None


class TracedStr(str):
    """A string with the origin of its characters. Equal to, and hashed like, the plain string."""

    __slots__ = ("_spans",)
    _spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span]) -> TracedStr:
        """A string with the origins of its characters, in order."""
        made = super().__new__(cls, text)
        made._spans = tuple(spans)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedStr, (_plain(self), self._spans)

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._slice(start, stop)
            return concat(self._slice(at, at + 1) for at in range(start, stop, step))
        at = range(len(self))[key]
        return self._slice(at, at + 1)

    def __iter__(self) -> Iterator[str]:
        return (self._slice(at, at + 1) for at in range(len(self)))

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        return concat([self] * times.__index__())

    __rmul__ = __mul__

    def strip(self, chars: str | None = None) -> str:
        """As ``str.strip``."""
        return self.rstrip(chars).lstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        """As ``str.lstrip``."""
        return self._slice(len(self) - len(_plain(self).lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        """As ``str.rstrip``."""
        return self._slice(0, len(_plain(self).rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> str:
        """As ``str.removeprefix``."""
        return self._slice(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """As ``str.removesuffix``."""
        return self._slice(0, len(_plain(self).removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As ``str.split``."""
        return self._locate_pieces(_plain(self).split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As ``str.rsplit``."""
        return self._locate_pieces(_plain(self).rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As ``str.splitlines``."""
        whole = self._locate_pieces(_plain(self).splitlines(True), 0)
        plain = _plain(self).splitlines(keepends)
        return [line[: len(kept)] for line, kept in zip(whole, plain, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As ``str.partition``."""
        return cast("tuple[str, str, str]", tuple(self._locate_pieces(_plain(self).partition(sep), 0)))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As ``str.rpartition``."""
        return cast("tuple[str, str, str]", tuple(self._locate_pieces(_plain(self).rpartition(sep), 0)))

    def join(self, parts: Iterable[str], /) -> str:
        """As ``str.join``."""
        traced: list[str] = []
        for part in parts:
            traced += [self, part] if traced else [part]
        return concat(traced)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override, unused-ignore]
        """As ``str.replace``."""
        if not old:
            return str(traced_call(lambda text, by: text.replace("", by, count), self, new))
        return as_traced(new).join(self.split(old, count))

    def _slice(self, start: int, stop: int) -> TracedStr:
        """The characters from ``start`` to ``stop``, with their origins."""
        spans, at = [], 0
        for span in self._spans:
            low, high = max(start, at), min(stop, at + span.length)
            if low < high:
                spans.append(Span(high - low, span.sources, None if span.start is None else span.start + low - at))
            at += span.length
        return TracedStr(_plain(self)[start:stop], spans)

    def _locate_pieces(self, pieces: Iterable[str], apart: int) -> list[str]:
        """Substrings of this string, given in order and at least ``apart`` characters apart, with their origins."""
        traced: list[str] = []
        at = 0
        for piece in pieces:
            at = _plain(self).find(piece, at)
            traced.append(self._slice(at, at + len(piece)))
            at += len(piece) + apart
        return traced


def as_traced(text: str) -> TracedStr:
    """The string as a ``TracedStr``; a plain one is the template's own."""
    return text if isinstance(text, TracedStr) else TracedStr(text, [Span(len(text))] if text else ())


def concat(parts: Iterable[str]) -> str:
    """The parts joined; a plain string if nothing comes from outside."""
    parts = list(parts)
    if not any(isinstance(part, TracedStr) for part in parts):
        return "".join(parts)
    spans: list[Span] = []
    for part in parts:
        for span in as_traced(part)._spans:
            last = spans[-1] if spans else None
            if last and last.sources == span.sources and _follows(last, span):
                spans[-1] = last._replace(length=last.length + span.length)
            else:
                spans.append(span)
    return TracedStr("".join(map(_plain, parts)), spans)


def tainted(text: str, *inputs: Any) -> str:
    """The text, tainted as a whole if any of the inputs contains text from outside."""
    sources = _sources(inputs)
    return TracedStr(_plain(text), [Span(len(text), sources)]) if sources and text else text


def traced_call(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The traced result of an operation on plain strings.

    It is run twice: on the plain strings, and on placeholders for those from outside. If replacing the placeholders
    gives the same result, each character keeps its origin; otherwise the result is tainted as a whole. A result that is
    neither a string nor a list of strings is passed on.

    Raises:
        TypeError: the result is bytes, whose origin cannot be tracked.
    """
    if not _sources((args, kwargs)):
        return operation(*args, **kwargs)
    result = operation(*_map_traced(args, _plain), **_map_traced(kwargs, _plain))
    if isinstance(result, bytes):
        raise TypeError("text from outside cannot be followed through bytes")
    pieces = result if isinstance(result, list | tuple) else (result,)
    texts: list[TracedStr] = []

    def placeholder_of(text: TracedStr) -> str:
        texts.append(text)
        return f"\ue000{len(texts) - 1}\ue001"

    try:
        again = operation(*_map_traced(args, placeholder_of), **_map_traced(kwargs, placeholder_of))
    except (TypeError, ValueError, LookupError):
        again = None
    others = again if isinstance(again, list | tuple) else (again,)
    fit = len(others) == len(pieces)
    traced = [_restore_origins(piece, others[at] if fit else None, texts) for at, piece in enumerate(pieces)]
    traced = [tainted(piece, args, kwargs) if type(piece) is str else piece for piece in traced]
    return traced[0] if pieces is not result else traced


def template_spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each span of the template's own characters, in order."""
    at = 0
    for span in as_traced(text)._spans:
        if not span.sources:
            yield at, at + span.length
        at += span.length


class Sources:
    """Registers the texts from outside of one rendering, by number."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str, int]] = []
        """Text, its label for messages, and the first character that must be rendered."""
        self._framed: set[int] = set()

    def text(self, text: str, where: str, *, needed_from: int = 0, framed: bool = False) -> TracedStr:
        """Register a string from outside.

        Args:
            text: the string.
            where: what it belongs to, for messages.
            needed_from: the first character that must be rendered.
            framed: whether it must stay between the tags that a template writes around it.

        Raises:
            InputError: not valid text, see ``check_text``.
        """
        if isinstance(text, TracedStr):
            return text
        check_text(text, where)
        number = len(self._texts)
        self._texts.append((text, where, needed_from))
        if framed:
            self._framed.add(number)
        return TracedStr(text, [Span(len(text), frozenset({number}), 0)] if text else ())

    def is_framed(self, text: str) -> bool:
        """Whether any character comes from a text that must stay between a template's tags."""
        return not self._framed.isdisjoint(_sources(text))

    def value(self, value: Any, where: str, needed: Callable[[tuple[str, ...], bool], bool], *path: str) -> Any:
        """A JSON value with all strings in it, including keys, registered as framed.

        JSON has no infinity: the largest number stands for it, and null for what is no number.

        Args:
            value: the value.
            where: what it belongs to, for messages.
            needed: from a path of keys, and whether its key (True) or its string value (False) is meant, to whether
                that must be rendered.
            path: the keys that lead to the value.

        Raises:
            InputError: not valid text, see ``check_text``; a value that is not JSON; an integer of more than
                ``MAX_INT_BITS`` bits.
        """
        if isinstance(value, str):
            return self.text(value, where, needed_from=0 if needed(path, False) else len(value), framed=True)
        if isinstance(value, Mapping):
            traced = {}
            for key, item in value.items():
                below = (*path, str(key))
                needed_from = 0 if needed(below, True) else len(str(key))
                name = self.text(str(key), where, needed_from=needed_from, framed=True)
                traced[name] = self.value(item, where, needed, *below)
            return traced
        if isinstance(value, list | tuple):
            return [self.value(item, where, needed, *path) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise InputError(
                f"{where} holds an integer of {value.bit_length():,} bits; {MAX_INT_BITS:,} fit.",
                hint="Give it as text.",
            )
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"{where} holds a {type(value).__name__}, which is no JSON.", hint="Convert it to text.")

    def left_out(self, rendered: str) -> list[str]:
        """Labels of the texts that are not completely in a rendering, apart from white space."""
        whole: set[int] = set()
        rendered_parts: dict[int, list[tuple[int, int]]] = {}
        for span in as_traced(rendered)._spans:
            if span.start is None:
                whole |= span.sources
            else:
                for source in span.sources:
                    rendered_parts.setdefault(source, []).append((span.start, span.start + span.length))
        return list(
            dict.fromkeys(
                where
                for number, (text, where, needed_from) in enumerate(self._texts)
                if number not in whole and _hides_text(text, needed_from, rendered_parts.get(number, ()))
            )
        )


def check_text(text: str, where: str) -> str:
    """The text itself, if it is valid.

    Raises:
        InputError: it contains a lone surrogate or a NUL character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds a lone surrogate at character {error.start}: it is not Unicode text.",
            hint='Clean it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").',
        ) from None
    if (at := text.find("\0")) >= 0:
        raise InputError(
            f"{where} holds a NUL character at position {at}.", hint=r'Clean it with text.replace("\0", "").'
        )
    return text


def _plain(text: str) -> str:
    return str.__str__(text)


def _follows(last: Span, span: Span) -> bool:
    return (
        last.start is None if span.start is None else last.start is not None and last.start + last.length == span.start
    )


def _sources(value: Any) -> frozenset[int]:
    """Numbers of all sources in a value, at any depth."""
    if isinstance(value, TracedStr):
        return frozenset().union(*(span.sources for span in value._spans))
    if isinstance(value, dict):
        return _sources([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return frozenset().union(*map(_sources, value))
    return frozenset()


def _map_traced(value: Any, change: Callable[[TracedStr], str]) -> Any:
    """A value with its traced strings replaced, at any depth."""
    if isinstance(value, TracedStr):
        return change(value)
    if isinstance(value, dict):
        return {_map_traced(key, change): _map_traced(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            [_map_traced(item, change) for item in value]
            if isinstance(value, list)
            else tuple(_map_traced(item, change) for item in value)
        )
    return value


def _restore_origins(piece: Any, other: Any, texts: list[TracedStr]) -> Any:
    """A string with the origins that its version with placeholders gives; the plain string if they do not match."""
    if not isinstance(piece, str):
        return piece
    whole = concat(_split_placeholders(other, texts)) if isinstance(other, str) else None
    return as_traced(whole) if whole is not None and whole == piece else _plain(piece)


def _split_placeholders(text: str, texts: list[TracedStr]) -> Iterator[str]:
    """The parts of a text with placeholders, and the strings that the placeholders stand for."""
    for number, piece in enumerate(text.split("\ue000")):
        name, closed, rest = piece.partition("\ue001")
        if number and closed and name.isdecimal() and int(name) < len(texts):
            yield from (texts[int(name)], rest)
        else:
            yield ("\ue000" if number else "") + piece


def _hides_text(text: str, start: int, rendered_parts: Iterable[tuple[int, int]]) -> bool:
    for low, high in sorted(rendered_parts):
        if text[start:low].strip():
            return True
        start = max(start, high)
    return bool(text[start:].strip())
