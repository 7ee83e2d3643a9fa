"""Strings that know where each of their characters came from.

A chat template mixes its own control tokens with strings from outside, and afterwards a tokenizer cannot tell them
apart. So strings from outside go into the template as ``Traced``: to every test, comparison and lookup they are the
plain strings they are, and every string made of them says which characters are the template's own and which text from
outside was printed, or left out (``Sources.left_out``).

What an operation cannot follow character by character counts as text from outside as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex, cast

from ..errors import InputError


class Run(NamedTuple):
    """Characters of one origin.

    Attributes:
        length: in characters.
        sources: numbers of the texts from outside that they come from; none where they are the template's own.
        start: where in its one source they begin; None where they cannot be matched one by one.
    """

    length: int
    sources: frozenset[int] = frozenset()
    start: int | None = None


class Traced(str):
    """A string with the origin of its characters. Equal to, and hashed like, the plain string."""

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run]) -> Traced:
        """The string, and the origins of its characters in order."""
        made = super().__new__(cls, text)
        made._runs = tuple(runs)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Traced, (_plain(self), self._runs)

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._cut(start, stop)
            return concat(self._cut(at, at + 1) for at in range(start, stop, step))
        at = range(len(self))[key]
        return self._cut(at, at + 1)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(at, at + 1) for at in range(len(self)))

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
        return self._cut(len(self) - len(_plain(self).lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        """As ``str.rstrip``."""
        return self._cut(0, len(_plain(self).rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> str:
        """As ``str.removeprefix``."""
        return self._cut(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """As ``str.removesuffix``."""
        return self._cut(0, len(_plain(self).removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As ``str.split``."""
        return self._located(_plain(self).split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As ``str.rsplit``."""
        return self._located(_plain(self).rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As ``str.splitlines``."""
        whole = self._located(_plain(self).splitlines(True), 0)
        plain = _plain(self).splitlines(keepends)
        return [line[: len(kept)] for line, kept in zip(whole, plain, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As ``str.partition``."""
        return cast("tuple[str, str, str]", tuple(self._located(_plain(self).partition(sep), 0)))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As ``str.rpartition``."""
        return cast("tuple[str, str, str]", tuple(self._located(_plain(self).rpartition(sep), 0)))

    def join(self, parts: Iterable[str], /) -> str:
        """As ``str.join``."""
        told: list[str] = []
        for part in parts:
            told += [self, part] if told else [part]
        return concat(told)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override, unused-ignore]
        """As ``str.replace``."""
        if not old:
            return str(followed(lambda text, by: text.replace("", by, count), self, new))
        return own(new).join(self.split(old, count))

    def _cut(self, start: int, stop: int) -> Traced:
        """The characters from ``start`` to ``stop``, with their origins."""
        runs, at = [], 0
        for run in self._runs:
            low, high = max(start, at), min(stop, at + run.length)
            if low < high:
                runs.append(Run(high - low, run.sources, None if run.start is None else run.start + low - at))
            at += run.length
        return Traced(_plain(self)[start:stop], runs)

    def _located(self, pieces: Iterable[str], apart: int) -> list[str]:
        """Pieces of this string in the order in which they stand in it, ``apart`` or more characters between them."""
        told: list[str] = []
        at = 0
        for piece in pieces:
            at = _plain(self).find(piece, at)
            told.append(self._cut(at, at + len(piece)))
            at += len(piece) + apart
        return told


def own(text: str) -> Traced:
    """The template's own text, in the same clothes."""
    return text if isinstance(text, Traced) else Traced(text, [Run(len(text))] if text else ())


def concat(parts: Iterable[str]) -> str:
    """The parts in one string; a plain one if nothing in it comes from outside."""
    parts = list(parts)
    if not any(isinstance(part, Traced) for part in parts):
        return "".join(parts)
    runs: list[Run] = []
    for part in parts:
        for run in own(part)._runs:
            last = runs[-1] if runs else None
            if last and last.sources == run.sources and _follows(last, run):
                runs[-1] = last._replace(length=last.length + run.length)
            else:
                runs.append(run)
    return Traced("".join(map(_plain, parts)), runs)


def blurred(text: str, *inputs: Any) -> str:
    """A string made of these inputs: text from outside as a whole, if anything in them is."""
    sources = _sources(inputs)
    return Traced(_plain(text), [Run(len(text), sources)]) if sources and text else text


def followed(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of an operation that knows only plain strings, traced.

    It is run on plain strings, and then with stand-ins for those from outside. Where they can be put back, each
    character keeps its origin; elsewhere the result counts as text from outside. A result that is neither a string nor
    a list of strings is passed on.

    Raises:
        TypeError: bytes, which no origin is known of.
    """
    if not _sources((args, kwargs)):
        return operation(*args, **kwargs)
    result = operation(*_mapped(args, _plain), **_mapped(kwargs, _plain))
    if isinstance(result, bytes):
        raise TypeError("text from outside cannot be followed through bytes")
    pieces = result if isinstance(result, list | tuple) else (result,)
    texts: list[Traced] = []

    def stand_in(text: Traced) -> str:
        texts.append(text)
        return f"\ue000{len(texts) - 1}\ue001"

    try:
        again = operation(*_mapped(args, stand_in), **_mapped(kwargs, stand_in))
    except (TypeError, ValueError, LookupError):
        again = None
    others = again if isinstance(again, list | tuple) else (again,)
    fit = len(others) == len(pieces)
    told = [_restored(piece, others[at] if fit else None, texts) for at, piece in enumerate(pieces)]
    told = [blurred(piece, args, kwargs) if type(piece) is str else piece for piece in told]
    return told[0] if pieces is not result else told


def own_stretches(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of characters that are the template's own, in order."""
    at = 0
    for run in own(text)._runs:
        if not run.sources:
            yield at, at + run.length
        at += run.length


class Sources:
    """The texts from outside of one rendering, by number."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str, int]] = []
        """Text, where it was given, and from which character on it has to be printed."""

    def text(self, text: str, where: str, *, needed_from: int = 0) -> Traced:
        """A string from outside.

        Args:
            text: the string.
            where: what it belongs to, for messages.
            needed_from: the first character that has to be printed.

        Raises:
            InputError: text that no tokenizer can read, see ``check_text``.
        """
        if isinstance(text, Traced):
            return text
        check_text(text, where)
        self._texts.append((text, where, needed_from))
        return Traced(text, [Run(len(text), frozenset({len(self._texts) - 1}), 0)] if text else ())

    def value(self, value: Any, where: str, needed: Callable[[tuple[str, ...], bool], bool], *path: str) -> Any:
        """A JSON value with every string in it, keys too, traced.

        Args:
            value: the value.
            where: what it belongs to, for messages.
            needed: whether the key at the end of a path (True), or a string that stands there (False), has to be
                printed.
            path: the keys that lead to the value.

        Raises:
            InputError: text that no tokenizer can read, see ``check_text``; a value that is no JSON.
        """
        if isinstance(value, str):
            return self.text(value, where, needed_from=0 if needed(path, False) else len(value))
        if isinstance(value, Mapping):
            told = {}
            for key, item in value.items():
                below = (*path, str(key))
                name = self.text(str(key), where, needed_from=0 if needed(below, True) else len(str(key)))
                told[name] = self.value(item, where, needed, *below)
            return told
        if isinstance(value, list | tuple):
            return [self.value(item, where, needed, *path) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"{where} holds a {type(value).__name__}, which is no JSON.", hint="Convert it to text.")

    def left_out(self, rendered: str) -> list[str]:
        """Where texts were given that a rendering does not show in full, white space apart."""
        whole: set[int] = set()
        shown: dict[int, list[tuple[int, int]]] = {}
        for run in own(rendered)._runs:
            if run.start is None:
                whole |= run.sources
            else:
                for source in run.sources:
                    shown.setdefault(source, []).append((run.start, run.start + run.length))
        return list(
            dict.fromkeys(
                where
                for number, (text, where, needed_from) in enumerate(self._texts)
                if number not in whole and _hides(text, needed_from, shown.get(number, ()))
            )
        )


def check_text(text: str, where: str) -> str:
    """The text itself, if a tokenizer can read it.

    Raises:
        InputError: a lone surrogate or a NUL character in it.
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


def _follows(last: Run, run: Run) -> bool:
    return last.start is None if run.start is None else last.start is not None and last.start + last.length == run.start


def _sources(value: Any) -> frozenset[int]:
    """All that is from outside in a value, to any depth."""
    if isinstance(value, Traced):
        return frozenset().union(*(run.sources for run in value._runs))
    if isinstance(value, dict):
        return _sources([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return frozenset().union(*map(_sources, value))
    return frozenset()


def _mapped(value: Any, change: Callable[[Traced], str]) -> Any:
    """A value with its traced strings changed, to any depth."""
    if isinstance(value, Traced):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            [_mapped(item, change) for item in value]
            if isinstance(value, list)
            else tuple(_mapped(item, change) for item in value)
        )
    return value


def _restored(piece: Any, other: Any, texts: list[Traced]) -> Any:
    """A string with the origins that the same string with stand-ins shows; itself where they do not fit."""
    if not isinstance(piece, str):
        return piece
    whole = concat(_put_back(other, texts)) if isinstance(other, str) else None
    return own(whole) if whole is not None and whole == piece else _plain(piece)


def _put_back(text: str, texts: list[Traced]) -> Iterator[str]:
    """Pieces of a text with stand-ins, and the strings that they stand for."""
    for number, piece in enumerate(text.split("\ue000")):
        name, closed, rest = piece.partition("\ue001")
        if number and closed and name.isdecimal() and int(name) < len(texts):
            yield from (texts[int(name)], rest)
        else:
            yield ("\ue000" if number else "") + piece


def _hides(text: str, start: int, shown: Iterable[tuple[int, int]]) -> bool:
    for low, high in sorted(shown):
        if text[start:low].strip():
            return True
        start = max(start, high)
    return bool(text[start:].strip())
