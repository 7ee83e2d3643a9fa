"""Streaming parser of text and tool calls.

A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the Hermes format). If a tag is one token of the
vocabulary, only that token is the tag, and the same characters in other tokens are text; otherwise the characters are
the tag. Malformed calls raise nothing and lose no text: they become invalid tool calls.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.utils.json import parse_partial_json

from .tool_call_body import ToolCallBodyParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class MessageDelta:
    """What one step adds to the message: text, tool call chunks (LangChain's) and reasoning."""

    text: str = ""
    tool_call_chunks: list[ToolCallChunk] = field(default_factory=list)
    reasoning: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.tool_call_chunks or self.reasoning)

    def add(self, other: MessageDelta) -> None:
        """Append another delta of the same step."""
        self.text += other.text
        self.tool_call_chunks += other.tool_call_chunks
        self.reasoning += other.reasoning


def tag_ids(tokenizer: Any) -> tuple[int | None, int | None]:
    """Token ids of opening and closing tag; None for a tag that is not one added token."""
    ids = {token.content: i for i, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    return ids.get(OPEN), ids.get(CLOSE)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _accept_any(name: str, arguments: dict[str, Any]) -> str:
    return ""


class ToolCallParser:
    """Streaming parser of one generation.

    White space next to a call is dropped, except between two texts around a call. A call is valid once its name and
    arguments are complete, since a stream has emitted them by then.

    Args:
        open_id: token id of ``<tool_call>``; None if it is ordinary text.
        close_id: token id of ``</tool_call>``, likewise.
        after_text: whether a call may follow text; otherwise an answer that begins as text is all text.
        validate: from tool name and arguments to the reason why they do not fit the schema; "" if they do. Such a call
            is a call all the same: its JSON is sound, and whoever runs the tool can tell the model what is wrong.
        new_id: makes the ids of the calls.

    Attributes:
        text: all text so far.
        tool_calls: the complete, valid calls.
        invalid_tool_calls: everything else between tags, with the reason; ``as_written`` gives the text as it was
            generated.
        errors: the reasons of all calls that are invalid or do not fit.
        unparseable: chunks that end a stream, so that LangChain's lenient JSON parser rejects the invalid calls.
    """

    def __init__(
        self,
        open_id: int | None = None,
        close_id: int | None = None,
        *,
        after_text: bool = True,
        validate: Callable[[str, dict[str, Any]], str] = _accept_any,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        self.text = ""
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []
        self.errors: list[str] = []
        self.unparseable: list[ToolCallChunk] = []
        self._ids = {OPEN: open_id, CLOSE: close_id}
        self._calls_after_text = after_text
        self._validate = validate
        self._new_id = new_id
        self._held = ""  # a possible prefix of a tag
        self._space = ""  # trailing white space, emitted only if text follows
        self._call: _ToolCallStream | None = None
        self._index = 0

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Any, *, after_text: bool = True, validate: Callable[[str, dict[str, Any]], str] = _accept_any
    ) -> ToolCallParser:
        """A parser with the tag ids of a tokenizer."""
        return cls(*tag_ids(tokenizer), after_text=after_text, validate=validate)

    @property
    def in_call(self) -> bool:
        """Whether the next step is inside a tool call."""
        return self._call is not None

    def is_tag(self, token_id: int) -> bool:
        """Whether this token would be read as a tag if it came next."""
        return not self._only_text and token_id in self._ids.values()

    @property
    def _only_text(self) -> bool:
        return not self._calls_after_text and self._call is None and bool(self.text)

    def push(self, token_id: int | None, text: str) -> MessageDelta:
        """Parse one step: its token and the text it adds, which may contain the characters of a tag token or not."""
        delta = MessageDelta()
        for tag, tag_id in self._ids.items():
            if tag_id is not None and token_id == tag_id and not self._only_text:
                self._read(text.removesuffix(tag), delta)
                self._on_tag(tag, delta)
                break
        else:
            self._read(text, delta)
        if self._call is not None:
            self._call.emit(delta)
        return delta

    def finish(self) -> MessageDelta:
        """End of the generation: text held back, and an incomplete call, which becomes an invalid one."""
        delta = MessageDelta()
        held, self._held = self._held, ""
        self._read_plain(held, delta)
        if self._call is not None:
            self._end_call(delta)
        elif not self._index:
            self._emit(self._space, delta)
        self._space = ""
        return delta

    def _read(self, text: str, delta: MessageDelta) -> None:
        """Text that may contain a tag in plain characters, or end with a prefix of one."""
        for at, char in enumerate(text):
            tag = OPEN if self._call is None else CLOSE
            if self._ids[tag] is not None or (self._only_text and not self._held):
                self._read_plain(text[at:], delta)
                return
            if not self._held and self._call is not None and self._call.body.in_string:
                self._read_plain(char, delta)  # a tag inside a JSON string is part of the string
                continue
            self._held += char
            while not tag.startswith(self._held):
                first, self._held = self._held[0], self._held[1:]
                self._read_plain(first, delta)
            if self._held == tag:
                self._held = ""
                self._on_tag(tag, delta)

    def _read_plain(self, text: str, delta: MessageDelta) -> None:
        """Text without tags: part of a call, or of the answer's text."""
        if self._call is not None:
            for char in text:
                self._call.body.feed(char)
            return
        stripped = text.rstrip()
        if stripped:
            space = self._space if self.text or not self._index else ""
            visible = stripped if self.text or not self._index else stripped.lstrip()
            self._emit(space + visible, delta)
            self._space = ""
        self._space += text[len(stripped) :]

    def _emit(self, text: str, delta: MessageDelta) -> None:
        self.text += text
        delta.text += text

    def _on_tag(self, tag: str, delta: MessageDelta) -> None:
        """Handle a tag. An opening tag inside a call begins the next call; a closing tag outside is ignored."""
        if self._call is not None:
            self._end_call(delta)
        if tag == OPEN:
            self._call = _ToolCallStream(self._index, self._new_id())
            self._index += 1

    def _end_call(self, delta: MessageDelta) -> None:
        """Classify the call as valid or invalid; the emitted chunks, joined by LangChain, give the same result."""
        call, self._call = self._call, None
        if call is None:
            return
        call.emit(delta)
        try:
            arguments, error = call.body.parsed_arguments(), ""
        except (ValueError, RecursionError) as problem:
            arguments, error = {}, str(problem)
        if call.body.name is None or error:
            self._add_invalid(call, delta, error or call.body.error or "the call names no tool")
            return
        if reason := self._validate(call.body.name, arguments):
            self.errors.append(reason)
        call.complete(delta)
        self.tool_calls.append(tool_call(name=call.body.name, args=arguments, id=call.id))
        if call.body.rest:
            extra = _ToolCallStream(self._index, self._new_id())
            self._index += 1
            extra.body.raw = call.body.rest
            self._add_invalid(extra, delta, call.body.error)

    def _add_invalid(self, call: _ToolCallStream, delta: MessageDelta, error: str) -> None:
        written = call.emit_rest(delta)
        tail = _unparseable_suffix(written)
        if tail:
            self.unparseable.append(tool_call_chunk(name=None, args=tail, id=None, index=call.index))
        made = invalid_tool_call(name=call.body.name, args=written + tail, id=call.id, error=error)
        self.invalid_tool_calls.append(made)
        self.errors.append(error)


class PlainTextParser:
    """Streaming parser of a generation in which no call is legal: tags are text.

    Attributes are those of ``ToolCallParser``.
    """

    in_call = False

    def __init__(self) -> None:
        self.text = ""
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []
        self.errors: list[str] = []
        self.unparseable: list[ToolCallChunk] = []

    def is_tag(self, token_id: int) -> bool:
        """Always False."""
        return False

    def push(self, token_id: int | None, text: str) -> MessageDelta:
        """Parse one step: all of it is text."""
        self.text += text
        return MessageDelta(text)

    def finish(self) -> MessageDelta:
        """End of the generation; nothing was held back."""
        return MessageDelta()


class _ToolCallStream:
    """Emits one call as chunks: name and id in the first, then pieces of the arguments."""

    def __init__(self, index: int, call_id: str) -> None:
        self.index, self.id = index, call_id
        self.body = ToolCallBodyParser()
        self._name_sent = False
        self._sent = ""

    def emit(self, delta: MessageDelta) -> None:
        """Emit what is new since the last step; arguments that precede the name wait for it."""
        if self.body.name is None:
            return
        new = self.body.arguments[len(self._sent) :]
        if new or not self._name_sent:
            self._chunk(new, delta)

    def complete(self, delta: MessageDelta) -> None:
        """Emit ``{}`` for a call without arguments."""
        if not self._sent:
            self._chunk("{}", delta)

    def emit_rest(self, delta: MessageDelta) -> str:
        """Emit the whole text of a call that names no tool; returns all arguments emitted."""
        if not self._name_sent:
            self._chunk(self.body.raw, delta)
        return self._sent

    def _chunk(self, args: str, delta: MessageDelta) -> None:
        first = not self._name_sent
        self._name_sent = True
        self._sent += args
        if not first and delta.tool_call_chunks and delta.tool_call_chunks[-1]["index"] == self.index:
            last = delta.tool_call_chunks[-1]  # LangChain joins chunks of two messages, not of one
            last["args"] = (last["args"] or "") + args
            return
        delta.tool_call_chunks.append(
            tool_call_chunk(
                name=self.body.name if first else None,
                args=args,
                id=self.id if first else None,
                index=self.index,
            )
        )


_TAILS = ("", "\n]", "\n}", '\n"]', '\n"}', '\n""]', '\n""}')
"""The line break shows where what was written ends."""


def as_written(args: str) -> str:
    """The arguments of an invalid call without what was appended to make them unparseable."""
    text, mark, tail = args.rpartition("\n")
    return text if mark + tail in _TAILS[1:] else args


def _unparseable_suffix(args: str) -> str:
    """The shortest suffix with which ``parse_partial_json`` does not repair incomplete arguments to a dict.

    Without it ``{"amount": 10``, cut off from 1000, would become a valid call for 10.
    """
    for tail in _TAILS:
        try:
            readable = not args + tail or isinstance(parse_partial_json(args + tail), dict)
        except (ValueError, RecursionError):
            readable = False
        if not readable:
            return tail
    return ""
