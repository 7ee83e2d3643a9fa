"""How many tokens a text or a conversation takes in the model's own tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage, get_buffer_string

from ..errors import InputError
from .messages import PromptEncoder


def tokens_of_messages(
    encoder: PromptEncoder, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = ()
) -> int:
    """Tokens of a conversation as the template writes it, without the opening of the next turn.

    What no template takes (trimming counts parts: a tool's result without its call) is counted as text, one message
    after the other. No messages take no tokens.
    """
    if not messages:
        return 0
    try:
        return len(encoder.encode(messages, tools, generation_prompt=False))
    except InputError:
        return sum(len(encoder.text_ids(get_buffer_string([message]))) for message in messages)
