"""Answers of ``/v1/chat/completions``: from LangChain messages and chunks to OpenAI's JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from pydantic_core import to_json

from ..formats.tool_calls import as_written
from .error_responses import event_of

DONE = event_of("[DONE]")


def usage_of(usage: UsageMetadata | None) -> dict[str, Any] | None:
    """OpenAI's usage; None where it is unknown."""
    if usage is None:
        return None
    reasoning = usage.get("output_token_details", {}).get("reasoning", 0)
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
        **cached_tokens_entry(usage.get("input_token_details", {}).get("cache_read")),
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def cached_tokens_entry(cached: int | None) -> dict[str, Any]:
    """OpenAI's entry of a usage for prompt tokens from a cache; none where they are not known."""
    return {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}


def chat_completion(message: AIMessage, *, answer_id: str, model: str) -> dict[str, Any]:
    """OpenAI's ``chat.completion`` of an answer."""
    calls = [
        *(_call(call["id"], call["name"], to_json(call["args"]).decode()) for call in message.tool_calls),
        *(_call(call["id"], call["name"], as_written(call["args"] or "")) for call in message.invalid_tool_calls),
    ]
    reasoning = message.additional_kwargs.get("reasoning_content")
    shown: dict[str, Any] = {
        "role": "assistant",
        "content": message.content or (None if calls else ""),
        "refusal": None,
    }
    if reasoning:
        shown["reasoning_content"] = reasoning
    if calls:
        shown["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": shown,
        "logprobs": message.response_metadata.get("logprobs"),
        "finish_reason": _finish_reason(message.response_metadata, bool(calls)),
    }
    return {
        **_head(answer_id, model, "chat.completion"),
        "choices": [choice],
        "usage": usage_of(message.usage_metadata),
        "s2t": message.response_metadata.get("s2t"),
    }


async def chat_events(
    chunks: AsyncIterator[AIMessageChunk], *, answer_id: str, model: str, with_usage: bool
) -> AsyncIterator[bytes]:
    """OpenAI's server-sent events of a streamed answer, the last one ``[DONE]``; closed early, it ends the answer."""
    created = int(time.time())
    opened, called = False, False
    usage: UsageMetadata | None = None

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {**_head(answer_id, model, "chat.completion.chunk"), "created": created}
        return event_of({**head, "choices": choices, **({"usage": None} if with_usage else {}), **more})

    async with aclosing(chunks):  # type: ignore[type-var]
        async for chunk in chunks:
            metadata = chunk.response_metadata
            finished = "finish_reason" in metadata
            delta = {} if finished else _delta(chunk)  # what the last chunk adds to a call is for LangChain alone
            called = called or "tool_calls" in delta
            usage = chunk.usage_metadata or usage
            logprobs = metadata.get("logprobs")
            if not (delta or finished or logprobs):
                continue
            if not opened:
                opened = True
                yield event([_choice({"role": "assistant", "content": ""})])
            reason = _finish_reason(metadata, called) if finished else None
            more = {"s2t": metadata["s2t"]} if "s2t" in metadata else {}
            yield event([_choice(delta, reason, logprobs)], **more)
    if with_usage:
        yield event([], usage=usage_of(usage))
    yield DONE


def _head(answer_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model, "system_fingerprint": None}


def _choice(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(chunk: AIMessageChunk) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.content:
        delta["content"] = chunk.content
    if reasoning := chunk.additional_kwargs.get("reasoning_content"):
        delta["reasoning_content"] = reasoning
    if chunk.tool_call_chunks:
        delta["tool_calls"] = [
            {
                "index": each["index"],
                **({"id": each["id"], "type": "function"} if each["id"] else {}),
                "function": {
                    **({"name": each["name"]} if each["name"] else {}),
                    "arguments": each["args"] or "",
                },
            }
            for each in chunk.tool_call_chunks
        ]
    return delta


def _call(call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _finish_reason(metadata: Mapping[str, Any], called: bool) -> str:
    """A call that was begun and is not valid is a call, too: the client sees it."""
    reason = str(metadata.get("finish_reason"))
    return "tool_calls" if called and reason == "stop" else reason
