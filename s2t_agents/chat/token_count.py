"""Number of tokens of a conversation under the model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage, get_buffer_string

from ..errors import InputError
from .messages import PromptEncoder


def tokens_of_messages(
    encoder: PromptEncoder, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = ()
) -> int:
    """Number of tokens of the rendered conversation, without the generation prompt; 0 for no messages.

    What the template cannot render (``trim_messages`` counts parts: a tool result without its call) is counted as
    text, message by message.
    """
    if not messages:
        return 0
    try:
        return len(encoder.encode(messages, tools, generation_prompt=False))
    except InputError:
        return sum(len(encoder.text_ids(get_buffer_string([message]))) for message in messages)
