"""From a generation to LangChain's messages and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from ..formats.tool_calls import MessageDelta
from .generation import Generation

PROVIDER = "s2t"


def chat_result(generation: Generation, logprobs: Mapping[str, Any]) -> ChatResult:
    """The result of a generation whose deltas were all read, with its ``LogprobsReader.new()``."""
    parser = generation.parser
    message = AIMessage(
        content=parser.text,
        additional_kwargs=_reasoning_kwargs(generation.thoughts.reasoning if generation.thoughts else ""),
        tool_calls=parser.tool_calls,
        invalid_tool_calls=parser.invalid_tool_calls,
        usage_metadata=_usage(generation),
        response_metadata={**_metadata(generation), **logprobs},
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def message_chunk(delta: MessageDelta, logprobs: Mapping[str, Any]) -> ChatGenerationChunk | None:
    """A step's delta as a chunk, with its ``LogprobsReader.new()``; None if both are empty."""
    if not delta and not logprobs:
        return None
    message = AIMessageChunk(
        content=delta.text,
        additional_kwargs=_reasoning_kwargs(delta.reasoning),
        tool_call_chunks=delta.tool_call_chunks,
        response_metadata=dict(logprobs),
    )
    return ChatGenerationChunk(message=message)


def final_chunk(generation: Generation) -> ChatGenerationChunk:
    """The last chunk, with usage and metadata; LangChain adds these up, so they come once.

    It also ends the arguments of invalid calls, so that LangChain reads them as such: that text is not the model's.
    """
    message = AIMessageChunk(
        content="",
        tool_call_chunks=generation.parser.unparseable,
        usage_metadata=_usage(generation),
        response_metadata=_metadata(generation),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _reasoning_kwargs(reasoning: str) -> dict[str, Any]:
    """Reasoning where LangChain reads it for ``content_blocks``, and concatenates it over chunks."""
    return {"reasoning_content": reasoning} if reasoning else {}


def _usage(generation: Generation) -> UsageMetadata:
    input_tokens, output_tokens = generation.account.prompt_tokens, len(generation.account.steps)
    usage = UsageMetadata(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=input_tokens + output_tokens,
    )
    if (reused := generation.account.reused_tokens) is not None:
        usage["input_token_details"] = {"cache_read": reused}
    if generation.thoughts is not None:
        usage["output_token_details"] = {"reasoning": generation.account.thought_tokens}
    return usage


def _metadata(generation: Generation) -> dict[str, Any]:
    return {
        "model_name": generation.account.model,
        "model_provider": PROVIDER,
        "finish_reason": generation.finish_reason,
        "s2t": {**generation.account.metadata(), **_validation_notes(generation)},
    }


def _validation_notes(generation: Generation) -> dict[str, Any]:
    """What the grammar did not enforce and why the answer is invalid; empty keys are left out."""
    notes = {"relaxed": list(generation.schemas.relaxed), "invalid": generation.invalid}
    return {key: value for key, value in notes.items() if value}
