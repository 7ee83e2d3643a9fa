"""Conversations and answers as OpenTelemetry's ``gen_ai.input.messages`` and ``gen_ai.output.messages``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


def input_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """A conversation; of content that is no text only its type."""
    return [{"role": _ROLES.get(message.type, message.type), "parts": _parts(message)} for message in messages]


def output_message(text: str, reasoning: str, calls: Iterable[Mapping[str, Any]], finish_reason: str) -> dict[str, Any]:
    """An answer, whole or as far as it came."""
    parts = [{"type": kind, "content": said} for kind, said in (("reasoning", reasoning), ("text", text)) if said]
    return {"role": "assistant", "parts": [*parts, *map(_call, calls)], "finish_reason": finish_reason}


def _parts(message: BaseMessage) -> list[dict[str, Any]]:
    if isinstance(message, ToolMessage):
        return [{"type": "tool_call_response", "id": message.tool_call_id, "response": message.content}]
    blocks = [message.content] if isinstance(message.content, str) else message.content
    parts = [part for block in blocks if (part := _part(block)) is not None]
    if isinstance(message, AIMessage):
        parts += map(_call, message.tool_calls)
    return parts


def _part(block: str | Mapping[str, Any]) -> dict[str, Any] | None:
    if isinstance(block, str):
        return {"type": "text", "content": block} if block else None
    kind = str(block.get("type", "text"))
    if kind == "text":
        return {"type": "text", "content": str(block.get("text", ""))}
    return {"type": kind}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_call", "id": call.get("id"), "name": call["name"], "arguments": call["args"]}
