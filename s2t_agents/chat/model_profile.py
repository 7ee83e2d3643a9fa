"""LangChain's model profile of a chat model, from the files on disk; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import ModelProfile

from ..backends.loading import described
from ..checkpoint_checks import check_files
from ..errors import ConfigError
from ..formats.reasoning import ReasoningFormat, has_reasoning
from ..hub import ModelSource
from ..redaction import url_without_secrets
from ..scheduling.language_model import LanguageModel


def profile_of(
    model: str | LanguageModel, max_tokens: int, options: Mapping[str, Any], chat_template: str | None = None
) -> ModelProfile:
    """LangChain's model profile; without ``max_input_tokens`` if ``config.json`` is not on disk, and without
    ``reasoning_output`` if the tokenizer's is not. Reads no weights.
    """
    profile = ModelProfile(
        name=url_without_secrets(model if isinstance(model, str) else model.name),
        max_output_tokens=max_tokens,
        text_inputs=True,
        image_inputs=False,
        audio_inputs=False,
        pdf_inputs=False,
        text_outputs=True,
        tool_calling=True,
        tool_choice=True,
        tool_call_streaming=True,
        structured_output=True,
    )
    window, reasons = _window_of(model, options), _reasons(model, options, chat_template)
    if window is not None:
        profile["max_input_tokens"] = window
    if reasons is not None:
        profile["reasoning_output"] = reasons
    return profile


def _reasons(model: str | LanguageModel, options: Mapping[str, Any], chat_template: str | None) -> bool | None:
    """Whether the model may think before it answers; None where what says so is not on this disk."""
    if isinstance(model, LanguageModel):
        return (
            ReasoningFormat.of(model.tokenizer, str(chat_template or model.tokenizer.chat_template or "")) is not None
        )
    try:
        source = ModelSource.of(model, options)
        check_files(source)
        file = source.file("tokenizer_config.json", here=True)
        if file is None:
            return None
        config, jinja = source.json(file), source.file("chat_template.jinja", here=True)
        template = chat_template or (jinja.read_text(encoding="utf-8") if jinja is not None else None)
        written = str(template or config.get("chat_template") or "")
        if has_reasoning(set(), written):  # mostly the template names the tags, and no other file is read
            return True
        added = list(config.get("added_tokens_decoder", {}).values())
        if not added and (tokens := source.file("tokenizer.json", here=True)) is not None:
            added = source.json(tokens).get("added_tokens", [])
        return has_reasoning({str(token.get("content")) for token in added}, written)
    except (ConfigError, OSError, ValueError, AttributeError):  # raised again when the model is loaded
        return None


def _window_of(model: str | LanguageModel, options: Mapping[str, Any]) -> int | None:
    if isinstance(model, LanguageModel):
        return model.context_window
    try:
        limit = described(model, options).get("max_position_embeddings")
    except ConfigError:  # raised again when the model is loaded
        return None
    return limit if isinstance(limit, int) else None
