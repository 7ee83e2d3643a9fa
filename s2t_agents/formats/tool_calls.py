"""Generated steps to text and tool calls, as they stream.

A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the Hermes convention). Where the vocabulary
holds a tag as one token, that token alone is the tag, and the same letters spelt out are text; where it does not,
the letters are the tag. Nothing raises here and nothing is lost: what is not a call ends as an invalid call.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.utils.json import parse_partial_json

from .tool_call_body import CallBody

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class Delta:
    """What one step adds to the message: text to show, pieces of tool calls (LangChain's chunks), thought."""

    text: str = ""
    tool_call_chunks: list[ToolCallChunk] = field(default_factory=list)
    reasoning: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.tool_call_chunks or self.reasoning)

    def add(self, other: Delta) -> None:
        """What else the same step adds."""
        self.text += other.text
        self.tool_call_chunks += other.tool_call_chunks
        self.reasoning += other.reasoning


def tag_ids(tokenizer: Any) -> tuple[int | None, int | None]:
    """Ids of the two tags, each None where the vocabulary does not hold it as one added token."""
    ids = {token.content: i for i, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    return ids.get(OPEN), ids.get(CLOSE)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _fits(name: str, arguments: dict[str, Any]) -> str:
    return ""


class ToolCallParser:
    """Reads one generation.

    White space next to a call is dropped; between two texts with a call between them, what stood there stays.
    A call counts as soon as its name and its arguments are whole, as a stream has shown them by then.

    Args:
        open_id: token id of ``<tool_call>``, or None where it is spelt in plain text.
        close_id: token id of ``</tool_call>``, likewise.
        after_text: whether a call may follow text; otherwise an answer that begins as text is text to its end.
        complaint: says why the arguments of a tool do not fit its schema, or nothing.
        new_id: makes the ids of the calls.

    Attributes:
        text: all text shown so far.
        tool_calls: the calls that are whole and sound.
        invalid_tool_calls: whatever stood between tags and is no call, with the reason.
    """

    def __init__(
        self,
        open_id: int | None = None,
        close_id: int | None = None,
        *,
        after_text: bool = True,
        complaint: Callable[[str, dict[str, Any]], str] = _fits,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        self.text = ""
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []
        self._ids = {OPEN: open_id, CLOSE: close_id}
        self._after_text = after_text
        self._complaint = complaint
        self._new_id = new_id
        self._held = ""  # the beginning of a tag, perhaps
        self._space = ""  # space that is shown only if text follows
        self._call: _Call | None = None
        self._index = 0

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Any, *, after_text: bool = True, complaint: Callable[[str, dict[str, Any]], str] = _fits
    ) -> ToolCallParser:
        """A parser for what this tokenizer's models generate."""
        return cls(*tag_ids(tokenizer), after_text=after_text, complaint=complaint)

    @property
    def in_call(self) -> bool:
        """Whether the next step stands between the tags."""
        return self._call is not None

    def is_tag(self, token_id: int) -> bool:
        """Whether this token, as the next one, is a tag."""
        return not self._only_text and token_id in self._ids.values()

    @property
    def _only_text(self) -> bool:
        return not self._after_text and self._call is None and bool(self.text)

    def push(self, token_id: int | None, text: str) -> Delta:
        """Take one step: its token and the text it added, which may or may not spell a tag token out."""
        delta = Delta()
        for tag, tag_id in self._ids.items():
            if tag_id is not None and token_id == tag_id and not self._only_text:
                self._read(text.removesuffix(tag), delta)
                self._tag(tag, delta)
                break
        else:
            self._read(text, delta)
        if self._call is not None:
            self._call.send(delta)
        return delta

    def finish(self) -> Delta:
        """The end of the generation: what was held back, and a call that was cut off, as an invalid one."""
        delta = Delta()
        held, self._held = self._held, ""
        self._plain(held, delta)
        if self._call is not None:
            self._end_call(delta)
        elif not self._index:
            self._show(self._space, delta)
        self._space = ""
        return delta

    def _read(self, text: str, delta: Delta) -> None:
        """Text that may hold a spelt-out tag, or begin one at its end."""
        for at, char in enumerate(text):
            tag = OPEN if self._call is None else CLOSE
            if self._ids[tag] is not None or (self._only_text and not self._held):
                self._plain(text[at:], delta)
                return
            if not self._held and self._call is not None and self._call.body.in_string:
                self._plain(char, delta)  # the letters of a tag inside a JSON string are the string's own
                continue
            self._held += char
            while not tag.startswith(self._held):
                first, self._held = self._held[0], self._held[1:]
                self._plain(first, delta)
            if self._held == tag:
                self._held = ""
                self._tag(tag, delta)

    def _plain(self, text: str, delta: Delta) -> None:
        """Text that holds no tag: part of a call, or text to show."""
        if self._call is not None:
            for char in text:
                self._call.body.feed(char)
            return
        solid = text.rstrip()
        if solid:
            space = self._space if self.text or not self._index else ""
            begin = solid if self.text or not self._index else solid.lstrip()
            self._show(space + begin, delta)
            self._space = ""
        self._space += text[len(solid) :]

    def _show(self, text: str, delta: Delta) -> None:
        self.text += text
        delta.text += text

    def _tag(self, tag: str, delta: Delta) -> None:
        """A tag was read. Opening within a call begins the next one; closing outside any means nothing."""
        if self._call is not None:
            self._end_call(delta)
        if tag == OPEN:
            self._call = _Call(self._index, self._new_id())
            self._index += 1

    def _end_call(self, delta: Delta) -> None:
        """Decide what the call is, so that the stream's pieces, joined by LangChain, say the same."""
        call, self._call = self._call, None
        if call is None:
            return
        call.send(delta)
        try:
            arguments, error = call.body.parsed_arguments(), ""
        except (ValueError, RecursionError) as problem:
            arguments, error = {}, str(problem)
        if call.body.name is not None and not error:
            error = self._complaint(call.body.name, arguments)
        if call.body.name is None or error:
            sent = call.refuse(delta)
            reason = error or call.body.error or "the call names no tool"
            self._invalid(call, call.body.name, sent, reason)
            return
        call.complete(delta)
        self.tool_calls.append(tool_call(name=call.body.name, args=arguments, id=call.id))
        if call.body.rest:
            extra = _Call(self._index, self._new_id())
            self._index += 1
            extra.body.raw = call.body.rest
            self._invalid(extra, None, extra.refuse(delta), call.body.error)

    def _invalid(self, call: _Call, name: str | None, args: str, error: str) -> None:
        self.invalid_tool_calls.append(invalid_tool_call(name=name, args=args, id=call.id, error=error))


class PlainText:
    """Reads a generation in which no call is legal: tags are text like any other.

    Attributes are those of ``ToolCallParser``.
    """

    in_call = False

    def __init__(self) -> None:
        self.text = ""
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []

    def is_tag(self, token_id: int) -> bool:
        """No token is."""
        return False

    def push(self, token_id: int | None, text: str) -> Delta:
        """Take one step: its text is shown."""
        self.text += text
        return Delta(text)

    def finish(self) -> Delta:
        """The end of the generation; nothing was held back."""
        return Delta()


class _Call:
    """One call on its way into chunks: name and id on the first, pieces of the arguments after it."""

    def __init__(self, index: int, call_id: str) -> None:
        self.index, self.id = index, call_id
        self.body = CallBody()
        self._named = False
        self._sent = ""

    def send(self, delta: Delta) -> None:
        """What is new since the last step. Arguments wait for the name, should they come first."""
        if self.body.name is None:
            return
        new = self.body.arguments[len(self._sent) :]
        if new or not self._named:
            self._chunk(new, delta)

    def complete(self, delta: Delta) -> None:
        """A call without arguments has empty ones."""
        if not self._sent:
            self._chunk("{}", delta)

    def refuse(self, delta: Delta) -> str:
        """Send what LangChain's lenient reader needs to see that this is no call; all arguments as sent."""
        text = "" if self._named else self.body.raw
        tail = _unreadable(self._sent + text)
        if text + tail or not self._named:
            self._chunk(text + tail, delta)
        return self._sent

    def _chunk(self, args: str, delta: Delta) -> None:
        first = not self._named
        self._named = True
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


def _unreadable(args: str) -> str:
    """The shortest ending that keeps ``parse_partial_json`` from repairing broken arguments into a dict.

    It closes what was cut off: ``{"amount": 10`` of 1000 would become a sound call for 10.
    """
    for tail in ("", "]", "}", '"]', '"}', '""]', '""}'):
        try:
            readable = not args + tail or isinstance(parse_partial_json(args + tail), dict)
        except (ValueError, RecursionError):
            readable = False
        if not readable:
            return tail
    return ""
