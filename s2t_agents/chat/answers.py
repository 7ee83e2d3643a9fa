"""From a generation to LangChain's messages and chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from ..formats.tool_calls import Delta
from ..ledger import Ledger
from .accounting import from_cache
from .generation import Generation

PROVIDER = "s2t"


def whole(generation: Generation) -> ChatResult:
    """The answer of a generation that was read to its end."""
    parser = generation.parser
    message = AIMessage(
        content=parser.text,
        additional_kwargs=_besides(generation.thoughts.reasoning if generation.thoughts else ""),
        tool_calls=parser.tool_calls,
        invalid_tool_calls=parser.invalid_tool_calls,
        usage_metadata=_usage(generation),
        response_metadata=_metadata(generation),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def piece(delta: Delta) -> ChatGenerationChunk | None:
    """What one step adds; None where it shows nothing."""
    if not delta:
        return None
    message = AIMessageChunk(
        content=delta.text,
        additional_kwargs=_besides(delta.reasoning),
        tool_call_chunks=delta.tool_call_chunks,
    )
    return ChatGenerationChunk(message=message)


def last(generation: Generation) -> ChatGenerationChunk:
    """The end of a stream: all numbers, which LangChain would add up or join if they came more than once."""
    message = AIMessageChunk(
        content="",
        usage_metadata=_usage(generation),
        response_metadata=_metadata(generation),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def cached(found: Sequence[ChatGeneration], ledger: Ledger | None) -> list[ChatGeneration]:
    """Answers out of a cache: free, and their metadata and the ledger say so."""
    return [
        one.model_copy(update={"message": from_cache(one.message, ledger)})
        if isinstance(one.message, AIMessage)
        else one
        for one in found
    ]


def _besides(reasoning: str) -> dict[str, Any]:
    """The thought, where LangChain makes the reasoning block of ``content_blocks`` from, and adds chunks up."""
    return {"reasoning_content": reasoning} if reasoning else {}


def _usage(generation: Generation) -> UsageMetadata:
    read, written = generation.account.prompt_tokens, len(generation.account.steps)
    usage = UsageMetadata(
        input_tokens=read,
        output_tokens=written,
        total_tokens=read + written,
        input_token_details={"cache_read": generation.account.reused_tokens},
    )
    if generation.thoughts is not None:
        usage["output_token_details"] = {"reasoning": generation.account.thought_tokens}
    return usage


def _metadata(generation: Generation) -> dict[str, Any]:
    return {
        "model_name": generation.account.model,
        "model_provider": PROVIDER,
        "finish_reason": generation.finish_reason,
        "s2t": {**generation.account.metadata(), **_held(generation)},
    }


def _held(generation: Generation) -> dict[str, Any]:
    """What the grammar did not enforce, and what the finished answer got wrong; keys only where there is something."""
    told = {"relaxed": list(generation.checks.relaxed), "invalid": generation.invalid}
    return {key: value for key, value in told.items() if value}
