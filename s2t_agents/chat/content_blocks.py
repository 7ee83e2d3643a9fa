"""Content blocks (parts of a message) of all providers to what this model reads, by their ``type``: text, JSON of a
tool's result, reasoning and tool calls; which others are refused.

Of the provider's built-in tools, plain-text results are read (code output, search results, titles); their calls,
addresses, signatures and encrypted parts are skipped with a debug line in the log. Images, audio and files are refused,
and so is a block that somebody else than a model left without its content.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, HumanMessage, ToolMessage

from ..errors import InputError, first_line
from ..redaction import one_line

_log = logging.getLogger(__name__)

_TEXT_KEYS = {"refusal": "refusal", "guard_content": "text"}
_TEXT = frozenset({"text", "input_text", "output_text", "summary_text", *_TEXT_KEYS})
_DOCUMENTS = frozenset({"document", "search_result", "text-plain", "web_search_result"})
_MEDIA = frozenset({
    "audio", "container_upload", "file", "file_data", "image", "image_generation_call", "image_url", "inline_data",
    "inlineData", "input_audio", "input_file", "input_image", "media", "output_audio", "video", "video_url",
})  # fmt: skip
_CALLS = {"tool_use": "input", "tool_call": "args", "invalid_tool_call": "args", "function_call": "arguments"}
_CALL_CHUNKS = frozenset({"tool_call_chunk", "input_json_delta"})
_REASONING = frozenset({"reasoning", "thinking", "reasoning_content", "redacted_thinking", "thought"})
_OUTPUTS = frozenset({"custom_tool_call_output", "function_call_output", "tool_result"})
_CACHE_POINTS = frozenset({"cache_point", "cachePoint"})
_RESULT_KEYS = (
    *("text", "output", "outputs", "stdout", "stderr", "logs", "results", "result", "content"),
    "code_execution_result",
)
"""Keys under which results of a provider's built-in tools hold text."""

_Call = tuple[str | None, str, Any]


def text_of(message: BaseMessage, where: str) -> str:
    """The text of a message's content.

    Blocks of a result are separate texts and stand on lines of their own; in other messages a text goes on from block
    to block (citations cut one sentence into several), as in LangChain's ``message.text``.

    Raises:
        InputError: a block that is not text, such as an image.
    """
    content: Any = message.content
    if content is None or isinstance(content, str):
        return content or _refusal_or_transcript(message)
    skipped: list[str] = []
    texts = [text for block in content for text in _texts(block, message, where, skipped)]
    if skipped:
        _log.debug("%s: nothing for this model in %s.", where, one_line(", ".join(skipped)))
    return ("\n" if isinstance(message, ToolMessage | FunctionMessage) else "").join(texts)


def with_messages_of_tools(message: BaseMessage) -> list[BaseMessage]:
    """The message, with results of tools among its blocks (Anthropic's form) as tool messages before what is left."""
    content: Any = message.content
    if not isinstance(message, HumanMessage | ChatMessage) or not isinstance(content, list):
        return [message]
    results: list[BaseMessage] = []
    rest = []
    for block in content:
        inner = _unwrapped(block)
        if isinstance(inner, Mapping) and str(inner.get("type")) in _OUTPUTS:
            answered = inner.get("tool_use_id", inner.get("call_id"))
            results.append(ToolMessage([dict(inner)], tool_call_id=str(answered)))
        else:
            rest.append(block)
    return [*results, message.model_copy(update={"content": rest})] if rest or not results else results


def reasoning_of(message: AIMessage) -> str:
    """The reasoning text in a message's content blocks, or what other chat models keep beside the content."""
    text = "".join(
        text
        for block in _mappings(message)
        if str(block.get("type")) in _REASONING - {"redacted_thinking"}
        for text in _reasoning_texts(block)
    )
    beside = message.additional_kwargs.get("reasoning_content")
    return text or (beside if isinstance(beside, str) else "")


def calls_of(message: AIMessage) -> list[_Call]:
    """Id, name and arguments of each tool call; arguments that are not JSON are ``{"invalid_arguments": text}``."""
    calls: list[_Call] = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    calls += [_invalid_call(call["id"], call["name"], call["args"]) for call in message.invalid_tool_calls]
    known = {call_id for call_id, _, _ in calls}
    for block in _mappings(message):
        kind = str(block.get("type"))
        call_id = _text_or_none(block.get("call_id") or block.get("id"))
        if kind in _CALLS and call_id not in known and (not calls or call_id is not None):
            calls.append(_parsed_call(call_id, block.get("name"), block.get(_CALLS[kind], block.get("args"))))
    function_call = message.additional_kwargs.get("function_call")
    if not calls and isinstance(function_call, Mapping):
        calls.append(_parsed_call(None, function_call.get("name"), function_call.get("arguments")))
    return calls


def _texts(block: Any, message: BaseMessage, where: str, skipped: list[str]) -> Iterator[str]:
    if isinstance(block, str):
        yield block
        return
    if not isinstance(block, Mapping):
        raise InputError(f"{where} holds a {type(block).__name__} in place of a content block.")
    kind = str(block.get("type") or next((key for key in block if key != "index"), "untyped"))
    from_model = isinstance(message, AIMessage)
    if (inner := _unwrapped(block)) is not block:
        inner = {"type": kind, **inner} if from_model else inner
        yield from _texts(inner, message, where, skipped)
    elif kind in _TEXT and (text := _text_in(block.get(_TEXT_KEYS.get(kind, "text")))) is not None:
        yield text
    elif kind in _DOCUMENTS and (held := _document_content(kind, block, where)) is not None:
        yield "\n".join([*_titles(block), *(text for part in held for text in _texts(part, message, where, skipped))])
    elif kind == "json" and "json" in block and isinstance(message, ToolMessage):
        yield _json_text(block["json"], where)
    elif kind in _OUTPUTS and isinstance(message, ToolMessage) and (parts := _output_parts(kind, block)) is not None:
        yield "\n".join(text for part in parts for text in _texts(part, message, where, skipped))
    elif kind in _CACHE_POINTS or (from_model and kind in _REASONING | _CALLS.keys() | _CALL_CHUNKS):
        return
    elif from_model and kind not in _MEDIA and not _has_media_source(block):
        found = [text for text in _result_texts(block) if text]
        if not found:
            skipped.append(kind)
        yield "\n".join(found)
    else:
        lacks = not {"content", "output", "source"} & block.keys() and not is_media(block)
        empty = " without its content" if kind in _TEXT | _DOCUMENTS | _OUTPUTS and lacks else ""
        raise InputError(
            f"{where} holds a {kind!r} content block{empty}.", hint="This model reads text alone: pass text blocks."
        )


def _unwrapped(block: Any) -> Any:
    """The provider's own block in LangChain's ``non_standard``; any other as it is."""
    wrapped = isinstance(block, Mapping) and block.get("type") == "non_standard"
    return block["value"] if wrapped and isinstance(block.get("value"), Mapping) else block


def _titles(document: Mapping[str, Any]) -> list[str]:
    return [document[key] for key in ("title", "context") if isinstance(document.get(key), str)]


def _document_content(kind: str, document: Mapping[str, Any], where: str) -> list[Any] | None:
    """The blocks that a document holds, its text as one; None if it holds no text, or a file.

    Raises:
        InputError: a text in base64 that is none.
    """
    held = document.get("source") if kind == "document" else document
    if not isinstance(held, Mapping) or _has_media_source(document):
        return None
    content = next((held[key] for key in ("data", "content", "text") if held.get(key) is not None), None)
    if content is None and kind == "text-plain" and document.get("base64") is not None:
        content = _decoded(document["base64"], where)
    if content is None and kind == "web_search_result" and _titles(document):  # its content is encrypted
        content = []
    return content if content is None or isinstance(content, list) else [content]


def _decoded(text: Any, where: str) -> str:
    try:
        return base64.b64decode("".join(text.split()), validate=True).decode()
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{where} holds a 'text-plain' content block whose base64 is no text: {first_line(error)}.",
            hint="Give base64 of UTF-8, or the text itself as text.",
        ) from error


def _output_parts(kind: str, block: Mapping[str, Any]) -> list[Any] | None:
    """The blocks of a tool's result; None if it has none where it must."""
    output = block.get("output", block.get("content"))
    if output is None:
        return [] if kind == "tool_result" else None
    if isinstance(output, list):
        return output
    return [output if isinstance(output, Mapping) else str(output)]


def _result_texts(value: Any) -> Iterator[str]:
    """The plain text in a result block of a provider's built-in tool, depth first."""
    if isinstance(value, list):
        for item in value:
            yield from _result_texts(item) if not isinstance(item, str) else (item,)
    elif isinstance(value, Mapping) and str(value.get("type")) in _DOCUMENTS:
        yield from _titles(value)
        yield from _result_texts(value.get("source") if value["type"] == "document" else {**value, "type": None})
    elif isinstance(value, Mapping):
        if value.get("type") == "text" and isinstance(value.get("data"), str):  # a document's source
            yield value["data"]
        for key in _RESULT_KEYS:
            item = value.get(key)
            if isinstance(item, str):
                yield item
            else:
                yield from _result_texts(item)


def is_media(block: Mapping[str, Any]) -> bool:
    """Whether a block is an image, a sound or a file, by its type or, of a document, by where its content is."""
    kind = block.get("type")
    return isinstance(kind, str) and (kind in _MEDIA or (kind in _DOCUMENTS and _has_media_source(block)))


def _has_media_source(block: Mapping[str, Any]) -> bool:
    if block.get("type") == "text-plain":
        given = {key for key in ("text", "base64", "url", "file_id") if block.get(key) is not None}
        return bool(given) and given <= {"url", "file_id"}
    source = block.get("source")
    return isinstance(source, Mapping) and source.get("type", "text") not in ("text", "content")


def _text_in(value: Any) -> str | None:
    """A block's text, which some providers wrap in another mapping; None if it has none."""
    if isinstance(value, Mapping):
        return _text_in(value.get("value", value.get("text")))
    return None if value is None else str(value)


def _reasoning_texts(block: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning", "thinking", "text", "thought", "reasoning_content"):
        value = block.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _reasoning_texts(value)
    summary = block.get("summary")
    if isinstance(summary, list):
        yield "\n\n".join(_text_in(part.get("text")) or "" for part in summary if isinstance(part, Mapping))


def _json_text(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} holds a 'json' content block that is no JSON: {error}.") from error


def _mappings(message: AIMessage) -> list[Mapping[str, Any]]:
    content: Any = message.content
    return [block for block in content or () if isinstance(block, Mapping)] if not isinstance(content, str) else []


def _refusal_or_transcript(message: BaseMessage) -> str:
    """Text of an answer without content: OpenAI's refusal, or the transcript of its audio."""
    refusal, audio = message.additional_kwargs.get("refusal"), message.additional_kwargs.get("audio")
    spoken = audio.get("transcript") if isinstance(audio, Mapping) else None
    return next((text for text in (refusal, spoken) if isinstance(text, str)), "")


def _parsed_call(call_id: str | None, name: Any, arguments: Any) -> _Call:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return _invalid_call(call_id, name, arguments)
    return call_id, str(name or "unknown"), {} if arguments is None else arguments


def _invalid_call(call_id: str | None, name: Any, arguments: Any) -> _Call:
    return call_id, str(name or "unknown"), {"invalid_arguments": arguments or ""}


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
