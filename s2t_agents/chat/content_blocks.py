"""Content blocks of all providers to what this model reads: text, thoughts and tool calls.

Text is read under each of its names. What a provider's own tools did is read where it is plain text (the output of
code, the text that a search found); their calls, sources, signatures and encrypted parts say nothing to this model and
are skipped, with a debug line in the log. Pictures, sound and files are refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from ..errors import InputError

_log = logging.getLogger(__name__)

_TEXT_KEYS = {"refusal": "refusal", "guard_content": "text"}
_TEXT = frozenset({"text", "text-plain", "input_text", "output_text", "summary_text", *_TEXT_KEYS})
_HOLDERS = frozenset({"document", "search_result", "web_search_result"})
_MEDIA = frozenset({
    "audio", "container_upload", "file", "file_data", "image", "image_generation_call", "image_url", "inline_data",
    "inlineData", "input_audio", "input_file", "input_image", "media", "output_audio", "video", "video_url",
})  # fmt: skip
_CALLS = {"tool_use": "input", "tool_call": "args", "invalid_tool_call": "args", "function_call": "arguments"}
_CALL_PIECES = frozenset({"tool_call_chunk", "input_json_delta"})
_THOUGHTS = frozenset({"reasoning", "thinking", "reasoning_content", "redacted_thinking", "thought"})
_EMPTY = frozenset({"cache_point", "cachePoint"})
_FOUND = (
    *("text", "output", "outputs", "stdout", "stderr", "logs", "results", "result", "content"),
    "code_execution_result",
)
"""Where the results of a provider's own tools hold text."""

_Call = tuple[str | None, str, Any]


def text_of(message: BaseMessage, where: str) -> str:
    """The text of a message's content.

    Raises:
        InputError: a block that holds something else, such as a picture.
    """
    content: Any = message.content
    if content is None or isinstance(content, str):
        return content or _said_elsewhere(message)
    skipped: list[str] = []
    texts = [text for block in content for text in _texts(block, message, where, skipped)]
    if skipped:
        _log.debug("%s: nothing for this model in %s.", where, ", ".join(skipped))
    return "".join(texts)


def thought_of(message: AIMessage) -> str:
    """The thoughts among a message's blocks."""
    return "".join(
        text
        for block in _mappings(message)
        if block.get("type") in _THOUGHTS and block["type"] != "redacted_thinking"
        for text in _thought_texts(block)
    )


def calls_of(message: AIMessage) -> list[_Call]:
    """Id, name and arguments of each tool call; of those that were no JSON, the text under ``invalid_arguments``."""
    made: list[_Call] = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    made += [_broken(call["id"], call["name"], call["args"]) for call in message.invalid_tool_calls]
    known = {call_id for call_id, _, _ in made}
    for block in _mappings(message):
        kind = str(block.get("type"))
        call_id = block.get("call_id") or block.get("id")
        if kind in _CALLS and call_id not in known and (not made or call_id is not None):
            made.append(_read(call_id, block.get("name"), block.get(_CALLS[kind], block.get("args"))))
    older = message.additional_kwargs.get("function_call")
    if not made and isinstance(older, Mapping):
        made.append(_read(None, older.get("name"), older.get("arguments")))
    return made


def _texts(block: Any, message: BaseMessage, where: str, skipped: list[str]) -> Iterator[str]:
    if isinstance(block, str):
        yield block
        return
    kind = str(block.get("type") or next((key for key in block if key != "index"), "untyped"))
    said = isinstance(message, AIMessage)
    if kind == "non_standard" and isinstance(block.get("value"), Mapping):
        inner = {"type": kind, **block["value"]} if said else block["value"]
        yield from _texts(inner, message, where, skipped)
    elif kind in _TEXT:
        yield _text_in(block.get(_TEXT_KEYS.get(kind, "text")))
    elif kind in _HOLDERS and not _is_media(block):
        about = [block[key] for key in ("title", "context") if isinstance(block.get(key), str)]
        yield "\n".join([*about, *_found(block.get("source") if kind == "document" else block)])
    elif kind == "json" and isinstance(message, ToolMessage):
        yield json.dumps(block.get("json"), ensure_ascii=False)
    elif kind in _EMPTY or (said and kind in _THOUGHTS | _CALLS.keys() | _CALL_PIECES):
        return
    elif said and kind not in _MEDIA and not _is_media(block):
        found = [text for text in _found(block) if text]
        if not found:
            skipped.append(kind)
        yield "\n".join(found)
    else:
        raise InputError(
            f"{where} holds a {kind!r} content block.", hint="This model reads text alone: pass text blocks."
        )


def _found(value: Any) -> Iterator[str]:
    """The plain text in a provider's block, depth first."""
    if isinstance(value, list):
        for item in value:
            yield from _found(item) if not isinstance(item, str) else (item,)
    elif isinstance(value, Mapping):
        if value.get("type") == "text" and isinstance(value.get("data"), str):  # a document's source
            yield value["data"]
        for key in _FOUND:
            item = value.get(key)
            if isinstance(item, str):
                yield item
            else:
                yield from _found(item)


def _is_media(block: Mapping[str, Any]) -> bool:
    source = block.get("source")
    return isinstance(source, Mapping) and source.get("type", "text") not in {"text", "content"}


def _text_in(value: Any) -> str:
    """A block's text, which some providers wrap once more."""
    if isinstance(value, Mapping):
        return _text_in(value.get("value", value.get("text")))
    return "" if value is None else str(value)


def _thought_texts(block: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning", "thinking", "text", "thought", "reasoning_content"):
        value = block.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _thought_texts(value)
    summary = block.get("summary")
    if isinstance(summary, list):
        yield "\n\n".join(_text_in(part.get("text")) for part in summary if isinstance(part, Mapping))


def _mappings(message: AIMessage) -> list[Mapping[str, Any]]:
    content: Any = message.content
    return [block for block in content or () if isinstance(block, Mapping)] if not isinstance(content, str) else []


def _said_elsewhere(message: BaseMessage) -> str:
    """Text of an answer without content: OpenAI's refusals and the words of its spoken answers."""
    refusal, audio = message.additional_kwargs.get("refusal"), message.additional_kwargs.get("audio")
    spoken = audio.get("transcript") if isinstance(audio, Mapping) else None
    return next((text for text in (refusal, spoken) if isinstance(text, str)), "")


def _read(call_id: Any, name: Any, arguments: Any) -> _Call:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return _broken(call_id, name, arguments)
    return None if call_id is None else str(call_id), str(name or "unknown"), {} if arguments is None else arguments


def _broken(call_id: Any, name: Any, arguments: Any) -> _Call:
    return call_id, name or "unknown", {"invalid_arguments": arguments or ""}
