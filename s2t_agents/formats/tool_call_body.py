"""What stands between the tool-call tags, read one character at a time: ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

import json
from typing import Any

_SPACE = " \t\n\r"
_OPEN, _CLOSE = "{[", "}]"


class CallBody:
    """Reads one call and hands out its arguments as they arrive.

    Only the outline is followed here (strings, depth, the two keys); whether a value is JSON is for ``json.loads``
    to say, once it is whole. Text that strays from the outline sets ``broken`` and is kept in ``raw``.

    Attributes:
        raw: everything fed since the opening tag.
        rest: what was fed from the stray character on.
        name: the tool's name, once read.
        arguments: JSON text of the arguments so far, exactly as written.
        closed: the call's last brace was read.
        broken: this is no call; ``error`` says why.
        in_string: the next character stands inside a JSON string.
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
        """Whether the text strayed from the outline of a call."""
        return bool(self.error)

    @property
    def in_string(self) -> bool:
        """Whether a closing tag met now would be a string's own text."""
        return self._string and not self.broken

    def feed(self, char: str) -> None:
        """Take one character."""
        self.raw += char
        if self.broken:
            self.rest += char
            return
        if self.closed:
            if char not in _SPACE:
                self._break("text after the call", char)
        elif self._expect in ("value", "string"):
            self._in_value(char)
        elif char not in _SPACE:
            self._between(char)

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as a dict; a call that gives none has ``{}``.

        Raises:
            ValueError: they are not whole, not a JSON object, or not Unicode text.
        """
        if not self.closed and "arguments" not in self._seen:
            raise ValueError(self.error or "the call was cut off")
        text = self.arguments or "{}"
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            raise ValueError(f"arguments must be a JSON object, not {type(parsed).__name__}")
        json.dumps(parsed, ensure_ascii=False).encode()  # refuses lone surrogates
        return parsed

    def _break(self, why: str, char: str = "") -> None:
        self.error, self.rest = why, char

    def _between(self, char: str) -> None:
        """A character outside every key and value."""
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
            self._break(f"expected {self._expect}, found {char!r}", char)

    def _in_value(self, char: str) -> None:
        """A character of a key or a value; a bare word (number, true) ends at the comma or brace after it."""
        if not self._value and char in _SPACE:
            return
        bare = bool(self._value) and not self._depth and not self._string
        if bare and char in _SPACE + ",}":
            self._take_value()
            if not self.broken and char not in _SPACE:
                self._between(char)
            return
        self._value += char
        if self._string:
            self._in_text(char)
        elif char == '"':
            self._string = True
        elif char in _OPEN:
            self._depth += 1
        elif char in _CLOSE:
            self._depth -= 1
        if self._depth < 0:
            self._break(f"expected value, found {char!r}", char)
            return
        if self._expect == "value" and self._key == "arguments":
            self.arguments = self._value
        if not self._string and not self._depth and char in '"}]':
            self._take_value()

    def _in_text(self, char: str) -> None:
        """A character of a JSON string; a raw line break cannot stand in one, so the quote never closed."""
        if char in "\n\r":
            self._break("a string never closed")
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
            self._break(str(error))
            return
        if self._key in self._seen:
            self._break(f"{self._key!r} stands twice", text)

    def _take_name(self, text: str) -> None:
        try:
            name = json.loads(text)
            name.encode()
        except (ValueError, AttributeError):
            name = None
        if not name:
            self._break(f"name must be a string, not {text}")
        self.name = name or None
