"""The conversation of one answer, for an LLM that reads it in its own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langchain_core.messages import BaseMessage

from ..formats.reasoning import ReasoningFormat
from .messages import PromptEncoder

ENCODERS = 8
"""Prompt encoders of LLMs that are kept."""


@dataclass(frozen=True, eq=False)
class AskedConversation:
    """See ``llms.question.Conversation``.

    Attributes:
        messages: with the response schema where the prompt shows it.
        tools: in OpenAI's form.
        prompt_tokens: of the SLM's prompt.
        thinking: whether that prompt has opened a thought.
    """

    messages: Sequence[BaseMessage]
    tools: Sequence[Mapping[str, Any]]
    prompt_tokens: int
    thinking: bool = False

    def prompt_for(self, tokenizer: Any, template: str | None, reasoning: ReasoningFormat | None) -> list[int]:
        """The prompt as another model reads it; a thought is open at its end where the SLM's is."""
        ids = _encoder(tokenizer, template).encode(self.messages, self.tools)
        if reasoning is None:
            return ids
        open_thought = reasoning.phase_after(tokenizer, ids) == "thought"
        if self.thinking and not open_thought:
            return [*ids, *reasoning.opening.ids]
        return [*ids, *reasoning.closing.ids] if open_thought and not self.thinking else ids


@lru_cache(maxsize=ENCODERS)
def _encoder(tokenizer: Any, template: str | None) -> PromptEncoder:
    return PromptEncoder(tokenizer, chat_template=template)
