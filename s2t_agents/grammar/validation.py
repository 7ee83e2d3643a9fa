"""Finished JSON against the whole schema: what the grammar could not enforce is found here, by jsonschema.

A check ends: patterns are searched with a time limit, the work is counted, and nothing is fetched (a canonical schema
refers to itself alone). What could not be checked within the limits does not count as valid. ``format`` stays an
annotation, as JSON schema says; the formats that the grammar knows are kept by the grammar.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from .canonical_schema import Schema, place, shown

SECONDS = 0.5
"""Time that one check may take, and its patterns together."""

MOST_KEYWORDS = 200_000
"""Keywords that one check may look at: alternatives within alternatives multiply."""

_Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]


class _TooMuch(Exception):
    """The check takes too long."""


class _Limits:
    """What one check has left; of the thread that runs it, through the validator's ``format_checker``."""

    def __init__(self) -> None:
        self.until = time.monotonic() + SECONDS
        self.keywords = MOST_KEYWORDS

    def count(self) -> None:
        self.keywords -= 1
        if self.keywords < 0 or (self.keywords % 256 == 0 and time.monotonic() > self.until):
            raise _TooMuch

    def search(self, pattern: str, text: str) -> bool:
        """Whether the pattern is found; one that Python cannot read is found anywhere."""
        try:
            compiled = _compiled(pattern)
            left = self.until - time.monotonic()
            return compiled is None or (left > 0 and compiled.search(text, timeout=left) is not None)
        except TimeoutError:
            raise _TooMuch from None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(_as_python(pattern), regex.ASCII if pattern.isascii() else 0)
    except (regex.error, RecursionError, OverflowError):
        return None


def _as_python(pattern: str) -> str:
    """ECMAScript's few own spellings: ``$`` does not match before a last line break, ``\\cX``, ``[^]``, ``\\/``."""
    out, at, in_class = [], 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            out.append(pattern[at : at + 2])
            at += 2
            continue
        if char == "[" and not in_class:
            in_class = True
            if pattern.startswith(("[^]", "[]"), at):
                whole = pattern.startswith("[^]", at)
                out.append(r"[\s\S]" if whole else "(?!)")
                at += 3 if whole else 2
                in_class = False
                continue
        elif char == "[":
            char = r"\["
        elif char == "]":
            in_class = False
        elif char == "$" and not in_class:
            char = r"\Z"
        out.append(char)
        at += 1
    return "".join(out)


def _counted(keyword: _Keyword) -> _Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        validator.format_checker.count()
        yield from keyword(validator, value, instance, schema) or ()

    return check


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not validator.format_checker.search(pattern, instance):
        yield ValidationError(f"{shown(instance)} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if validator.format_checker.search(pattern, name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    search = validator.format_checker.search
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, value in instance.items():
        if name in known or any(search(pattern, name) for pattern in patterns):
            continue
        if inner is False:
            yield ValidationError(f"{shown(name)} is no property of it")
        else:
            yield from validator.descend(value, inner, path=name)


_OWN: dict[str, _Keyword] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
}
_ANNOTATIONS = ("format", "$dynamicRef")
_Validator: Any = extend(
    Draft202012Validator,
    {
        name: _counted(_OWN.get(name, keyword))
        for name, keyword in Draft202012Validator.VALIDATORS.items()
        if name not in _ANNOTATIONS
    }
    | {"format": lambda *_: None},
)


class Check:
    """Checks values against one schema.

    Args:
        schema: in canonical form.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def complaint(self, value: Any) -> str:
        """Why a JSON value does not fit: the property's place, the keyword and what it asks for; "" where it fits."""
        try:
            errors = _Validator(self._schema, format_checker=_Limits()).iter_errors(value)
            error = next(iter(errors), None)
        except _TooMuch:
            return f"could not be checked against its schema within {SECONDS:g} s"
        except RecursionError:
            return "could not be checked against its schema: it refers to itself without end"
        return _told(error) if error is not None else ""


def _told(error: ValidationError) -> str:
    while error.context:  # the alternative that came closest says more than "none fits"
        deepest = max(error.context, key=lambda each: len(each.absolute_path))
        if len(deepest.absolute_path) <= len(error.absolute_path):
            break
        error = deepest
    where = place(tuple(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path))
    message = error.message if len(error.message) <= 200 else f"{error.message[:197]}..."
    if error.validator in (None, "additionalProperties", "patternProperties"):
        return f"{where}: {message}"
    return f"{where}: {message} ({error.validator}: {shown(error.validator_value)})"


def checked(whole: Mapping[str, Any]) -> Check:
    """The check of a canonical schema, from the cache when it was made before."""
    return _made(json.dumps(whole))


@lru_cache(maxsize=256)
def _made(text: str) -> Check:
    return Check(json.loads(text))
