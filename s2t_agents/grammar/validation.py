"""Validation of finished JSON against the whole schema with jsonschema, for what the grammar could not enforce.

Validation is bounded: patterns have a time limit, keywords are counted, and nothing is fetched (a canonical schema has
only local references). A value that cannot be checked within the limits is invalid, and so is a number that no double
holds (``1e999``). ``format`` is an annotation, as in JSON Schema, but for ``CHECKED_FORMATS``.
"""

from __future__ import annotations

import ipaddress
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from .canonical_schema import Schema, format_path, format_value
from .schema_rules import FORMAT_PATTERNS, parsed_pattern, shortest_match

MAX_SECONDS = 0.5
"""Time limit of one validation, and of all its patterns together."""

MAX_KEYWORDS = 200_000
"""Keywords that one validation may evaluate: nested alternatives multiply."""

MAX_MATCH = 100_000
"""Characters of a pattern's shortest match: a longer one is not checked, since ``regex`` writes its repetitions out."""

_Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]


class _LimitExceeded(Exception):
    """A validation exceeds its limits."""


class _Limits:
    """Remaining time and keywords of one validation; passed as the validator's ``format_checker``."""

    def __init__(self) -> None:
        self.until = time.monotonic() + MAX_SECONDS
        self.keywords = MAX_KEYWORDS

    def count(self) -> None:
        self.keywords -= 1
        if self.keywords < 0 or (self.keywords % 256 == 0 and time.monotonic() > self.until):
            raise _LimitExceeded

    def search(self, pattern: str, text: str) -> bool:
        """Whether the pattern matches; True for one that Python cannot compile."""
        try:
            compiled = _compiled(pattern)
            left = self.until - time.monotonic()
            return compiled is None or (left > 0 and compiled.search(text, timeout=left) is not None)
        except TimeoutError:
            raise _LimitExceeded from None


def is_pattern(text: str) -> bool:
    """Whether a pattern can be checked."""
    return _compiled(text) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    if shortest_match(pattern) > MAX_MATCH:
        return None
    try:
        return regex.compile(_as_python(pattern), regex.ASCII if pattern.isascii() else 0)
    except (regex.error, RecursionError, OverflowError):
        return None


def _as_python(pattern: str) -> str:
    """Translate ECMAScript syntax that differs: ``$`` at the very end only, ``\\cX``, ``[^]``, ``\\/``."""
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


def _with_limit(keyword: _Keyword) -> _Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        validator.format_checker.count()
        yield from keyword(validator, value, instance, schema) or ()

    return check


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not validator.format_checker.search(pattern, instance):
        yield ValidationError(f"{format_value(instance)} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if validator.format_checker.search(pattern, name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    search = validator.format_checker.search
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, value in instance.items():
        if name in known or any(search(pattern, name) for pattern in patterns):
            continue
        if inner is False:
            yield ValidationError(f"{format_value(name)} is no property of it")
        else:
            yield from validator.descend(value, inner, path=name)


def _is_address(read: Callable[[str], Any], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def _is_regex(text: str) -> bool:
    """Whether Python's ``re`` reads an expression; it is not compiled, since a model may have written any."""
    return parsed_pattern(re.sub(r"\(\?<(?![=!])", "(?P<", text)) is not None


_FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "regex": _is_regex,
    "ipv4network": partial(_is_address, ipaddress.IPv4Network),
    "ipv6network": partial(_is_address, ipaddress.IPv6Network),
    "ipvanynetwork": partial(_is_address, ipaddress.ip_network),
    "ipv4interface": partial(_is_address, ipaddress.IPv4Interface),
    "ipv6interface": partial(_is_address, ipaddress.IPv6Interface),
    "ipvanyinterface": partial(_is_address, ipaddress.ip_interface),
    "ipvanyaddress": partial(_is_address, ipaddress.ip_address),
}
CHECKED_FORMATS = (*FORMAT_PATTERNS, *_FORMAT_CHECKS)
"""Formats that are checked."""


def _format(validator: Any, name: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, str) or "enum" in schema or "const" in schema:
        return
    pattern, check = FORMAT_PATTERNS.get(name), _FORMAT_CHECKS.get(name)
    fits = validator.format_checker.search(pattern, instance) if pattern else check is None or check(instance)
    if not fits:
        yield ValidationError(f"{format_value(instance)} is no {name}")


_OWN_KEYWORDS: dict[str, _Keyword] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "format": _format,
}
_Validator: Any = extend(
    Draft202012Validator,
    {
        name: _with_limit(_OWN_KEYWORDS.get(name, keyword))
        for name, keyword in Draft202012Validator.VALIDATORS.items()
        if name != "$dynamicRef"
    },
)


class SchemaValidator:
    """Validates values against one schema.

    Args:
        schema: in canonical form.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def error_of(self, value: Any) -> str:
        """Why a JSON value is invalid: path, message and keyword; "" if it is valid."""
        if beyond := _beyond_double(value):
            return beyond
        try:
            errors = _Validator(self._schema, format_checker=_Limits()).iter_errors(value)
            error = next(iter(errors), None)
        except _LimitExceeded:
            return f"could not be checked against its schema within {MAX_SECONDS:g} s"
        except RecursionError:
            return "could not be checked against its schema: it refers to itself without end"
        return _format_error(error) if error is not None else ""


def _beyond_double(value: Any) -> str:
    """Where a number in a value is too large for a double, which JSON's readers make infinite; "" if none is."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        if isinstance(here, dict):
            waiting += [((*path, f".{name}"), each) for name, each in here.items()]
        elif isinstance(here, list):
            waiting += [((*path, f"[{at}]"), each) for at, each in enumerate(here)]
        elif isinstance(here, int | float) and not abs(here) <= sys.float_info.max:
            return f"{format_path(path)}: {format_value(here)} is no number up to {sys.float_info.max:.1e}"
    return ""


def _format_error(error: ValidationError) -> str:
    while error.context:  # the alternative that matched furthest gives the most useful error
        deepest = max(error.context, key=lambda each: len(each.absolute_path))
        if len(deepest.absolute_path) <= len(error.absolute_path):
            break
        error = deepest
    where = format_path(tuple(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path))
    message = error.message if len(error.message) <= 200 else f"{error.message[:197]}..."
    if error.validator in (None, "additionalProperties", "patternProperties"):
        return f"{where}: {message}"
    return f"{where}: {message} ({error.validator}: {format_value(error.validator_value)})"
