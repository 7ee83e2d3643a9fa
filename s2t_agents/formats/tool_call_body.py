"""Incremental parser of the JSON between tool call tags: ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

import json
import sys
from typing import Any

_SPACE = " \t\n\r"
_OPEN, _CLOSE = "{[", "}]"


class ToolCallBodyParser:
    """Parses one tool call character by character and gives its arguments as they stream.

    It tracks the structure only (strings, depth, the two keys); complete values are parsed by ``json.loads``. A
    character that does not fit sets ``broken``; the text stays in ``raw``.

    Attributes:
        raw: everything fed since the opening tag.
        rest: what was fed from the first unexpected character on.
        name: the tool's name, once parsed.
        arguments: JSON text of the arguments so far, verbatim.
        closed: whether the call's last brace was read.
        broken: whether this is not a valid call; ``error`` is the reason.
        in_string: whether the next character is inside a JSON string.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.rest = ""
        self.name: str | None = None
        self.arguments = ""
        self.closed = False
        self.error = ""
        self._expect = "{"  # what comes next: { key : value ,
        self._key = ""
        self._value = ""
        self._depth = 0
        self._string = False
        self._escaped = False
        self._seen: set[str] = set()

    @property
    def broken(self) -> bool:
        """Whether the text does not have the structure of a call."""
        return bool(self.error)

    @property
    def in_string(self) -> bool:
        """Whether the next character is inside a JSON string, where a closing tag is text."""
        return self._string and not self.broken

    def feed(self, char: str) -> None:
        """Parse one character."""
        self.raw += char
        if self.broken:
            self.rest += char
            return
        if self.closed:
            if char not in _SPACE:
                self._fail("text after the call", char)
        elif self._expect in ("value", "string"):
            self._in_value(char)
        elif char not in _SPACE:
            self._between_tokens(char)

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as a dict; ``{}`` for a call without arguments.

        Raises:
            ValueError: incomplete, not a JSON object, not Unicode text, or with a number that no double holds
                (``1e999``), which JSON's readers make infinite.
        """
        if not self.closed and "arguments" not in self._seen:
            raise ValueError(self.error or "the call was cut off")
        text = self.arguments or "{}"
        parsed = json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=_finite)
        if not isinstance(parsed, dict):
            raise ValueError(f"arguments must be a JSON object, not {type(parsed).__name__}")
        json.dumps(parsed, ensure_ascii=False).encode()  # refuses lone surrogates
        return parsed

    def _fail(self, why: str, char: str = "") -> None:
        self.error, self.rest = why, char

    def _between_tokens(self, char: str) -> None:
        """A character outside keys and values."""
        if self._expect == "{" and char == "{":
            self._expect = "key"
        elif self._expect == "key" and char == '"':
            self._expect, self._value, self._string = "string", char, True
        elif self._expect == ":" and char == ":":
            self._expect, self._value = "value", ""
        elif self._expect == "," and char == ",":
            self._expect = "key"
        elif char == "}" and (self._expect == "," or (self._expect == "key" and not self._seen)):
            self.closed = True
        else:
            self._fail(f"expected {self._expect}, found {char!r}", char)

    def _in_value(self, char: str) -> None:
        """A character of a key or a value; a number or literal ends at the comma or brace after it."""
        if not self._value and char in _SPACE:
            return
        bare = bool(self._value) and not self._depth and not self._string
        if bare and char in _SPACE + ",}":
            self._take_value()
            if not self.broken and char not in _SPACE:
                self._between_tokens(char)
            return
        self._value += char
        if self._string:
            self._in_string_char(char)
        elif char == '"':
            self._string = True
        elif char in _OPEN:
            self._depth += 1
        elif char in _CLOSE:
            self._depth -= 1
        if self._depth < 0:
            self._fail(f"expected value, found {char!r}", char)
            return
        if self._expect == "value" and self._key == "arguments":
            self.arguments = self._value
        if not self._string and not self._depth and char in '"}]':
            self._take_value()

    def _in_string_char(self, char: str) -> None:
        """A character of a JSON string; a raw line break is invalid there: the string was not closed."""
        if char in "\n\r":
            self._fail("a string never closed")
        elif self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._string = False

    def _take_value(self) -> None:
        value, self._value = self._value, ""
        if self._expect == "string":
            self._take_key(value)
            return
        self._expect = ","
        self._seen.add(self._key)
        if self._key == "name":
            self._take_name(value)

    def _take_key(self, text: str) -> None:
        self._expect = ":"
        try:
            self._key = json.loads(text)
        except ValueError as error:
            self._fail(str(error))
            return
        if self._key in self._seen:
            self._fail(f"{self._key!r} stands twice", text)

    def _take_name(self, text: str) -> None:
        try:
            name = json.loads(text)
            name.encode()
        except (ValueError, AttributeError):
            name = None
        if not name:
            self._fail(f"name must be a string, not {text}")
        self.name = name or None


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{text[:60]} is no number up to {sys.float_info.max:.1e}")
    return number


def _whole(text: str) -> int:
    _finite(text)
    return int(text)
